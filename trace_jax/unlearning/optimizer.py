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
    """How gradients become updates."""

    moments: ClassVar[int]  # numbers that it keeps for each parameter at most (Adafactor: of small matrices)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        """Updates before decay and learning rate, of parameters with these axes (see `make_optimizer`)."""
        raise NotImplementedError


class _Adam(Section):
    b1: float = option(0.9, help="decay of Adam's first moment", minimum=0.0, maximum=1.0)
    b2: float = option(0.98, help="decay of Adam's second moment", minimum=0.0, maximum=1.0)
    eps: float = option(1e-8, help="added to the root of Adam's second moment", minimum=0.0)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


class AdamW(_Adam, Optimizer, name="adamw"):
    moments = 2


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
        return optax.partition({"muon": per_matrix(muon, axes), "adam": super().direction(axes)}, labels)


MOST = 1e4  # learning rate; RepSelect's plain steps along a small gradient take 2000


class OptimizerConfig(Section):
    """The optimizer, its schedule and clipping (optax)."""

    optimizer: Optimizer = option("adamw", help="how gradients become updates")
    learning_rate: float = option(1e-3, help="peak learning rate", minimum=0.0, maximum=MOST)
    weight_decay: float = option(0.0, help="decoupled weight decay", minimum=0.0)
    clip_norm: float = option(1.0, help="largest global gradient norm; 0 = no clipping", minimum=0.0)
    warmup_steps: int = option(0, help="steps of linear warm-up", minimum=0)
    schedule: str = option("constant", help="learning rate after warm-up", choices=SCHEDULES)

    @property
    def optimization(self) -> "OptimizerConfig":
        """The optimizer's settings alone."""
        return OptimizerConfig(*(getattr(self, field.name) for field in dataclasses.fields(OptimizerConfig)))


class TrainingConfig(OptimizerConfig):
    """Training the target model (and the retrained one) from scratch.

    Example:
      >>> config = tj.TrainingConfig(steps=200, batch_size=16)
      >>> config.schedule, config.warmup_steps
      ('cosine', 40)
    """

    steps: int = option(900, help="optimizer steps", minimum=1)
    batch_size: int = option(32, help="rows per step over all devices", minimum=1)
    load_balance: float = option(0.01, help="coefficient of the load-balancing loss", minimum=0.0)
    learning_rate: float = option(5e-3, help="peak learning rate", minimum=0.0, maximum=MOST)
    warmup_steps: int = option(40, help="steps of linear warm-up", minimum=0)
    schedule: str = option("cosine", help="learning rate after warm-up", choices=SCHEDULES)
    checkpoint_every: int = option(100, help="steps between saved training states", minimum=1)
    retrained: bool = option(False, help="also train a model on retain data alone, as reference for membership")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, cosine or linear decay to zero at `steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "linear": optax.linear_schedule(peak, 0.0, decay),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup])


def learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """f32 [steps], the rate of every step, computed at once: nobody waits for the device for one while it trains."""
    with jax.numpy_dtype_promotion("standard"):  # optax divides integers
        return np.asarray(jax.vmap(learning_rate(config, steps))(jnp.arange(steps)), np.float32)


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: Axes, masks: dict[str, jax.Array] | None = None
) -> optax.GradientTransformation:
    """The optimizer that `config` names. `axes` by path (`ArraySpec.axes`) say where the matrices of parameters are.

    What `masks` (by path) freeze stays bit-identical: gradients are masked first, so that the clipping norm is that of
    what trains, and updates last, so that weight decay and old momentum don't move frozen experts.
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
    """The dimensions of each vector (one list) or matrix (two) in an array. Heads and their width are one side of a
    matrix. Dimensions in no list are stacked: they count the matrices.
    """
    sides: list[list[int]] = []
    for dimension, name in enumerate(axes):
        if name == "head" and sides:
            sides[-1].append(dimension)
        elif name not in ("layers", "experts", "rows", "gate_up"):
            sides.append([dimension])
    return sides


def orthogonal(axes: tuple[str, ...]) -> bool:
    """Whether Muon orthogonalises an array's updates: of matrices inside the network. A row of embedding or head is of
    one token, which most steps never see, and a column of the router of one expert: it would move them all alike.
    """
    return len(groups(axes)) == 2 and not {"vocab", "router"} & set(axes)


def _matrices(shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[Callable, Callable, Callable]:
    """(apart, its inverse together, mapped: a function of one matrix or vector as one of all) for an array's shape."""
    inner = groups(axes)
    within = [dimension for group in inner for dimension in group]
    stacked = [dimension for dimension in range(len(shape)) if dimension not in within]
    order = stacked + within
    apart_shape = (*(shape[d] for d in stacked), *(math.prod(shape[d] for d in group) for group in inner))

    def apart(array: jax.Array) -> jax.Array:
        """[stacked..., rows, columns], or [stacked..., width]; arrays of another shape as they are."""
        return array.transpose(order).reshape(apart_shape) if array.shape == shape else array

    def together(array: jax.Array) -> jax.Array:
        back = np.argsort(order).tolist()
        return array.reshape([shape[d] for d in order]).transpose(back) if array.shape == apart_shape else array

    def mapped(function: Callable) -> Callable:
        for _ in stacked:
            function = jax.vmap(function)
        return function

    return apart, together, mapped


def per_matrix(transform: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """`transform` of each matrix, or vector, of every parameter by itself; the state is a dict by path. Stacked
    dimensions are mapped over (`jax.vmap`) and never merged, so that arrays stay spread over devices along them; they
    come first in the state's arrays. Those of a parameter's own size have its shape.
    """

    def matrices(tree: Mapping[str, Any]) -> dict[str, tuple[Callable, Callable, Callable]]:
        """Without what `optax.partition` leaves to another optimizer."""
        arrays = {path: leaf for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}
        return {path: _matrices(leaf.shape, axes[path]) for path, leaf in arrays.items()}

    def init(params):
        return {
            path: jax.tree.map(together, mapped(transform.init)(apart(params[path])))
            for path, (apart, together, mapped) in matrices(params).items()
        }

    def update(updates, state, params=None):
        assert params is not None
        result, changed = dict(updates), {}
        for path, (apart, together, mapped) in matrices(updates).items():
            one = mapped(lambda u, p, s: transform.update(u, s, p))
            update, after = one(apart(updates[path]), apart(params[path]), jax.tree.map(apart, state[path]))
            result[path], changed[path] = together(update), jax.tree.map(together, after)
        return result, changed

    return optax.GradientTransformation(init, update)
