"""One optimizer step, for training a target model and for unlearning from it.

Loss and gradient are computed inside `jax.shard_map` over the whole mesh: parameters as they are stored, rows split,
losses as sums and counts added over devices, so that the numbers do not depend on the mesh. Then the optimizer updates
every stored number where it is.
"""

from __future__ import annotations

import dataclasses
import functools
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
from trace_jax.models.arrays import abstract_params, flatten, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_kl, token_nll
from trace_jax.models.sharding import Replaced, param_specs, rows_spec
from trace_jax.parallel.config import PLAIN, ParallelConfig
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import ROWS, as_varying, row_shards, varying_axes
from trace_jax.unlearning.config import OptimizerConfig, UnlearningConfig
from trace_jax.unlearning.objectives import OBJECTIVES, Coefficients, ForgetInputs
from trace_jax.unlearning.optimizer import make_optimizer
from trace_jax.unlearning.retain import hidden_distance, weighted_retain

Flat = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What changes while training: step i32 [], flat trainable parameters in float32, optax state.

    A bfloat16 weight has 8 significant bits: a usual step, 1e-5 on a weight of 0.02, would be rounded away. So the
    optimizer keeps float32, and the loss sees it rounded to the model's type.
    """

    step: jax.Array
    trainable: Flat
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Everything that shapes the compiled step; two runs that share it share one compilation."""

    model: ModelConfig
    optimizer: OptimizerConfig
    steps: int
    objective: str = ""
    retain_loss: str | None = None
    layer: int | None = None
    parallel: ParallelConfig = PLAIN
    rows: bool = False  # what trains are rows of arrays of experts


class Constants(NamedTuple):
    """Arrays that a run never changes. `reference` holds the original values of what trains; `frozen` both models'.

    Where a few experts train, `frozen` holds all experts, and `index` i32 [L, N] says which are the trainable rows.
    """

    frozen: Flat
    reference: Flat
    index: jax.Array | None
    masks: Flat | None
    coefficients: Coefficients
    direction: jax.Array | None


def unlearning_settings(config: UnlearningConfig, model: ModelConfig, parallel: ParallelConfig = PLAIN) -> StepSettings:
    """The static part of an unlearning step."""
    # A constant rate does not depend on the number of steps; leaving it out saves a compilation per number.
    steps = 0 if config.schedule == "constant" else config.steps
    return StepSettings(
        model, config.optimizer, steps, config.objective, config.retain_loss, config.layer, parallel,
        rows=config.trainable == "selected_experts",
    )  # fmt: skip


def coefficients(config: UnlearningConfig) -> Coefficients:
    """The traced numbers of the objective; what the objective does not read is zero."""
    numbers = (config.gamma, config.alpha, config.beta, config.delta, config.nll_ceiling, config.steering)
    return Coefficients(*(jnp.float32(n or 0.0) for n in numbers))


def initial_state(trainable: Flat, settings: StepSettings, mesh: Mesh, masks: Flat | None = None) -> TrainState:
    """Fresh state on `mesh`. Arrays are copied, so that donating it never frees the reference model."""
    trainable = place(trainable, mesh, trainable_specs(trainable, settings, mesh))
    start = functools.partial(fresh_state, settings=settings, masks=masks)
    shardings = state_shardings(jax.eval_shape(start, trainable), settings, mesh)
    return jax.jit(start, out_shardings=shardings)(trainable)


def trainable_specs(trainable: Flat, settings: StepSettings, mesh: Mesh) -> dict[str, P]:
    """How what trains is stored on `mesh`."""
    if settings.rows:
        return {path: rows_spec(settings.model, path, leaf.shape[1], mesh) for path, leaf in trainable.items()}
    specs = param_specs(settings.model, mesh)
    return {path: specs[path] for path in trainable}


def fresh_state(trainable: Flat, settings: StepSettings, masks: Flat | None = None) -> TrainState:
    """The state before the first step, wherever its arrays lie; also of shapes alone (`jax.eval_shape`)."""
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)
    optimizer = make_optimizer(settings.optimizer, settings.steps, masks).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer)


def state_shardings(state: Any, settings: StepSettings, mesh: Mesh) -> Any:
    """How a `TrainState` is stored: whatever is kept for a parameter lies where the parameter does."""
    specs = trainable_specs(state.trainable, settings, mesh)

    def one(path, _):
        names = [key.key for key in path if isinstance(key, DictKey) and key.key in specs]
        return NamedSharding(mesh, specs[names[-1]] if names else P())

    return jax.tree_util.tree_map_with_path(one, state)


def as_stored(trainable: Flat, like: Any) -> Flat:
    """Trainable parameters in the types of the model's own, `like` (arrays or their shapes by path)."""
    return {path: leaf.astype(like[path].dtype) for path, leaf in trainable.items()}


def _apply(
    state: TrainState, gradients: Flat, settings: StepSettings, masks: Flat | None, mesh: Mesh
) -> tuple[TrainState, jax.Array]:
    optimizer = make_optimizer(settings.optimizer, settings.steps, masks)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    state = TrainState(state.step + 1, trainable, optimizer_state)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh)), optax.tree.norm(gradients)


def _targets(tokens: jax.Array) -> jax.Array:
    """Token t+1 at position t; the last position's target is never valid."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)


def _share(total: jax.Array, count: jax.Array) -> jax.Array:
    """The sum over all devices, over the whole batch's count."""
    return jax.lax.psum(total, ROWS) / jnp.maximum(count, 1.0)


# --- training a target model


def _training_loss(params, batch: Batch, *, model: ModelConfig, load_balance: float):
    out: Any = forward(
        params, model, batch.tokens, mask=batch.segments, count_mask=batch.valid, collect=("hidden", "counts", "load")
    )
    nll = token_nll(params, model, out.hidden, _targets(batch.tokens))
    tokens = jnp.maximum(jax.lax.psum(batch.valid.sum(dtype=jnp.float32), ROWS), 1.0)
    loss = _share(jnp.where(batch.valid, nll, 0.0).sum(), tokens)
    # Switch-style balance: E sum_e (share of activations) (mean probability), 1 when perfectly even.
    share = jax.lax.psum(out.router.counts, ROWS).astype(jnp.float32) / (tokens * model.experts_per_token)
    probability = jax.lax.psum(out.router.load, ROWS) / tokens
    balance = model.num_experts * (share * probability).sum(-1).mean()
    return loss + load_balance * balance, {"loss": loss, "balance": balance}


@functools.partial(jax.jit, static_argnames=("settings", "load_balance", "mesh"), donate_argnums=0)
def training_step(state: TrainState, batch: Batch, *, settings: StepSettings, load_balance: float, mesh: Mesh):
    """One step of next-token training on `batch`. Returns (state, metrics: f32 scalars)."""

    like = flatten(abstract_params(settings.model))

    def gradient(trainable, batch):
        def loss(trainable):
            params = unflatten(as_stored(trainable, like))
            return _training_loss(params, batch, model=settings.model, load_balance=load_balance)

        return jax.grad(loss, has_aux=True)(trainable)

    specs = param_specs(settings.model, mesh)
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(specs, P(ROWS)), out_specs=(specs, P()))
    gradients, metrics = sharded(state.trainable, batch)
    state, norm = _apply(state, gradients, settings, None, mesh)
    return state, {**metrics, "gradient_norm": norm}


# --- unlearning


def _hidden(params, settings: StepSettings, batch: Batch, *, whole: bool, layer: int | None) -> tuple[Any, Any, Any]:
    """(hidden states before the output head, output of `layer`, choices of experts without room i32 [] or 0).

    None for what isn't needed. Unless `whole`, nothing above `layer` is computed.
    """
    parallel = settings.parallel
    layers, dropped = ("layers",) if whole and layer else (), ("dropped",) if parallel.expert_buffer else ()
    out: Any = forward(
        params, settings.model, batch.tokens, mask=batch.segments, collect=("hidden", *layers, *dropped),
        num_layers=None if whole else layer, remat=parallel.remat, expert_buffer=parallel.expert_buffer,
    )  # fmt: skip
    lost = out.router.dropped.sum() if dropped else 0
    if not whole:
        return None, out.hidden, lost
    return out.hidden, out.layers[layer - 1] if layer else None, lost


def _reference_parts(params, forget: Batch, retain: Batch | None, settings: StepSettings) -> tuple[Any, Any, Any]:
    """(reference nll of forget rows, reference hidden states of retain rows, dropped), None for what isn't needed."""
    nll, hidden, lost = None, None, 0
    if OBJECTIVES[settings.objective].needs_reference:
        final, _, dropped = _hidden(params, settings, forget, whole=True, layer=None)
        nll, lost = token_nll(params, settings.model, final, _targets(forget.tokens)), lost + dropped
    if retain is not None and settings.retain_loss == "kl":
        hidden, _, dropped = _hidden(params, settings, retain, whole=True, layer=None)
        lost = lost + dropped
    if retain is not None and settings.retain_loss == "hidden":
        _, hidden, dropped = _hidden(params, settings, retain, whole=False, layer=settings.layer)
        lost = lost + dropped
    return nll, hidden, lost


def _losses(
    trainable: Flat, constants: Constants, rows: Any, settings: StepSettings
) -> tuple[jax.Array, jax.Array | None, Any]:
    """(sum of forget losses, sum of weighted retain losses or None, dropped), over this device's rows.

    rows: (forget, retain, weights).
    """
    forget, retain, weights = rows
    model, objective, c = settings.model, OBJECTIVES[settings.objective], constants.coefficients
    frozen, index = constants.frozen, constants.index
    reference = unflatten({**frozen, **constants.reference})
    reference_nll, reference_hidden, dropped_before = _reference_parts(reference, forget, retain, settings)
    changed: dict[str, Any] = dict(as_stored(trainable, {**frozen, **constants.reference}))
    if index is not None:
        changed = {path: Replaced(frozen[path], rows, index) for path, rows in changed.items()}
    params = unflatten({**frozen, **changed})
    number = forget.tokens.shape[0]
    both = forget if retain is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), forget, retain)
    # RMU with its own retain term looks at no more than the layer it steers.
    whole = not (objective.needs_hidden and settings.retain_loss in (None, "hidden"))
    final, middle, dropped = _hidden(params, settings, both, whole=whole, layer=settings.layer)

    nll = None if objective.needs_hidden else token_nll(params, model, final[:number], _targets(forget.tokens))
    steered = jax.tree.map(lambda x: x[:number], middle)  # None stays None
    forget_sum, _ = objective.loss(ForgetInputs(forget.valid, nll, reference_nll, steered, constants.direction), c)
    dropped = dropped + dropped_before
    if retain is None:
        return forget_sum, None, dropped
    if settings.retain_loss == "nll":
        per_token = token_nll(params, model, final[number:], _targets(retain.tokens))
    elif settings.retain_loss == "kl":
        per_token = token_kl(reference, reference_hidden, params, final[number:], model)
    else:
        per_token = hidden_distance(middle[number:], reference_hidden)
    return forget_sum, weighted_retain(per_token, weights, retain.valid)[0], dropped


def _forget_count(forget: Batch, settings: StepSettings, c: Coefficients) -> jax.Array:
    """What the sum of forget losses is divided by: of tokens or rows, it does not depend on what the model says."""
    zeros = jnp.zeros(forget.valid.shape, jnp.float32)
    inputs = ForgetInputs(forget.valid, zeros, zeros, zeros[..., None], jnp.zeros((1,), jnp.float32))
    return OBJECTIVES[settings.objective].loss(inputs, c)[1]


def _gradient(trainable: Flat, constants: Constants, rows: Any, settings: StepSettings) -> tuple[Flat, dict]:
    """(gradient of the loss over the whole batch, metrics), from this device's rows, one microbatch after another.

    rows: (forget, retain, weights).
    """
    forget, retain, _ = rows
    c = constants.coefficients
    forget_count = jax.lax.psum(_forget_count(forget, settings, c), ROWS)
    retain_count = jax.lax.psum((forget if retain is None else retain).valid.sum(dtype=jnp.float32), ROWS)

    def loss(trainable, part):
        forget_sum, retain_sum, dropped = _losses(trainable, constants, part, settings)
        metrics = {"forget_loss": _share(forget_sum, forget_count)}
        total = c.gamma * metrics["forget_loss"]
        if retain_sum is not None:
            metrics["retain_loss"] = _share(retain_sum, retain_count)
            total = total + c.alpha * metrics["retain_loss"]
        if settings.parallel.expert_buffer:
            metrics["dropped"] = jax.lax.psum(as_varying(jnp.float32(dropped), frozenset(ROWS)), ROWS)
        return total, {"loss": total, **metrics}

    gradient, number = jax.grad(loss, has_aux=True), settings.parallel.microbatches
    if number == 1:
        return gradient(trainable, rows)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(trainable, part)), None

    parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), rows)
    shapes = jax.eval_shape(gradient, trainable, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zeros = ({path: as_varying(zero, varying_axes(trainable[path])) for path, zero in zeros[0].items()}, zeros[1])
    return jax.lax.scan(add, zeros, parts)[0]


@functools.partial(jax.jit, static_argnames=("settings", "mesh"), donate_argnums=0)
def unlearning_step(
    state: TrainState,
    constants: Constants,
    forget: Batch,
    retain: Batch | None,
    weights,
    *,
    settings: StepSettings,
    mesh: Mesh,
):
    """One step of gamma L_forget + alpha L_retain. `weights` f32 [B, S] multiplies the retain losses.

    Rows are a multiple of the devices that split them times the microbatches (`pad_rows`).
    Returns (state, metrics: f32 scalars).
    """
    specs, trains = param_specs(settings.model, mesh), trainable_specs(state.trainable, settings, mesh)
    whole = ({path: specs[path] for path in part} for part in (constants.frozen, constants.reference))
    kept: Any = (*whole, P(), P(), P(), P())  # of the constants, in their order
    gradient = functools.partial(_gradient, settings=settings)
    sharded = jax.shard_map(
        gradient, mesh=mesh, in_specs=(trains, Constants(*kept), (P(ROWS), P(ROWS), P(ROWS))), out_specs=(trains, P())
    )
    gradients, metrics = sharded(state.trainable, constants._replace(masks=None), (forget, retain, weights))
    state, norm = _apply(state, gradients, settings, constants.masks, mesh)
    return state, {**metrics, "gradient_norm": norm}


def row_multiple(settings: StepSettings, mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return row_shards(mesh) * settings.parallel.microbatches


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Adds empty rows (no segment, nothing valid) until the devices share the rows evenly."""
    missing = -batch.tokens.shape[0] % multiple
    if not missing:
        return batch
    return jax.tree.map(lambda x: np.concatenate([np.asarray(x), np.zeros((missing, *x.shape[1:]), x.dtype)]), batch)
