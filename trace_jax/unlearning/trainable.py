"""What trains: parameters chosen by path, experts chosen by mask."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.config import ConfigError
from trace_jax.models.arrays import ArraySpec, flatten
from trace_jax.models.config import ModelConfig
from trace_jax.unlearning.lora import factor_paths
from trace_jax.unlearning.parameters import is_of_experts

_GROUPED, _LATENT = ("q", "k", "v"), ("q_down", "q_up", "kv_down", "kv_up")
PRESETS: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    "experts": ("layers/experts/*",),
    "selected_experts": ("layers/experts/*",),
    "seuf": ("layers/experts/*", "layers/router*"),
    "routers_frozen": ("!layers/router*", "*"),
    "down_projections": ("layers/experts/down", "dense/mlp/down"),
    # What low-rank factors are added to: every projection of attention, and the matrices of the experts.
    "lora": (
        *(f"{stack}/{name}" for stack in ("layers", "dense") for name in (*_GROUPED, *_LATENT, "o")),
        "layers/experts/gate_up",
        "layers/experts/down",
    ),
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
    training: Mapping[str, Any],
    config: ModelConfig,
    *,
    layers: tuple[int, int] | None = None,
    selected: np.ndarray | None = None,
) -> dict[str, jax.Array] | None:
    """Masks that multiply the updates of stacked arrays, or None when all of every array trains.

    Args:
      training: flat parameters of which something trains.
      layers: (first, last), layers of the network counted from 1, inclusive; only these train.
      selected: bool [L, E], the experts whose rows alone train; of all else (routers) only their layers train.
    Returns:
      {path: f32 mask that broadcasts to the parameter} for every trainable path.
    Raises:
      ConfigError: nothing is left to train.
    """
    if layers is None and (selected is None or all(is_of_experts(path) for path in training)):
        return None
    stacks = {"layers": config.moe_layers, "dense": config.dense_layers}
    masks = {}
    for path, leaf in training.items():
        mask, along = np.ones((1,) * leaf.ndim, np.float32), (-1, *(1,) * (leaf.ndim - 1))
        stack = path.partition("/")[0]
        if layers is not None and stack in stacks:
            inside = [layers[0] <= layer + 1 <= layers[1] for layer in stacks[stack]]
            mask = mask * np.reshape(inside, along)
        if selected is not None and not is_of_experts(path):
            mask = mask * np.reshape(selected.any(axis=1), along)
        masks[path] = jnp.asarray(mask, jnp.float32)
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError(f"nothing of {', '.join(masks)} would train: no part of it is in layers {layers}.")
    return masks


def trainable_table(
    params: Any,
    trainable: str | tuple[str, ...],
    masks: Mapping[str, jax.Array] | None = None,
    selected: np.ndarray | None = None,
    factors: Mapping[str, ArraySpec] | None = None,
) -> list[dict]:
    """One row per parameter: path, shape, how many numbers it has, how many train, and which ("" where none do).

    Args:
      masks: of updates, from `update_masks`.
      selected: bool [L, E], the experts that train where not all do.
      factors: low-rank factors by path (`trace_jax.unlearning.lora.factors`) that train instead of their parameters.
    """
    training, frozen = partition(params, trainable)
    rows = []
    for path, leaf in sorted({**training, **frozen}.items()):
        count, which = 0, ""
        if path in training and factors is not None:
            own = [factors[name].shape for name in factor_paths(path)]
            count, which = sum(math.prod(shape) for shape in own), f"rank {own[0][-1]}"
        elif path in training and selected is not None and is_of_experts(path):
            count, which = _part(leaf.size, selected, "experts")
        elif path in training:
            count, which = _part(leaf.size, np.ones(1) if masks is None else np.asarray(masks[path]), "layers")
        rows.append(
            {"path": path, "shape": list(leaf.shape), "parameters": leaf.size, "trained": count, "which": which}
        )
    return rows


def _part(size: int, mask: np.ndarray, of: str) -> tuple[int, str]:
    """(numbers that train, which they are) of an array with an even share for every entry of a mask."""
    number = int(mask.sum())
    which = "all" if number == mask.size else f"{number} of {mask.size} {of}" if number else ""
    return size // mask.size * number, which


def table_text(table: Sequence[Mapping[str, Any]]) -> str:
    """A trainable table as a person reads it: a line for each parameter that trains, one for all that don't."""
    trained, total = (sum(row[key] for row in table) for key in ("trained", "parameters"))
    training = [row for row in table if row["trained"]]
    frozen = [row for row in table if not row["trained"]]
    lines = [f"what trains: {trained:,} numbers; the model has {total:,} ({trained / total:.2%})"]
    columns = [
        (row["path"], " x ".join(map(str, row["shape"])), f"{row['trained']:,}", f"({row['which']})")
        for row in training
    ]
    columns.append(
        (
            "frozen",
            f"{len(frozen)} array{'s' * (len(frozen) != 1)}",
            f"{sum(row['parameters'] for row in frozen):,}",
            "",
        )
    )
    widths = [max(len(line[i]) for line in columns) for i in range(3)]
    for path, shape, count, which in columns:
        lines.append(f"  {path:{widths[0]}}  {shape:{widths[1]}}  {count:>{widths[2]}}  {which}".rstrip())
    return "\n".join(lines)
