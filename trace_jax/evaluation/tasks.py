"""The external benchmarks that a configuration asks for."""

from __future__ import annotations

from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.multiple_choice import read_multiple_choice
from trace_jax.evaluation.muse_task import muse_task
from trace_jax.evaluation.task import Task
from trace_jax.evaluation.tofu_task import tofu_task


def build_tasks(config: EvaluationConfig) -> tuple[Task, ...]:
    """Every task whose section is given. Its data is read here, so that what is missing is known at once.

    Raises:
      DataError: data that isn't there or has another form.
    """
    tasks: list[Task] = []
    if config.muse is not None:
        tasks.append(muse_task(config.muse))
    if config.tofu is not None:
        tasks.append(tofu_task(config.tofu))
    if config.multiple_choice is not None and config.multiple_choice.sources:
        tasks.append(read_multiple_choice(config.multiple_choice))
    return tuple(tasks)
