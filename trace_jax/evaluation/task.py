"""What is evaluated: its settings; a task scores a model and measures its scores; an evaluator has a list of them.

Scoring runs the model and is the expensive part: what a model gave is kept on disk, and computed again only when the
model or the task is another. Measuring is arithmetic on scores, and may compare models.
"""

import contextlib
import dataclasses
import itertools
import json
import string
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.config import ConfigError, Section, option
from trace_jax.evaluation.intervals import Measurement
from trace_jax.io.files import read_arrays, replacing, run_stage, write_arrays
from trace_jax.io.progress import progress
from trace_jax.models.model import Model

SPLITS = ("validation", "test")  # settings are chosen on the first, and the second is reported
HALF = "every other question"
SPLIT = "test"  # published benchmarks have one split, and it is for reporting
TEXTS = ("generation", "ground_truth", "question", "prompt", "options")  # fields of audit lines that hold text


class MuseConfig(Section):
    """MUSE's scores (`trace_jax.tasks.muse`)."""

    data: str = option(
        help="the corpus: huggingface:muse-bench/MUSE-Books or MUSE-News, tfds:muse_books or muse_news, or a directory "
        "with verbmem/forget.jsonl, knowmem/{forget,retain}_qa{,_icl}.jsonl and privleak/{forget,holdout}.jsonl"
    )
    profiles: tuple[str, ...] = option(
        ("muse", "open_unlearning"), help="whose evaluator is followed", choices=("muse", "open_unlearning")
    )


class TofuConfig(Section):
    """TOFU (2401.06121): on which of its forget sets, and in which form questions and answers are given."""

    data: str = option("huggingface:locuslab/TOFU", help="the data set; a directory has forget10_perturbed/train.jsonl")
    forget: str = option("forget10", help="the forget set", choices=("forget01", "forget05", "forget10"))
    prompt: str = option("Question: {question}\nAnswer:", help="what stands before an answer, as in training")
    answer: str = option(" {answer}", help="an answer as it follows the prompt")
    max_new_tokens: int = option(200, help="longest answer that is written, tokens", minimum=1)
    max_questions: int | None = option(None, help="most questions of a set, spread evenly; None = all", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        for name, form, field in (("prompt", self.prompt, "question"), ("answer", self.answer, "answer")):
            try:
                places = [place for _, place, _, _ in string.Formatter().parse(form) if place is not None]
            except ValueError:
                places = []
            if places != [field]:
                raise ConfigError(f"{name} is {form!r}; expected a text with {{{field}}} once (other braces doubled).")


class MultipleChoiceConfig(Section):
    """Four-option questions in lm-eval's words (`trace_jax.tasks.wmdp`)."""

    # By name ("wmdp_bio", "mmlu", "mmlu_virology", ...) where the questions are: `trace_jax.data.sources.read_records`.
    sources: dict = dataclasses.field(default_factory=dict)
    max_questions: int | None = option(None, help="most questions of a source, spread evenly; None = all", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        for name, source in self.sources.items():
            if not isinstance(source, str):
                raise ConfigError(f"sources.{name} is {source!r}; expected a file or huggingface: name.")


class EvaluationConfig(Section):
    """Sizes of the evaluation sets and the levels at which methods are compared."""

    batch_size: int = option(64, help="rows per evaluation batch", minimum=1)
    max_rows: int = option(96, help="most rows of held-out text per score, spread evenly over the documents", minimum=1)
    max_prompts: int = option(48, help="most prompts continued in the verbatim score", minimum=1)
    max_members: int = option(200, help="most texts a side in membership attacks, spread evenly", minimum=2)
    max_gradients: int = option(32, help="most texts a side in the gradient-norm attack; 0 = leave it out", minimum=0)
    bootstrap: int = option(1000, help="bootstrap resamples for intervals", minimum=100)
    levels: tuple[float, ...] = option((0.5,), help="forgetting on the benchmark's own scale where utility is compared")
    patching: bool = option(
        True,
        help="measure what returns when original experts are put back into what a method made; a study: of its choices",
    )
    audit_text: bool = option(
        True,
        help="keep a few questions, and what was generated with the true text, beside the scores, and show some in the "
        "report; never done for text of WMDP",
    )
    muse: MuseConfig | None = None
    tofu: TofuConfig | None = None
    multiple_choice: MultipleChoiceConfig | None = None

    @property
    def of_scores(self) -> "EvaluationConfig":
        """What scores and attacks depend on: experts are put back after the one and before the other."""
        return dataclasses.replace(self, patching=False)


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """Names of the measurements that methods are compared on, on one benchmark."""

    forgetting: str  # lower means more forgotten
    utilities: Mapping[str, bool]  # higher is better; whether the original model's value is to be divided by
    questions: Mapping[str, str]  # by subject of `Task.outcomes`, what is measured; several of one: its harmonic mean
    chance: float | None = None  # `forgetting` of a model that knows nothing, for the report; None: there is none


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What one model gave on one task."""

    arrays: Mapping[str, np.ndarray]  # per-item results by name, everything that `Task.measure` reads
    items: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)  # JSON lines, by part


Scores = Mapping[str, TaskScores]  # of one model, by the name of the task


class Task:
    """Something that is measured on a model."""

    name: str  # of its files; of an external benchmark, the prefix of its measurements' names too
    quick: bool = False  # whether it is cheap enough to be scored at every evaluation while unlearning
    identity: str  # hash of its data and settings: scores of a model hold as long as it stays the same
    board: Scoreboard | None = None  # of a published benchmark: what its methods are compared on
    generates: bool = False  # whether it writes text, for which a model can't have a guide

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """Runs the model over the task. Raises `NonFiniteScore`, and ValueError for a guide that it can't follow."""
        raise NotImplementedError

    def measure(
        self, scores: TaskScores, *, original: TaskScores | None, retrained: TaskScores | None, **resampling: int
    ) -> list[Measurement]:
        """Measurements of scores, relative to the original and the retrained model's where these are given."""
        raise NotImplementedError

    def outcomes(
        self, scores: TaskScores, original: TaskScores | None, retrained: TaskScores | None
    ) -> dict[str, np.ndarray]:
        """What each item gave, to be kept at every evaluation of a run (`probes`); most tasks keep nothing."""
        return {}

    def thinned(self, most: int) -> "Task":
        """For many models: at most so many test items of each subject, spread evenly; the same where there are few."""
        return self


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Everything that is measured on a model, by `tasks` of different names.

    `original`, `retrained`: scores of the model before unlearning, and of one trained without forget data, or nothing.
    """

    config: EvaluationConfig
    tasks: tuple[Task, ...]
    mesh: Mesh | None = None  # devices that share each batch; None: the default device
    seed: int = 0  # of the bootstrap
    original: Scores = dataclasses.field(default_factory=dict)
    retrained: Scores = dataclasses.field(default_factory=dict)

    def score(self, model: Model, *, full: bool = False, store: "ScoreStore | None" = None) -> Scores:
        """What the model gives on the quick tasks (those that can follow its guide), or on all; stored scores count."""

        def make(task: Task) -> TaskScores:
            scores = task.score(model, batch_size=self.config.batch_size, mesh=self.mesh)
            return scores if self.config.audit_text else without_texts(scores)

        tasks = [task for task in self.tasks if full or (task.quick and (model.guide is None or not task.generates))]
        scores = {}
        bar = progress("evaluation", len(tasks), unit="task") if full else contextlib.nullcontext(lambda *_: None)
        with bar as advance:
            for done, task in enumerate(tasks):
                advance(done, task.name)
                scores[task.name] = make(task) if store is None else store.keep(task, make)
        return scores

    def _compared(self, scores: Scores) -> Iterator[tuple[Task, TaskScores, dict[str, Any]]]:
        """The tasks that have scores, with these and those of the references."""
        references = {"original": self.original, "retrained": self.retrained}
        for task in (task for task in self.tasks if task.name in scores):
            yield task, scores[task.name], {model: own.get(task.name) for model, own in references.items()}

    def outcomes(self, scores: Scores) -> dict[str, np.ndarray]:
        """What each item of the tasks that have scores gave, by "SPLIT/SUBJECT/NAME" (`Task.outcomes`)."""
        each = (task.outcomes(own, **references).items() for task, own, references in self._compared(scores))
        return dict(itertools.chain.from_iterable(each))

    def measure(self, scores: Scores) -> list[Measurement]:
        """Measurements of scores, those of validation first."""
        resampling: Any = {"resamples": self.config.bootstrap, "seed": self.seed}
        each = (task.measure(own, **references, **resampling) for task, own, references in self._compared(scores))
        return sorted(itertools.chain.from_iterable(each), key=lambda m: m.split != "validation")


@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """Scores of one model on disk: NAME.npz per task, and NAME.PART.jsonl for whoever wants to check single items."""

    directory: Path
    model: str  # hash of what made it

    def keep(self, task: Task, make: Callable[[Task], TaskScores]) -> TaskScores:
        """What is there of the task, without its items, else what `make` gives, which is written."""
        file = self.directory / f"{task.name}.npz"

        def score() -> TaskScores:
            scores = make(task)
            for part, lines in scores.items.items():
                with replacing(self.directory / f"{task.name}.{part}.jsonl") as temporary:
                    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            write_arrays(file, scores.arrays)
            return scores

        identity = f"{self.model}/{task.identity}"
        return run_stage(task.name, self.directory, identity, task.name, score, lambda: TaskScores(read_arrays(file)))


def item_lines(where: Mapping[str, str], **columns: Any) -> list[dict[str, Any]]:
    """A line for each item, numbered, from columns of equal length; what is NaN is left out."""
    names = (*where, "item", *columns)
    values = zip(*(c.tolist() if isinstance(c, np.ndarray) else c for c in columns.values()), strict=True)
    lines = [dict(zip(names, (*where.values(), i, *row), strict=True)) for i, row in enumerate(values)]
    return [{name: value for name, value in line.items() if value == value} for line in lines]  # NaN isn't itself


def without_texts(scores: TaskScores) -> TaskScores:
    """The same with audit lines that hold no text."""

    def plain(line: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in line.items() if name not in TEXTS}

    return TaskScores(scores.arrays, {part: [*map(plain, lines)] for part, lines in scores.items.items()})


def hazardous(sources: Sequence[str]) -> bool:
    """Whether text of these sources must not be copied anywhere: the corpora of WMDP (2403.03218)."""
    return any("wmdp" in source.lower() for source in sources)


def halves(count: int) -> dict[str, np.ndarray]:
    """Places of the items of each of our splits, of a benchmark that has one: every other item is of validation."""
    return {split: np.arange(first, count, 2) for first, split in enumerate(SPLITS) if first < count}


def half_outcomes(subject: str, names: Sequence[str], **columns: np.ndarray) -> dict[str, np.ndarray]:
    """`Task.outcomes` of both halves of a subject's items: `question`, a hash of the name, and columns [N]."""
    columns = {"question": np.array([zlib.crc32(name.encode()) for name in names], np.uint32), **columns}
    parts = halves(len(names)).items()
    return {f"{split}/{subject}/{name}": x[half] for split, half in parts for name, x in columns.items()}
