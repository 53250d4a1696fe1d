"""One optimizer step, for training a target model and for unlearning from it.

Both run inside `jax.shard_map` over the mesh axis "data": parameters replicated, rows split, losses as sums and counts
added over devices, so that the numbers do not depend on the number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import abstract_params, flatten, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_kl, token_nll
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


class Constants(NamedTuple):
    """Arrays that a run never changes. `reference` holds the original values of what trains; `frozen` both models'."""

    frozen: Flat
    reference: Flat
    masks: Flat | None
    coefficients: Coefficients
    direction: jax.Array | None


def unlearning_settings(config: UnlearningConfig, model: ModelConfig) -> StepSettings:
    """The static part of an unlearning step."""
    # A constant rate does not depend on the number of steps; leaving it out saves a compilation per number.
    steps = 0 if config.schedule == "constant" else config.steps
    return StepSettings(model, config.optimizer, steps, config.objective, config.retain_loss, config.layer)


def coefficients(config: UnlearningConfig) -> Coefficients:
    """The traced numbers of the objective; what the objective does not read is zero."""
    numbers = (config.gamma, config.alpha, config.beta, config.delta, config.nll_ceiling, config.steering)
    return Coefficients(*(jnp.float32(n or 0.0) for n in numbers))


def initial_state(trainable: Flat, settings: StepSettings, mesh: Mesh, masks: Flat | None = None) -> TrainState:
    """Fresh state on every device of `mesh`. Arrays are copied, so that donating it never frees the reference model."""
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)
    optimizer = make_optimizer(settings.optimizer, settings.steps, masks).init(trainable)
    return replicate(TrainState(jnp.zeros((), jnp.int32), trainable, optimizer), mesh)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """`tree` on every device of `mesh`; arrays that are there already are not copied."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def as_stored(trainable: Flat, like: Any) -> Flat:
    """Trainable parameters in the types of the model's own, `like` (arrays or their shapes by path)."""
    return {path: leaf.astype(like[path].dtype) for path, leaf in trainable.items()}


def _apply(
    state: TrainState, gradients: Flat, settings: StepSettings, masks: Flat | None
) -> tuple[TrainState, jax.Array]:
    optimizer = make_optimizer(settings.optimizer, settings.steps, masks)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    return TrainState(state.step + 1, trainable, optimizer_state), optax.tree.norm(gradients)


def _targets(tokens: jax.Array) -> jax.Array:
    """Token t+1 at position t; the last position's target is never valid."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)


def _ratio(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    total, count = jax.lax.psum(pair, "data")
    return total / jnp.maximum(count, 1.0)


# --- training a target model


def _training_loss(params, batch: Batch, *, model: ModelConfig, load_balance: float):
    out: Any = forward(
        params, model, batch.tokens, mask=batch.segments, count_mask=batch.valid, collect=("hidden", "counts", "load")
    )
    nll = token_nll(params, model, out.hidden, _targets(batch.tokens))
    count = batch.valid.sum(dtype=jnp.float32)
    loss = _ratio((jnp.where(batch.valid, nll, 0.0).sum(), count))
    # Switch-style balance: E sum_e (share of activations) (mean probability), 1 when perfectly even.
    tokens = jnp.maximum(jax.lax.psum(count, "data"), 1.0)
    share = jax.lax.psum(out.router.counts, "data").astype(jnp.float32) / (tokens * model.experts_per_token)
    probability = jax.lax.psum(out.router.load, "data") / tokens
    balance = model.num_experts * (share * probability).sum(-1).mean()
    return loss + load_balance * balance, {"loss": loss, "balance": balance}


@functools.partial(jax.jit, static_argnames=("settings", "load_balance", "mesh"), donate_argnums=0)
def training_step(state: TrainState, batch: Batch, *, settings: StepSettings, load_balance: float, mesh: Mesh):
    """One step of next-token training on `batch`. Returns (state, metrics: f32 scalars)."""

    like = flatten(abstract_params(settings.model))

    def loss(trainable, batch):
        params = unflatten(as_stored(trainable, like))
        return _training_loss(params, batch, model=settings.model, load_balance=load_balance)

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    (_, metrics), gradients = jax.value_and_grad(sharded, has_aux=True)(state.trainable, batch)
    state, norm = _apply(state, gradients, settings, None)
    return state, {**metrics, "gradient_norm": norm}


# --- unlearning


def _hidden(params, model: ModelConfig, batch: Batch, *, whole: bool, layer: int | None) -> tuple[Any, Any]:
    """(hidden states before the output head, output of `layer`); None for what isn't needed.

    Unless `whole`, nothing above `layer` is computed.
    """
    if not whole:
        return None, forward(
            params, model, batch.tokens, mask=batch.segments, collect=("hidden",), num_layers=layer
        ).hidden
    collect = ("hidden", "layers") if layer else ("hidden",)
    out: Any = forward(params, model, batch.tokens, mask=batch.segments, collect=collect)
    return out.hidden, out.layers[layer - 1] if layer else None


def _reference_parts(params, forget: Batch, retain: Batch | None, settings: StepSettings) -> tuple[Any, Any]:
    """(reference nll of forget rows, reference hidden states of retain rows), None for what isn't needed."""
    model, nll, hidden = settings.model, None, None
    if OBJECTIVES[settings.objective].needs_reference:
        final, _ = _hidden(params, model, forget, whole=True, layer=None)
        nll = token_nll(params, model, final, _targets(forget.tokens))
    if retain is not None and settings.retain_loss == "kl":
        hidden, _ = _hidden(params, model, retain, whole=True, layer=None)
    if retain is not None and settings.retain_loss == "hidden":
        _, hidden = _hidden(params, model, retain, whole=False, layer=settings.layer)
    return nll, hidden


def _unlearning_loss(
    trainable: Flat, constants: Constants, forget: Batch, retain: Batch | None, weights, *, settings: StepSettings
):
    model, objective, c = settings.model, OBJECTIVES[settings.objective], constants.coefficients
    reference = unflatten({**constants.frozen, **constants.reference})
    reference_nll, reference_hidden = _reference_parts(reference, forget, retain, settings)
    params = unflatten({**constants.frozen, **as_stored(trainable, constants.reference)})
    rows = forget.tokens.shape[0]
    both = forget if retain is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), forget, retain)
    # RMU with its own retain term looks at no more than the layer it steers.
    whole = not (objective.needs_hidden and settings.retain_loss in (None, "hidden"))
    final, middle = _hidden(params, model, both, whole=whole, layer=settings.layer)

    nll = None if objective.needs_hidden else token_nll(params, model, final[:rows], _targets(forget.tokens))
    steered = jax.tree.map(lambda x: x[:rows], middle)  # None stays None
    inputs = ForgetInputs(forget.valid, nll, reference_nll, steered, constants.direction)
    forget_loss = _ratio(objective.loss(inputs, c))
    if retain is None:
        return c.gamma * forget_loss, {"forget_loss": forget_loss}
    if settings.retain_loss == "nll":
        per_token = token_nll(params, model, final[rows:], _targets(retain.tokens))
    elif settings.retain_loss == "kl":
        per_token = token_kl(reference, reference_hidden, params, final[rows:], model)
    else:
        per_token = hidden_distance(middle[rows:], reference_hidden)
    retain_loss = _ratio(weighted_retain(per_token, weights, retain.valid))
    loss = c.gamma * forget_loss + c.alpha * retain_loss
    return loss, {"loss": loss, "forget_loss": forget_loss, "retain_loss": retain_loss}


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

    Returns (state, metrics: f32 scalars).
    """
    loss = functools.partial(_unlearning_loss, settings=settings)
    specs = (P(), P(), P("data"), P("data"), P("data"))
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    (_, metrics), gradients = jax.value_and_grad(sharded, has_aux=True)(
        state.trainable, constants, forget, retain, weights
    )
    state, norm = _apply(state, gradients, settings, constants.masks)
    return state, {**metrics, "gradient_norm": norm}


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Adds empty rows (no segment, nothing valid) until the devices share the rows evenly."""
    missing = -batch.tokens.shape[0] % multiple
    if not missing:
        return batch
    return jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x), jnp.zeros((missing, *x.shape[1:]), x.dtype)]), batch)
