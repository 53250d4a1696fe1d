"""The benchmarks by name: the corpora that are unlearned from, and the published tasks that models are scored on."""

from __future__ import annotations

from trace_jax.config import ConfigError
from trace_jax.data.benchmark import Benchmark
from trace_jax.data.config import DataConfig
from trace_jax.data.corpora import Corpora, assemble
from trace_jax.data.tokenizer import Vocabulary
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.fronts import Scoreboard, UtilityScore
from trace_jax.evaluation.task import Task
from trace_jax.tasks.handbook import build_handbook
from trace_jax.tasks.muse import muse_task
from trace_jax.tasks.presidents import build_presidents
from trace_jax.tasks.text import build_text
from trace_jax.tasks.tofu import tofu_task
from trace_jax.tasks.wmdp import read_multiple_choice

_BUILDERS = {"handbook": build_handbook, "presidents": build_presidents, "text": build_text}

# On running text there is no question to fail, and the verbatim score is too slow to take along the way. Forgetting
# is then the per-token probability of the forget text relative to the original model, exp(NLL_original - NLL): 1 for
# the original, towards 0 as the text becomes unlikely, and comparable between corpora of different difficulty.
_TEXT = Scoreboard(
    forgetting="forget_probability_ratio",
    utilities=(UtilityScore("neighbour_utility"), UtilityScore("general_utility")),
    questions={"forget": "cloze_accuracy"},
)

SCOREBOARDS = {
    "handbook": Scoreboard(
        forgetting="forget_accuracy",
        utilities=(UtilityScore("neighbour_accuracy", relative=True), UtilityScore("general_utility")),
        questions={"forget": "forget_accuracy", "neighbour": "neighbour_accuracy"},
        chance=0.25,
    ),
    "presidents": _TEXT,
    "text": _TEXT,  # neighbour text is optional there; without it the utility is general_utility alone
}


def scoreboard(benchmark: str) -> Scoreboard:
    """The scoreboard of a benchmark, or a ConfigError that names those there are."""
    if benchmark not in SCOREBOARDS:
        raise ConfigError(f"benchmark is {benchmark!r}; expected one of {', '.join(SCOREBOARDS)}.")
    return SCOREBOARDS[benchmark]


def build_corpora(config: DataConfig, vocabulary: Vocabulary | None = None) -> Corpora:
    """Builds the corpora of a configuration; the same configuration gives the same arrays.

    No held-out document is trained on (checked).

    Args:
      vocabulary: of the model; None trains a tokenizer of `config.vocab_size`, on training documents only.

    Raises:
      ConfigError: settings that ask for more than the benchmark has; a token that the model doesn't know.
      DataError: text of the user that can't be used (`trace_jax.tasks.text`), or is too small.
    """
    return assemble(build_benchmark(config), config, vocabulary)


def build_benchmark(config: DataConfig) -> Benchmark:
    """The documents and questions of a configuration in plain text; errors as `build_corpora`."""
    return _BUILDERS[config.benchmark](config)


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
