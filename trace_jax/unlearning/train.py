"""Next-token training: the target model from scratch, the retrained one, and models that are trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import ModelConfig, abstract_params, flatten, init_params, unflatten
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import BATCH_AXES, place
from trace_jax.unlearning.inputs import pad_rows
from trace_jax.unlearning.loop import Hook, Loop, LoopResult
from trace_jax.unlearning.losses import StepSettings
from trace_jax.unlearning.optimizer import OptimizerConfig, TrainingConfig
from trace_jax.unlearning.step import initial_state, row_multiple, training_step
from trace_jax.unlearning.trained import Flat, current_params


def train_model(
    model: ModelConfig, config: TrainingConfig, batch_at: Callable[[int], Batch], *,
    seed: int, mesh: Mesh, directory: Path, identity: str, title: str, tokenizer: Any = None,
) -> Model:  # fmt: skip
    """Trains `config.steps` steps on `batch_at(step)`; continues from `directory` if it was interrupted.

    Raises:
      FloatingPointError: the loss stopped being finite; a target model that diverged is of no use to anyone.
    """
    loop = Loop(directory, identity, config.steps, config.checkpoint_every, title, seed=seed)
    settings = StepSettings(model, config.optimization, config.steps)

    def start():
        return init_params(model, jax.random.key(seed))

    result = _run(loop, start, batch_at, settings, mesh, config.load_balance)
    if result.stopped:
        raise FloatingPointError(f"{title}: {result.stopped}.")
    return Model(model, _params(result.trainable, model), tokenizer)


def train_on(
    model: Model, config: OptimizerConfig, batch_at: Callable[[int], Batch], *,
    steps: int, evaluate: Callable[[Any], Any], evaluate_every: int,
    seed: int, mesh: Mesh, directory: Path, identity: str, title: str,
) -> LoopResult:  # fmt: skip
    """Trains all parameters of a model, which is not changed, on `batch_at(step)`; continues if it was interrupted.

    `evaluate` is called with the parameters after every `evaluate_every` steps and at the end; what it returns is in
    `directory` (`trace_jax.unlearning.metrics.front_rows`). A run that diverges ends, and the result says so.
    """
    evaluation = Hook(evaluate_every, lambda _, trained: evaluate(_params(trained, model.config)))
    loop = Loop(directory, identity, steps, evaluate_every, title, evaluation, seed=seed, evaluate_first=False)
    return _run(loop, lambda: model.params, batch_at, StepSettings(model.config, config, steps), mesh)


def _run(loop: Loop, start, batch_at, settings: StepSettings, mesh: Mesh, load_balance: float = 0.0) -> LoopResult:
    multiple = row_multiple(settings, mesh)
    return loop.run(
        lambda: initial_state(flatten(start()), settings, mesh),
        lambda index: place(pad_rows(batch_at(index), multiple), mesh, P(BATCH_AXES)),
        lambda state, batch: training_step(state, batch, settings=settings, load_balance=load_balance, mesh=mesh),
    )


def _params(trainable: Flat, config: ModelConfig) -> Any:
    return unflatten(current_params(trainable, flatten(abstract_params(config))))
