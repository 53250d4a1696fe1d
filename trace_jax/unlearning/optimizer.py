"""The optax chain: clip, the optimizer's direction, decay, learning rate, and the update mask last."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from trace_jax.unlearning.config import OptimizerConfig

# Axes along which an array holds one matrix (or vector) after another.
_STACKED = ("layers", "experts", "rows", "gate_up")
# Muon is for matrices inside the network. A row of the embedding or the head belongs to one token, most of which a
# step never sees, and a column of the router to one expert: an orthogonal update would move them all alike.
_NOT_ORTHOGONAL = ("vocab", "router")
# Root mean square of Muon's update, which is then about as large as Adam's (2502.16982): one learning rate serves both.
_MUON_RMS = 0.2
_FACTORED_FROM = 128  # Adafactor keeps the second moment of smaller matrices whole


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, cosine or linear decay to zero at `steps`."""
    decay = max(1, steps - config.warmup_steps)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def masked(masks: dict[str, jax.Array] | None) -> optax.GradientTransformation:
    """Multiplies updates by masks (flat dict by path). Identity without masks."""
    if masks is None:
        return optax.identity()
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, masks))


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    masks: dict[str, jax.Array] | None = None,
    *,
    axes: Mapping[str, tuple[str, ...]] | None = None,
) -> optax.GradientTransformation:
    """The optimizer that `config` names, whose frozen slices stay bit-identical.

    Gradients are masked first, so that the clipping norm is that of what trains. Updates are masked last: masking
    gradients alone would let weight decay and old momentum move frozen experts.

    Args:
      axes: logical axes of parameters by path (`ArraySpec.axes`), which say where the matrices in them are. A
        parameter that is not among them is taken for one vector.
    """
    return optax.chain(
        masked(masks),
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        _direction(config, axes or {}),
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay > 0 else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        masked(masks),
    )


def _direction(config: OptimizerConfig, axes: Mapping[str, tuple[str, ...]]) -> optax.GradientTransformation:
    """Updates before decay and learning rate.

    Adafactor without its parameter scale: the learning rate means what it does for AdamW.
    """
    b1, b2, eps, momentum = config.b1 or 0.0, config.b2 or 0.0, config.eps or 0.0, config.momentum or 0.0
    if config.optimizer == "sgd":
        return optax.trace(momentum) if momentum else optax.identity()
    if config.optimizer == "adafactor":
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=_FACTORED_FROM)
        return per_matrix(optax.chain(factored, optax.clip_by_block_rms(1.0)), axes)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if config.optimizer == "adamw":
        return adam
    muon = optax.chain(optax.contrib.scale_by_muon(beta=momentum), optax.stateless(_like_adam))

    def labels(tree):
        return {path: "muon" if orthogonal(axes.get(path, ())) else "adam" for path in tree}

    return optax.partition({"muon": per_matrix(muon, axes), "adam": adam}, labels)


def _like_adam(updates: Any, _: Any) -> Any:
    """An orthogonal matrix with the root mean square of Adam's updates."""
    return updates * (_MUON_RMS * math.sqrt(max(updates.shape)))


def moments(config: OptimizerConfig) -> int:
    """How many numbers an optimizer keeps for each parameter at most (Adafactor: of small matrices)."""
    return {"adamw": 2, "adafactor": 1, "sgd": 1, "muon": 2}[config.optimizer]


def groups(axes: tuple[str, ...]) -> list[list[int]]:
    """The dimensions of each vector or matrix in an array, in order: one list for a vector, two for a matrix.

    Heads and their width are one side of a matrix. Dimensions that are in no list count the matrices.
    """
    found: list[list[int]] = []
    for dimension, name in enumerate(axes):
        if name == "head" and found:
            found[-1].append(dimension)
        elif name not in _STACKED:
            found.append([dimension])
    return found


def orthogonal(axes: tuple[str, ...]) -> bool:
    """Whether Muon orthogonalises the updates of an array."""
    return len(groups(axes)) == 2 and not set(axes) & set(_NOT_ORTHOGONAL)


def per_matrix(
    transform: optax.GradientTransformation, axes: Mapping[str, tuple[str, ...]]
) -> optax.GradientTransformation:
    """`transform` of each matrix, or vector, of every parameter by itself; the state is a dict by path.

    Stacked dimensions are mapped over (`jax.vmap`) and never merged, so that arrays stay spread over devices along
    them; they come first in the state's arrays. Those of a parameter's own size have its shape.
    """

    def mapped(function: Callable[..., Any], path: str, leaf: jax.Array) -> Callable[..., Any]:
        for _ in _stacked(leaf, axes.get(path)):
            function = jax.vmap(function)
        return function

    def stored(state: Any, path: str, leaf: jax.Array) -> Any:
        own, shape = axes.get(path), jax.eval_shape(functools.partial(_apart, axes=axes.get(path)), leaf).shape
        return jax.tree.map(lambda x: _together(x, leaf.shape, own) if x.shape == shape else x, state)

    def unpacked(state: Any, path: str, leaf: jax.Array) -> Any:
        return jax.tree.map(lambda x: _apart(x, axes.get(path)) if x.shape == leaf.shape else x, state)

    def init(params):
        state = {}
        for path, leaf in _arrays(params).items():
            state[path] = stored(mapped(transform.init, path, leaf)(_apart(leaf, axes.get(path))), path, leaf)
        return state

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("this optimizer needs the parameters: update(updates, state, params).")
        result, changed = dict(updates), {}
        for path, leaf in _arrays(updates).items():
            apart = (_apart(tree[path], axes.get(path)) for tree in (updates, params))
            function = mapped(lambda u, p, s: transform.update(u, s, p), path, leaf)
            found, after = function(*apart, unpacked(state[path], path, leaf))
            result[path], changed[path] = _together(found, leaf.shape, axes.get(path)), stored(after, path, leaf)
        return result, changed

    return optax.GradientTransformation(init, update)


def _arrays(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Without what `optax.partition` leaves to another optimizer."""
    return {path: leaf for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}


def _inner(leaf: Any, axes: tuple[str, ...] | None) -> list[list[int]]:
    return groups(axes) if axes is not None else [list(range(len(leaf.shape)))]


def _stacked(leaf: Any, axes: tuple[str, ...] | None) -> list[int]:
    inside = {dimension for group in _inner(leaf, axes) for dimension in group}
    return [dimension for dimension in range(len(leaf.shape)) if dimension not in inside]


def _order(leaf: Any, axes: tuple[str, ...] | None) -> list[int]:
    return _stacked(leaf, axes) + [dimension for group in _inner(leaf, axes) for dimension in group]


def _apart(leaf: jax.Array, axes: tuple[str, ...] | None) -> jax.Array:
    """[stacked..., rows, columns], or [stacked..., width]."""
    widths = [math.prod(leaf.shape[d] for d in group) for group in _inner(leaf, axes)]
    return leaf.transpose(_order(leaf, axes)).reshape(*(leaf.shape[d] for d in _stacked(leaf, axes)), *widths)


def _together(array: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...] | None) -> jax.Array:
    """The inverse of `_apart` for an array of that shape."""
    like = jax.ShapeDtypeStruct(shape, array.dtype)
    order = _order(like, axes)
    return array.reshape([shape[d] for d in order]).transpose(np.argsort(order).tolist())
