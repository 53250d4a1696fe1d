"""One optimizer step, for training a target model and for unlearning from it.

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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import abstract_params, flatten, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.mesh import BATCH_AXES, ParallelConfig, row_shards
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.losses import Constants, coefficients, gradient, share, targets
from trace_jax.unlearning.rivals import check_router, keep_routers
from trace_jax.unlearning.state import (
    StepSettings,
    TrainState,
    apply_gradients,
    state_shardings,
    unlearning_settings,
    unlearning_state,
)
from trace_jax.unlearning.trainable import trainable_layers, trainable_paths, update_masks
from trace_jax.unlearning.trained import Flat, current_params, selected_index, trained_specs


class SetUp(NamedTuple):
    """A run before its data: see `set_up`."""

    settings: StepSettings
    paths: tuple[str, ...]  # of the parameters of which anything trains
    constants: Constants
    start: Callable[[Constants], TrainState]  # the state before the first step


def set_up(
    original: Flat, config: UnlearningConfig, model: ModelConfig, *,
    selected: np.ndarray | None, parallel: ParallelConfig, mesh: Mesh, seed: int = 0,
) -> SetUp:  # fmt: skip
    """What the step of a run works with, for the run itself and for a plan of it.

    Args:
      original: parameters by path on the mesh, or their shapes. All else in the constants is small, and on the host.
      selected: bool [L, E], the experts that train where not all do.
    Raises:
      ConfigError: nothing would train, adapters of a rank that a matrix doesn't have, or routers GRIP can't project.
    """
    settings, paths = unlearning_settings(config, model, parallel), trainable_paths(model, config.patterns)
    if config.grip.name == "project":
        check_router(model, paths)
    masks = update_masks(paths, model, layers=trainable_layers(config), selected=selected)
    index = None if selected is None else selected_index(selected)
    numbers = np.int32(seed), np.float32(config.alpha) if config.objective.adapts_alpha else None

    def start(c: Constants) -> TrainState:
        rank = config.lora and config.lora.rank
        return unlearning_state(
            c.original, c.index, c.masks, *numbers, paths=paths, rank=rank, settings=settings, mesh=mesh
        )

    return SetUp(settings, paths, Constants(original, index, masks, coefficients(config)), start)


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
            params = unflatten(current_params(trainable, like))
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
    trains = trained_specs(settings.model, state.trainable, mesh)
    kept: Any = Constants(specs, *(P() for _ in Constants._fields[1:]))  # pyright: ignore[reportArgumentType]
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
        trainable, metrics["grip_missed"] = keep_routers(
            state.trainable, constants.original, constants.protection, state.step, mesh=mesh
        )
        state = dataclasses.replace(state, trainable=trainable)
        state = jax.lax.with_sharding_constraint(state, state_shardings(state, settings, mesh))
    if state.alpha is not None and settings.objective is not None:
        metrics["alpha"] = state.alpha
        objective = settings.objective.with_numbers(constants.numbers)
        alpha = objective.next_alpha(state.alpha, state.step, metrics["retain_loss"])
        state = dataclasses.replace(state, alpha=alpha)
    return state, {**metrics, "gradient_norm": norm}


def row_multiple(settings: StepSettings, mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return row_shards(mesh) * settings.parallel.microbatches
