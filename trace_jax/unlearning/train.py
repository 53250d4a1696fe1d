"""Training a model from scratch: the target model, and the retrained model that never saw the forget set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import abstract_params, flatten, init_params, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import ROWS
from trace_jax.unlearning.config import TrainingConfig
from trace_jax.unlearning.inputs import pad_rows
from trace_jax.unlearning.loop import Loop, LoopResult
from trace_jax.unlearning.parameters import as_stored
from trace_jax.unlearning.state import StepSettings, initial_state
from trace_jax.unlearning.step import row_multiple, training_step


def train_model(
    model_config: ModelConfig,
    config: TrainingConfig,
    batch_at: Callable[[int], Batch],
    *,
    seed: int,
    mesh: Mesh,
    directory: Path,
    identity: str,
    title: str,
    tokenizer=None,
) -> tuple[Model, LoopResult]:
    """Trains `config.steps` steps on `batch_at(step)`; continues from `directory` if it was interrupted.

    Raises:
      FloatingPointError: the loss stopped being finite; a target model that diverged is of no use to anyone.
    """
    settings = StepSettings(model_config, config.optimization, config.steps)

    def start():
        return initial_state(flatten(init_params(model_config, jax.random.key(seed))), settings, mesh)

    def inputs(index):
        return place(pad_rows(batch_at(index), row_multiple(settings, mesh)), mesh, P(ROWS))

    def step(state, batch):
        return training_step(state, batch, settings=settings, load_balance=config.load_balance, mesh=mesh)

    loop = Loop(directory, identity, config.steps, config.checkpoint_every, title, seed=seed)
    result = loop.run(start, inputs, step)
    if result.stopped:
        raise FloatingPointError(f"{title}: {result.stopped}.")
    params = unflatten(as_stored(result.trainable, flatten(abstract_params(model_config))))
    return Model(model_config, params, tokenizer), result
