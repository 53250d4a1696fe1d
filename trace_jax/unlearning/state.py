"""What changes while training, where it lies on a mesh, and how gradients change it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey

from trace_jax.models.config import ModelConfig
from trace_jax.parallel.mesh import PLAIN, ParallelConfig, place
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.optimizer import OptimizerConfig, make_optimizer
from trace_jax.unlearning.terms import Objective
from trace_jax.unlearning.trained import Flat, declarations, split, trained_specs


@struct.dataclass
class TrainState:
    """What changes while training: step i32 [], flat trainable parameters in float32, optax state.

    A bfloat16 weight has 8 significant bits: a usual step, 1e-5 on a weight of 0.02, would be rounded away. So the
    optimizer keeps float32, and the loss sees it rounded to the model's type.

    `alpha` f32 []: the coefficient of the retain loss, where the objective adapts it (`Objective.adapts_alpha`).
    """

    step: jax.Array
    trainable: Flat
    optimizer: Any
    alpha: Any = None


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Everything that shapes the compiled step; two runs that share it share one compilation."""

    model: ModelConfig
    optimizer: OptimizerConfig
    steps: int
    objective: Objective | None = None  # without its numbers
    retain_loss: str = ""  # nothing: no retain term
    normalize: str = "count"
    layer: int = 0  # whose output a loss looks at, from 1
    parallel: ParallelConfig = PLAIN
    anchor_form: str = "sum"


def unlearning_settings(config: UnlearningConfig, model: ModelConfig, parallel: ParallelConfig = PLAIN) -> StepSettings:
    """The static part of an unlearning step."""
    # A constant rate does not depend on the number of steps; leaving it out saves a compilation per number.
    # Where the rows of an epoch are not known (a plan), their number is not either.
    steps, some = 0 if config.schedule == "constant" else config.steps, config.some_experts
    return StepSettings(
        model, config.optimization, steps, config.objective.without_numbers(),
        config.retain_loss.name if config.retains else "", config.normalize, config.layer, parallel,
        anchor_form=some.anchor_form if some else "sum",
    )  # fmt: skip


def initial_state(
    trained: Flat, settings: StepSettings, mesh: Mesh, masks: Flat | None = None, alpha: float | None = None
) -> TrainState:
    """Fresh state on `mesh` of arrays that lie anywhere. They are copied: donating it frees nobody else's."""
    trained = place(trained, mesh, trained_specs(settings.model, trained, mesh))
    return fresh_state(trained, masks, alpha, settings=settings, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("paths", "rank", "settings", "mesh"))
def unlearning_state(
    original: Flat, index: Any, masks: Flat | None, seed: Any, alpha: Any, *,
    paths: tuple[str, ...], rank: int | None, settings: StepSettings, mesh: Mesh,
) -> TrainState:  # fmt: skip
    """The state before the first step of unlearning (`trace_jax.unlearning.trained.split`)."""
    trained = split(original, paths, settings.model, mesh, index=index, rank=rank, seed=seed)
    return fresh_state(trained, masks, alpha, settings=settings, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def fresh_state(trained: Flat, masks: Flat | None, alpha: Any, *, settings: StepSettings, mesh: Mesh) -> TrainState:
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trained)
    alpha = None if alpha is None else jnp.asarray(alpha, jnp.float32)
    optimizer = _optimizer(settings, masks, trained).init(trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer, alpha)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh))


def _optimizer(settings: StepSettings, masks: Flat | None, trained: Flat) -> optax.GradientTransformation:
    axes = {path: spec.axes for path, spec in declarations(settings.model, trained).items()}
    return make_optimizer(settings.optimizer, settings.steps, masks, axes=axes)


def state_shardings(state: Any, settings: StepSettings, mesh: Mesh) -> Any:
    """How a `TrainState` is stored: whatever is kept for a parameter lies where the parameter does.

    An array of another shape, such as a mean over the rows of a matrix, does so in the first dimensions that it has in
    common with the parameter: layers and experts.
    """
    specs = trained_specs(settings.model, state.trainable, mesh)

    def one(path, leaf):
        names = [key.key for key in path if isinstance(key, DictKey) and key.key in specs]
        if not names:
            return NamedSharding(mesh, P())
        spec, shape = specs[names[-1]], state.trainable[names[-1]].shape
        if leaf.shape != shape:
            spec = _common(spec, leaf.shape, shape)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, state)


def _common(spec: P, shape: tuple[int, ...], like: tuple[int, ...]) -> P:
    """The spec of an array of `shape` that is stored as one of shape `like` is, as far as the shapes agree."""
    same = next((d for d, pair in enumerate(zip(shape, like, strict=False)) if pair[0] != pair[1]), len(shape))
    entries = list(spec[: min(same, len(like))])
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def apply_gradients(
    state: TrainState, gradients: Flat, settings: StepSettings, masks: Flat | None, mesh: Mesh
) -> tuple[TrainState, jax.Array]:
    """(the state after the optimizer's update, norm of the gradients f32 [])."""
    optimizer = _optimizer(settings, masks, state.trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    state = TrainState(state.step + 1, trainable, optimizer_state, state.alpha)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh)), optax.tree.norm(gradients)
