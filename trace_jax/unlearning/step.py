"""One optimizer step, for training a target model and for unlearning from it.

Loss and gradient are computed inside `jax.shard_map` over the whole mesh: parameters as they are stored, rows split.
Then the optimizer updates every stored number where it is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import abstract_params, flatten, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.mesh import BATCH_AXES, row_shards
from trace_jax.unlearning.grip import keep_routers
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.losses import Constants, gradient, share, targets
from trace_jax.unlearning.parameters import as_stored, trainable_specs
from trace_jax.unlearning.state import StepSettings, TrainState, apply_gradients, state_shardings


def _training_loss(params, batch: Batch, *, model: ModelConfig, load_balance: float):
    out: Any = forward(
        params, model, batch.tokens, mask=batch.segments, count_mask=batch.valid, collect=("hidden", "counts", "load")
    )
    nll = token_nll(params, model, out.hidden, targets(batch.tokens))
    tokens = jnp.maximum(jax.lax.psum(batch.valid.sum(dtype=jnp.float32), BATCH_AXES), 1.0)
    loss = share(jnp.where(batch.valid, nll, 0.0).sum(), tokens)
    # Switch-style balance: E sum_e (share of activations) (mean probability), 1 when perfectly even.
    frequency = jax.lax.psum(out.router.counts, BATCH_AXES).astype(jnp.float32) / (tokens * model.experts_per_token)
    probability = jax.lax.psum(out.router.load, BATCH_AXES) / tokens
    balance = model.num_experts * (frequency * probability).sum(-1).mean()
    return loss + load_balance * balance, {"loss": loss, "balance": balance}


@functools.partial(jax.jit, static_argnames=("settings", "load_balance", "mesh"), donate_argnums=0)
def training_step(state: TrainState, batch: Batch, *, settings: StepSettings, load_balance: float, mesh: Mesh):
    """One step of next-token training on `batch`. Returns (state, metrics: f32 scalars)."""
    like = flatten(abstract_params(settings.model))

    def of_loss(trainable, batch):
        def loss(trainable):
            params = unflatten(as_stored(trainable, like))
            return _training_loss(params, batch, model=settings.model, load_balance=load_balance)

        return jax.grad(loss, has_aux=True)(trainable)

    specs = param_specs(settings.model, mesh)
    sharded = jax.shard_map(of_loss, mesh=mesh, in_specs=(specs, P(BATCH_AXES)), out_specs=(specs, P()))
    gradients, metrics = sharded(state.trainable, batch)
    state, norm = apply_gradients(state, gradients, settings, None, mesh)
    return state, {**metrics, "gradient_norm": norm}


@functools.partial(jax.jit, static_argnames=("settings", "mesh"), donate_argnums=0)
def unlearning_step(state: TrainState, constants: Constants, rows: StepRows, *, settings: StepSettings, mesh: Mesh):
    """One step of gamma L_forget + alpha L_retain.

    Rows are a multiple of the devices that split them times the microbatches (`row_multiple`).
    Returns (state, metrics: f32 scalars).
    """
    specs = param_specs(settings.model, mesh)
    trains = trainable_specs(state.trainable, settings.model, mesh, rows=settings.rows)
    frozen, reference = ({path: specs[path] for path in part} for part in (constants.frozen, constants.reference))
    kept: Any = Constants(frozen, reference, *(P() for _ in Constants._fields[2:]))  # pyright: ignore[reportArgumentType]
    sharded = jax.shard_map(
        functools.partial(gradient, settings=settings),
        mesh=mesh,
        in_specs=(trains, P(), kept, P(BATCH_AXES)),
        out_specs=(trains, P()),
    )
    read = constants._replace(masks=None, protection=None)
    gradients, metrics = sharded(state.trainable, state.alpha, read, rows)
    state, norm = apply_gradients(state, gradients, settings, constants.masks, mesh)
    if constants.protection is not None:
        original = {**constants.frozen, **constants.reference}
        trainable, metrics["grip_missed"] = keep_routers(
            state.trainable, original, constants.protection, state.step, mesh=mesh
        )
        state = dataclasses.replace(state, trainable=trainable)
        state = jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh))
    if state.alpha is not None:
        metrics["alpha"] = state.alpha
        alpha = _constrained(state, constants.numbers, metrics["retain_loss"])
        state = dataclasses.replace(state, alpha=alpha)
    return state, {**metrics, "gradient_norm": norm}


def _constrained(state: TrainState, numbers, retain_loss: jax.Array) -> jax.Array:
    """The next coefficient of a retain loss that must stay below a bound: max(0, alpha + rate (loss - bound)).

    The dual step of PDU, 2506.05314.
    """
    moved = jnp.maximum(0.0, state.alpha + numbers["dual_rate"] * (retain_loss - numbers["retain_bound"]))
    return jnp.where(state.step.astype(jnp.float32) > numbers["dual_warmup"], moved, state.alpha)


def row_multiple(settings: StepSettings, mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return row_shards(mesh) * settings.parallel.microbatches
