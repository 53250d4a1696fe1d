"""The optax chain: clip, the optimizer's direction, decay, learning rate, and the update mask last."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from trace_jax.config import Section, Variant, option

SCHEDULES = ("constant", "cosine", "linear")
Axes = Mapping[str, tuple[str, ...]]

_FACTORED_FROM = 128  # Adafactor keeps the second moment of smaller matrices whole


class Optimizer(Variant):
    """How gradients become updates.

    moments: how many numbers it keeps for each parameter at most (Adafactor: of small matrices).
    """

    moments: ClassVar[int]

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        """Updates before decay and learning rate. axes: of parameters by path, see `make_optimizer`."""
        raise NotImplementedError


class _Adam(Section):
    b1: float = option(0.9, help="decay of Adam's first moment", minimum=0.0, maximum=1.0)
    b2: float = option(0.98, help="decay of Adam's second moment", minimum=0.0, maximum=1.0)
    eps: float = option(1e-8, help="added to the root of Adam's second moment", minimum=0.0)

    def adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


class AdamW(_Adam, Optimizer, name="adamw"):
    moments = 2

    def direction(self, axes):
        return self.adam()


class Adafactor(Optimizer, name="adafactor"):
    """Without its parameter scale: the learning rate means what it does for AdamW."""

    moments = 1

    def direction(self, axes):
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=_FACTORED_FROM)
        return per_matrix(optax.chain(factored, optax.clip_by_block_rms(1.0)), axes)


class SGD(Optimizer, name="sgd"):
    momentum: float = option(0.9, help="decay of the momentum; 0 = none", minimum=0.0, maximum=1.0)
    moments = 1

    def direction(self, axes):
        return optax.trace(self.momentum) if self.momentum else optax.identity()


class Muon(_Adam, Optimizer, name="muon"):
    """Orthogonal updates of matrices; what is no matrix is left to Adam."""

    momentum: float = option(0.95, help="decay of the momentum; 0 = none", minimum=0.0, maximum=1.0)
    moments = 2

    def direction(self, axes):
        def like_adam(updates, _):  # a root mean square of 0.2 (2502.16982): one learning rate serves both
            return updates * (0.2 * math.sqrt(max(updates.shape)))

        def labels(tree):
            return {path: "muon" if orthogonal(axes[path]) else "adam" for path in tree}

        muon = optax.chain(optax.contrib.scale_by_muon(beta=self.momentum), optax.stateless(like_adam))
        return optax.partition({"muon": per_matrix(muon, axes), "adam": self.adam()}, labels)


class OptimizerConfig(Section):
    """The optimizer, its schedule and clipping (optax)."""

    optimizer: Optimizer = option("adamw", help="how gradients become updates")
    learning_rate: float = option(1e-3, help="peak learning rate", minimum=0.0)
    weight_decay: float = option(0.0, help="decoupled weight decay", minimum=0.0)
    clip_norm: float = option(1.0, help="largest global gradient norm; 0 = no clipping", minimum=0.0)
    warmup_steps: int = option(0, help="steps of linear warm-up", minimum=0)
    schedule: str = option("constant", help="learning rate after warm-up", choices=SCHEDULES)

    @property
    def optimization(self) -> "OptimizerConfig":
        """The optimizer's settings alone."""
        return OptimizerConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(OptimizerConfig)}
        )


class TrainingConfig(OptimizerConfig):
    """Training the target model (and the retrained one) from scratch."""

    steps: int = option(900, help="optimizer steps", minimum=1)
    batch_size: int = option(32, help="rows per step over all devices", minimum=1)
    load_balance: float = option(0.01, help="coefficient of the load-balancing loss", minimum=0.0)
    learning_rate: float = option(5e-3, help="peak learning rate", minimum=0.0)
    warmup_steps: int = option(40, help="steps of linear warm-up", minimum=0)
    schedule: str = option("cosine", help="learning rate after warm-up", choices=SCHEDULES)
    checkpoint_every: int = option(100, help="steps between saved training states", minimum=1)
    retrained: bool = option(False, help="also train a model on retain data alone, as reference for membership")


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


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: Axes, masks: dict[str, jax.Array] | None = None
) -> optax.GradientTransformation:
    """The optimizer that `config` names, whose frozen slices stay bit-identical.

    Gradients are masked first, so that the clipping norm is that of what trains. Updates are masked last: masking
    gradients alone would let weight decay and old momentum move frozen experts.

    Args:
      axes: logical axes of parameters by path (`ArraySpec.axes`), which say where the matrices in them are.
      masks: by path; gradients and updates are multiplied by them.
    """
    masked = optax.identity()
    if masks is not None:
        masked = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, masks))
    return optax.chain(
        masked,
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        config.optimizer.direction(axes),
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay > 0 else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        masked,
    )


def groups(axes: tuple[str, ...]) -> list[list[int]]:
    """The dimensions of each vector or matrix in an array, in order: one list for a vector, two for a matrix.

    Heads and their width are one side of a matrix. Dimensions in no list are stacked: they count the matrices.
    """
    sides: list[list[int]] = []
    for dimension, name in enumerate(axes):
        if name == "head" and sides:
            sides[-1].append(dimension)
        elif name not in ("layers", "experts", "rows", "gate_up"):
            sides.append([dimension])
    return sides


def orthogonal(axes: tuple[str, ...]) -> bool:
    """Whether Muon orthogonalises the updates of an array: whether it is of matrices inside the network.

    A row of the embedding or the head belongs to one token, most of which a step never sees, and a column of the router
    to one expert: an orthogonal update would move them all alike.
    """
    return len(groups(axes)) == 2 and not {"vocab", "router"} & set(axes)


class _Matrices:
    """Where the matrices (or vectors) are in an array of `shape` with these `axes`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...]):
        inner = groups(axes)
        within = [dimension for group in inner for dimension in group]
        self.stacked = [dimension for dimension in range(len(shape)) if dimension not in within]
        self.shape, self.order = shape, self.stacked + within
        self.apart_shape = (*(shape[d] for d in self.stacked), *(math.prod(shape[d] for d in g) for g in inner))

    def apart(self, array: jax.Array) -> jax.Array:
        """[stacked..., rows, columns], or [stacked..., width]; arrays of another shape as they are."""
        return array.transpose(self.order).reshape(self.apart_shape) if array.shape == self.shape else array

    def together(self, array: jax.Array) -> jax.Array:
        """The inverse of `apart`."""
        if array.shape != self.apart_shape:
            return array
        return array.reshape([self.shape[d] for d in self.order]).transpose(np.argsort(self.order).tolist())

    def mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        for _ in self.stacked:
            function = jax.vmap(function)
        return function


def per_matrix(transform: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """`transform` of each matrix, or vector, of every parameter by itself; the state is a dict by path.

    Stacked dimensions are mapped over (`jax.vmap`) and never merged, so that arrays stay spread over devices along
    them; they come first in the state's arrays. Those of a parameter's own size have its shape.
    """

    def matrices(tree: Mapping[str, Any]) -> dict[str, _Matrices]:
        """Without what `optax.partition` leaves to another optimizer."""
        arrays = {path: leaf for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}
        return {path: _Matrices(leaf.shape, axes[path]) for path, leaf in arrays.items()}

    def init(params):
        return {
            path: jax.tree.map(m.together, m.mapped(transform.init)(m.apart(params[path])))
            for path, m in matrices(params).items()
        }

    def update(updates, state, params=None):
        assert params is not None
        result, changed = dict(updates), {}
        for path, m in matrices(updates).items():
            one = m.mapped(lambda u, p, s: transform.update(u, s, p))
            arrays = m.apart(updates[path]), m.apart(params[path]), jax.tree.map(m.apart, state[path])
            update, after = one(*arrays)
            result[path], changed[path] = m.together(update), jax.tree.map(m.together, after)
        return result, changed

    return optax.GradientTransformation(init, update)
