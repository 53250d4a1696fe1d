"""What trains: parameters chosen by path, experts chosen by mask."""

from __future__ import annotations

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.config import ConfigError
from trace_jax.models.arrays import flatten
from trace_jax.models.config import ModelConfig

PRESETS: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    "experts": ("layers/experts/*",),
    "selected_experts": ("layers/experts/*",),
    "routers_frozen": ("!layers/router*", "*"),
    "down_projections": ("layers/experts/down", "dense/mlp/down"),
}
# Only chooses experts, so that no loss has a gradient for it; weight decay alone would move it.
_NEVER = "layers/router_correction"


def trains(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether the first pattern that matches `path` trains it; a pattern that starts with ! freezes."""
    for pattern in patterns:
        if fnmatch.fnmatchcase(path, pattern.removeprefix("!")):
            return not pattern.startswith("!")
    return False


def partition(params: Any, trainable: str | tuple[str, ...]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Splits parameters into flat dicts (trainable, frozen). Frozen ones get neither gradient nor optimizer state.

    Raises:
      ConfigError: an unknown preset, a pattern that matches nothing, or nothing left to train.
    """
    patterns = trainable if isinstance(trainable, tuple) else PRESETS.get(trainable, (trainable,))
    flat = flatten(params)
    for pattern in () if trainable in PRESETS else patterns:
        if not fnmatch.filter(flat, pattern.removeprefix("!")):
            raise ConfigError(
                f"trainable: {pattern!r} is neither a preset ({', '.join(PRESETS)}) nor a pattern that matches a "
                f"parameter. Parameters: {', '.join(sorted(flat))}."
            )
    training = {path: leaf for path, leaf in flat.items() if trains(path, patterns) and path != _NEVER}
    if not training:
        raise ConfigError(f"trainable: {trainable!r} freezes every parameter; nothing would be unlearned.")
    return training, {path: leaf for path, leaf in flat.items() if path not in training}


def update_masks(
    training: dict[str, jax.Array], config: ModelConfig, *, layers: tuple[int, int] | None = None
) -> dict[str, jax.Array] | None:
    """Masks that multiply the updates of stacked arrays, or None when all of every array trains.

    Args:
      training: flat trainable parameters.
      layers: (first, last), layers of the network counted from 1, inclusive; only these train.
    Returns:
      {path: f32 mask that broadcasts to the parameter} for every trainable path.
    Raises:
      ConfigError: nothing is left to train.
    """
    if layers is None:
        return None
    stacks = {"layers": config.moe_layers, "dense": config.dense_layers}
    masks = {}
    for path, leaf in training.items():
        mask = np.ones((1,) * leaf.ndim, np.float32)
        stack = path.partition("/")[0]
        if stack in stacks:
            inside = [layers[0] <= layer + 1 <= layers[1] for layer in stacks[stack]]
            mask = mask * np.reshape(inside, (-1, *(1,) * (leaf.ndim - 1)))
        masks[path] = jnp.asarray(mask, jnp.float32)
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError(f"nothing of {', '.join(masks)} would train: no part of it is in layers {layers}.")
    return masks


def trainable_table(
    params: Any,
    trainable: str | tuple[str, ...],
    masks: dict[str, jax.Array] | None = None,
    selected: np.ndarray | None = None,
) -> list[dict]:
    """One row per parameter: path, shape, how many numbers it has and how many train.

    masks: of updates, from `update_masks`. selected: bool [L, E], the experts that train where not all do.
    """
    training, frozen = partition(params, trainable)
    rows = []
    for path, leaf in sorted({**training, **frozen}.items()):
        count = 0
        if path in training:
            share = 1.0 if masks is None else float(np.mean(masks[path]))
            share = share if selected is None else float(np.mean(selected))
            count = round(leaf.size * share)
        rows.append({"path": path, "shape": list(leaf.shape), "parameters": leaf.size, "trained": count})
    return rows
