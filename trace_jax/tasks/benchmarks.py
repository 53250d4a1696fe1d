"""The benchmarks: kinds of `DataConfig` that are unlearned from, and published tasks that models are scored on."""

from trace_jax.data.corpora import DataConfig
from trace_jax.evaluation.task import EvaluationConfig, Task
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.muse import muse_task
from trace_jax.tasks.presidents import PresidentsConfig
from trace_jax.tasks.text import TextConfig
from trace_jax.tasks.tofu import TofuCorpora, tofu_task
from trace_jax.tasks.wmdp import read_multiple_choice

_KINDS = HandbookConfig, PresidentsConfig, TextConfig, TofuCorpora
BENCHMARKS: dict[str, type[DataConfig]] = {kind.name: kind for kind in _KINDS}


def build_tasks(config: EvaluationConfig) -> tuple[Task, ...]:
    """Every task whose section is given. Its data is read here, so that what is missing is known at once."""
    tasks: list[Task] = []
    if config.muse is not None:
        tasks.append(muse_task(config.muse))
    if config.tofu is not None:
        tasks.append(tofu_task(config.tofu))
    if config.multiple_choice is not None and config.multiple_choice.sources:
        tasks.append(read_multiple_choice(config.multiple_choice))
    return tuple(tasks)
