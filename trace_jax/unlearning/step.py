"""One optimizer step, for training a target model and for unlearning from it, and the state that it changes.

Loss and gradient are computed inside `jax.shard_map` over the whole mesh: parameters as they are stored, rows split.
Then the optimizer updates every stored number where it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import ModelConfig, abstract_params, flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, place, row_shards
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.losses import Constants, StepSettings, coefficients, gradient, share, targets
from trace_jax.unlearning.optimizer import make_optimizer
from trace_jax.unlearning.rivals import check_router, keep_routers
from trace_jax.unlearning.trainable import trainable_paths, update_masks
from trace_jax.unlearning.trained import Flat, current_params, declarations, selected_index, split, trained_specs


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


class SetUp(NamedTuple):
    """A run before its data: see `set_up`."""

    settings: StepSettings
    paths: tuple[str, ...]  # of the parameters of which anything trains
    constants: Constants
    start: Callable[[Constants], TrainState]  # the state before the first step


def unlearning_settings(config: UnlearningConfig, model: ModelConfig, parallel: ParallelConfig = PLAIN) -> StepSettings:
    """The static part of an unlearning step."""
    # A constant rate does not depend on the number of steps; leaving it out saves a compilation per number.
    # Where the rows of an epoch are not known (a plan), their number is not either.
    steps, some = 0 if config.schedule == "constant" else config.steps, config.some_experts
    return StepSettings(
        model, config.optimization, steps, config.objective.without_numbers(), config.retain_loss.name,
        config.normalize, config.layer, parallel, anchor_form=some.anchor_form if some else "sum",
    )  # fmt: skip


def set_up(
    original: Flat, config: UnlearningConfig, model: ModelConfig, *,
    selected: np.ndarray | None, parallel: ParallelConfig, mesh: Mesh, seed: int = 0,
) -> SetUp:  # fmt: skip
    """What the step of a run works with, for the run itself and for a plan of it.

    Args:
      original: parameters by path on the mesh, or their shapes. All else in the constants is small, and on the host.
      selected: bool [L, E], the experts that train where not all do.
    """
    settings, paths = unlearning_settings(config, model, parallel), trainable_paths(model, config.trainable)
    if config.grip.name == "project":
        check_router(model, paths)
    masks = update_masks(paths, model, layers=config.layers, selected=selected)
    index = None if selected is None else selected_index(selected)
    numbers = np.int32(seed), np.float32(config.alpha) if config.objective.adapts_alpha else None

    def start(c: Constants) -> TrainState:
        rank = config.lora and config.lora.rank
        return _unlearning_state(
            c.original, c.index, c.masks, *numbers, paths=paths, rank=rank, settings=settings, mesh=mesh
        )

    return SetUp(settings, paths, Constants(original, index, masks, coefficients(config)), start)


def row_multiple(settings: StepSettings, mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return row_shards(mesh) * settings.parallel.microbatches


# --- the state


def initial_state(trained: Flat, settings: StepSettings, mesh: Mesh) -> TrainState:
    """Fresh state on `mesh` of arrays that lie anywhere. They are copied: donating it frees nobody else's."""
    trained = place(trained, mesh, trained_specs(settings.model, trained, mesh))
    return fresh_state(trained, None, None, settings=settings, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("paths", "rank", "settings", "mesh"))
def _unlearning_state(original, index, masks, seed, alpha, *, paths, rank, settings: StepSettings, mesh) -> TrainState:
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
    return make_optimizer(settings.optimizer, settings.steps, axes, masks)


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
        if leaf.shape == shape:
            return NamedSharding(mesh, spec)
        pairs = enumerate(zip(leaf.shape, shape, strict=False))
        same = next((d for d, (size, other) in pairs if size != other), min(len(leaf.shape), len(shape)))
        entries = list(spec[:same])
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, P(*entries))

    return jax.tree_util.tree_map_with_path(one, state)


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


# --- steps


@functools.partial(jax.jit, static_argnames=("settings", "load_balance", "mesh"), donate_argnums=0)
def training_step(state: TrainState, batch: Batch, *, settings: StepSettings, load_balance: float, mesh: Mesh):
    """One step of next-token training on `batch`. Returns (state, metrics: f32 scalars)."""
    model = settings.model
    like = flatten(abstract_params(model))

    def loss(trainable, batch):
        params = unflatten(current_params(trainable, like))
        out: Any = forward(
            params, model, batch.tokens, mask=batch.segments, count_mask=batch.valid,
            collect=("hidden", "counts", "load"),
        )  # fmt: skip
        nll = token_nll(params, model, out.hidden, targets(batch.tokens))
        tokens = jnp.maximum(jax.lax.psum(batch.valid.sum(dtype=jnp.float32), BATCH_AXES), 1.0)
        mean = share(jnp.where(batch.valid, nll, 0.0).sum(), tokens)
        # Switch-style balance: E sum_e (share of activations) (mean probability), 1 when perfectly even.
        frequency = jax.lax.psum(out.router.counts, BATCH_AXES).astype(jnp.float32) / (tokens * model.experts_per_token)
        probability = jax.lax.psum(out.router.load, BATCH_AXES) / tokens
        balance = model.num_experts * (frequency * probability).sum(-1).mean()
        return mean + load_balance * balance, {"loss": mean, "balance": balance}

    specs = param_specs(model, mesh)
    sharded = jax.shard_map(
        jax.grad(loss, has_aux=True), mesh=mesh, in_specs=(specs, P(BATCH_AXES)), out_specs=(specs, P())
    )
    gradients, metrics = sharded(state.trainable, batch)
    state, norm = apply_gradients(state, gradients, settings, None, mesh)
    return state, {**metrics, "gradient_norm": norm}


@functools.partial(jax.jit, static_argnames=("settings", "mesh"), donate_argnums=0)
def unlearning_step(state: TrainState, constants: Constants, rows: StepRows, *, settings: StepSettings, mesh: Mesh):
    """One step of gamma L_forget + alpha L_retain.

    Rows are a multiple of the devices that split them times the microbatches (`row_multiple`).
    Returns (state, metrics: f32 scalars).
    """
    trains = trained_specs(settings.model, state.trainable, mesh)
    others = (P() for _ in Constants._fields[1:])
    constant_specs: Any = Constants(param_specs(settings.model, mesh), *others)  # pyright: ignore[reportArgumentType] specs
    in_specs, of_device = (trains, P(), constant_specs, P(BATCH_AXES)), functools.partial(gradient, settings=settings)
    sharded = jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=(trains, P()))
    read = constants._replace(masks=None, protection=None)
    gradients, metrics = sharded(state.trainable, state.alpha, read, rows)
    state, norm = apply_gradients(state, gradients, settings, constants.masks, mesh)
    if constants.protection is not None:
        trainable, metrics["grip_missed"] = keep_routers(
            state.trainable, constants.original, constants.protection, state.step, mesh=mesh
        )
        state = dataclasses.replace(state, trainable=trainable)
        state = jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh))
    if state.alpha is not None:
        metrics["alpha"] = state.alpha
        objective = settings.objective.with_numbers(constants.numbers)
        alpha = objective.next_alpha(state.alpha, state.step, metrics["retain_loss"])
        state = dataclasses.replace(state, alpha=alpha)
    return state, {**metrics, "gradient_norm": norm}
