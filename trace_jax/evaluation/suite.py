"""Everything that is measured on one model, built once per run and called many times.

An `Evaluator` first scores (likelihood of every row and option: `Scores`), then measures (`Measurement`s with
intervals, relative to the original and the retrained model where their scores are given). Rows of all subjects and
splits go through the model together, so that short sets do not each pay for a half-empty batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from trace_jax.data.probes import Probes, Prompts, Questions
from trace_jax.data.rows import Rows
from trace_jax.evaluation import intervals, knowledge, utility
from trace_jax.evaluation.audit import audit_items, without_texts
from trace_jax.evaluation.benchmarks import Scoreboard, scoreboard
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.likelihood import QuestionScores, RowScores, score_questions, score_rows, spread_indices
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.evaluation.membership import MemberScores, TextScores, measure_membership, score_members
from trace_jax.evaluation.memorization import MemorizationScores, measure_memorization, score_memorization
from trace_jax.evaluation.store import ScoreStore, flat_arrays, grouped_arrays
from trace_jax.evaluation.task import Task, TaskScores
from trace_jax.evaluation.verbatim import VerbatimScores, verbatim_scores
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model, Source, SpecialTokens

Key = tuple[str, str]  # (split, subject)
KeyT = TypeVar("KeyT", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one model gave on every probe, per (split, subject). `verbatim` f64 [N], `memorization` and `members` per
    split; they are empty unless the scoring was full. `tasks` by name; unless it was full, the quick ones alone.
    `seconds` is the time that scoring took."""

    questions: Mapping[Key, QuestionScores]
    text: Mapping[Key, RowScores]
    verbatim: Mapping[str, VerbatimScores]
    memorization: Mapping[str, MemorizationScores]
    members: Mapping[str, MemberScores]
    seconds: float
    tasks: Mapping[str, TaskScores] = dataclasses.field(default_factory=dict)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All scores but those of tasks, by path."""
        return flat_arrays({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tasks"})

    @classmethod
    def from_arrays(cls, flat: Mapping[str, np.ndarray]) -> Scores:
        """The inverse of `to_arrays`."""
        questions = grouped_arrays(flat, "questions", 2)
        text = grouped_arrays(flat, "text", 2)
        verbatim, memorization = (grouped_arrays(flat, name, 1) for name in ("verbatim", "memorization"))
        sides = {key: TextScores(**arrays) for key, arrays in grouped_arrays(flat, "members", 2).items()}
        return cls(
            questions={(split, subject): QuestionScores(**a) for (split, subject), a in questions.items()},
            text={(split, subject): RowScores(**a) for (split, subject), a in text.items()},
            verbatim={split: VerbatimScores(**arrays) for (split,), arrays in verbatim.items()},
            memorization={split: MemorizationScores(**arrays) for (split,), arrays in memorization.items()},
            members={split: MemberScores(sides[split, "forget"], sides[split, "holdout"]) for split, _ in sides},
            seconds=float(flat["seconds"]),
        )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Measures parameters on the probes it was built with. Make one with `make_evaluator`."""

    config: EvaluationConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    board: Scoreboard
    questions: Mapping[Key, Questions]
    text: Mapping[Key, Rows]
    prompts: Mapping[str, Prompts]
    members: Mapping[str, tuple[Rows, Rows]]
    original: Scores | None
    retrained: Scores | None
    mesh: Mesh | None
    seed: int
    special: SpecialTokens
    source: Source | None
    tasks: tuple[Task, ...]
    identity: str

    def __call__(self, params: Any) -> list[Measurement]:
        """The quick measurements, for use while unlearning: accuracies, NLLs and utilities on every split."""
        return self.measure(self.score(params))

    def full(self, params: Any, *, store: ScoreStore | None = None) -> list[Measurement]:
        """All measurements: the quick ones, then memorisation, membership inference and the other tasks."""
        return self.measure(self.full_scores(params, store=store))

    def full_scores(self, params: Any, *, store: ScoreStore | None = None) -> Scores:
        """What `full` measures. With a store, what is kept there of this model is not scored again.

        Raises:
          NonFiniteScore: see `score`.
        """
        if store is None:
            return self.score(params, full=True)

        def score_probes() -> TaskScores:
            scores = self._score_probes(params, full=True)
            return TaskScores(scores.to_arrays(), audit_items(scores, self.prompts, self.tokenizer))

        def kept(name: str, identity: str, make: Callable[[], TaskScores]) -> TaskScores:
            return store.keep(name, identity, make if self.config.audit_text else lambda: without_texts(make()))

        probes = kept("probes", self.identity, score_probes)
        tasks = {task.name: kept(task.name, task.identity, self._scoring(task, params)) for task in self.tasks}
        return dataclasses.replace(Scores.from_arrays(probes.arrays), tasks=tasks)

    def with_references(self, *, original: Scores | None = None, retrained: Scores | None = None) -> Evaluator:
        """The same evaluator measuring relative to these models; None leaves a reference as it is."""
        return dataclasses.replace(self, original=original or self.original, retrained=retrained or self.retrained)

    def score(self, params: Any, *, full: bool = False, guide: Any = None) -> Scores:
        """Runs the model over the probes and tasks.

        Args:
          guide: parameters of a model of the same shape; every token uses the experts that the guide chooses for it.

        Raises:
          NonFiniteScore: the model gives NaN or infinite likelihoods.
          ValueError: a guide with `full`, or of another shape.
        """
        if full and guide is not None:
            raise ValueError("a full scoring generates text, which can't follow a guide; score with full=False.")
        start = time.perf_counter()
        probes = self._score_probes(params, full=full, guide=guide)
        tasks = {task.name: self._scoring(task, params, guide)() for task in self.tasks if full or task.quick}
        return dataclasses.replace(probes, tasks=tasks, seconds=time.perf_counter() - start)

    def _scoring(self, task: Task, params: Any, guide: Any = None) -> Callable[[], TaskScores]:
        model = self._model(params).replace(guide=guide)
        return lambda: task.score(model, batch_size=self.config.batch_size, mesh=self.mesh)

    def _model(self, params: Any) -> Model:
        return Model(self.model_config, params, self.tokenizer, self.special, self.source)

    def _score_probes(self, params: Any, *, full: bool, guide: Any = None) -> Scores:
        start, batch = time.perf_counter(), self.config.batch_size
        model = self._model(params).replace(guide=guide)
        text = _score_all_rows(model, self.text, batch_size=batch, mesh=self.mesh)
        question_scores = _score_all_questions(model, self.questions, batch_size=batch, mesh=self.mesh)
        verbatim, memorization, members = {}, {}, {}
        if full:
            for split, prompts in self.prompts.items():
                verbatim[split] = verbatim_scores(
                    params, self.model_config, _needed(self.tokenizer), prompts, batch_size=batch, mesh=self.mesh
                )
            share = {"batch_size": batch, "mesh": self.mesh}
            for (split, subject), rows in self.text.items():
                if subject == "forget":
                    memorization[split] = score_memorization(model, rows, **share)
            for split, sides in self.members.items():
                members[split] = score_members(model, *sides, gradients=self.config.max_gradients, **share)
        return Scores(question_scores, text, verbatim, memorization, members, time.perf_counter() - start)

    def measure(self, scores: Scores) -> list[Measurement]:
        """Measurements of scores. Probes with nothing to score give no measurement."""
        found = []
        for (split, subject), questions in scores.questions.items():
            found.append(named(self.board.accuracy(subject), split, knowledge.accuracy(questions, **self._resampling)))
        for key in scores.text:
            found += self._measure_text(key, scores.text[key])
        for split, texts in scores.verbatim.items():
            found.append(named("verbatim", split, intervals.bootstrap_mean(texts.score, **self._resampling)))
        for split, memorised in scores.memorization.items():
            found += measure_memorization(memorised, split=split, **self._resampling)
        for split, members in scores.members.items():
            retrained = self.retrained.members.get(split) if self.retrained is not None else None
            found += measure_membership(members, retrained, split=split, **self._resampling)
        for task in self.tasks:
            if task.name in scores.tasks:
                original, retrained = (m and m.tasks.get(task.name) for m in (self.original, self.retrained))
                given = {"original": original, "retrained": retrained, **self._resampling}
                found += task.measure(scores.tasks[task.name], **given)
        return sorted(found, key=lambda m: m.split != "validation")

    def _measure_text(self, key: Key, rows: RowScores) -> list[Measurement]:
        split, subject = key
        if not rows.tokens.sum():
            return []
        found = [named(f"{subject}_nll", split, utility.mean_nll(rows, **self._resampling))]
        if self.original is not None and key in self.original.text:
            relative = utility.probability_ratio if subject == "forget" else utility.utility
            name = self.board.likelihood(subject)
            found.append(named(name, split, relative(rows, self.original.text[key], **self._resampling)))
        return found

    @property
    def _resampling(self) -> dict[str, Any]:
        return {"resamples": self.config.bootstrap, "seed": self.seed}


def make_evaluator(
    config: EvaluationConfig,
    model_config: ModelConfig,
    probes: Mapping[str, Probes],
    tokenizer: Tokenizer | None = None,
    *,
    benchmark: str,
    original: Scores | None = None,
    retrained: Scores | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    special: SpecialTokens | None = None,
    source: Source | None = None,
    tasks: Sequence[Task] = (),
    identity: str = "",
) -> Evaluator:
    """Builds the evaluator of one run.

    Args:
      config: sizes of the evaluation sets; larger sets are thinned evenly, the same way every time.
      probes: per split ("validation", "test"). Empty sets are left out.
      tokenizer, special, source: of the model, by which tasks read and write text; the verbatim score needs the
        tokenizer too.
      benchmark: its scoreboard names the measurements.
      original: `Evaluator.score` of the model before unlearning; without it there is no utility and no probability
        ratio, only NLL.
      retrained: full `Evaluator.score` of the model trained without forget data; without it there is no PrivLeak.
      mesh: devices that share each batch; None: the default device.
      seed: of the bootstrap.
      tasks: external benchmarks that are measured as well (`build_tasks`).
      identity: hash of `config` and `probes`, by which kept scores are recognised.
    """
    questions, text, prompts, members = {}, {}, {}, {}
    for split, probe in probes.items():
        questions |= {(split, subject): q for subject, q in probe.questions.items() if len(q)}
        text |= {(split, subject): _thinned(r, config.max_rows) for subject, r in probe.text.items() if len(r)}
        beginnings = probe.prompts.get("forget")
        if beginnings is not None and len(beginnings):
            prompts[split] = beginnings.take(spread_indices(len(beginnings), config.max_prompts))
        sides = [probe.members[side] for side in ("forget", "holdout") if side in probe.members]
        if len(sides) == 2 and all(len(side) for side in sides):
            members[split] = tuple(_thinned(side, config.max_members) for side in sides)
    return Evaluator(
        config, model_config, tokenizer, scoreboard(benchmark), questions, text, prompts, members,
        original, retrained, mesh, seed, special or SpecialTokens(), source, tuple(tasks), identity,
    )  # fmt: skip


def _score_all_rows(
    model: Model, sets: Mapping[KeyT, Rows], *, batch_size: int, mesh: Mesh | None
) -> dict[KeyT, RowScores]:
    """Scores of every set; sets of equal row length share their batches."""
    scores = {}
    for keys in _by_shape({key: rows.tokens.shape[1:] for key, rows in sets.items()}):
        parts = [sets[key] for key in keys]
        rows, share = Rows.concatenate(parts), {"batch_size": batch_size, "mesh": mesh}
        result = score_rows(model.params, model.config, rows, guide=model.guide, **share)
        for key, part in zip(keys, _parts(parts), strict=True):
            scores[key] = RowScores(result.token_nll[part], result.valid[part])
    return {key: scores[key] for key in sets}


def _score_all_questions(
    model: Model, sets: Mapping[KeyT, Questions], *, batch_size: int, mesh: Mesh | None
) -> dict[KeyT, QuestionScores]:
    """The same for questions; sets of equal option count share their batches, padded to the longest."""
    scores = {}
    for keys in _by_shape({key: questions.tokens.shape[1:2] for key, questions in sets.items()}):
        length = max(sets[key].tokens.shape[-1] for key in keys)
        parts = [_padded(sets[key], length) for key in keys]
        fields = dataclasses.fields(Questions)
        together = Questions(*(np.concatenate([getattr(q, f.name) for q in parts]) for f in fields))
        share = {"batch_size": batch_size, "mesh": mesh}
        result = score_questions(model.params, model.config, together, guide=model.guide, **share)
        for key, part in zip(keys, _parts(parts), strict=True):
            scores[key] = QuestionScores(result.log_likelihood[part], result.answer[part], result.group[part])
    return {key: scores[key] for key in sets}


def _by_shape(shapes: Mapping[KeyT, tuple[int, ...]]) -> list[list[KeyT]]:
    groups: dict[tuple[int, ...], list[KeyT]] = {}
    for key, shape in shapes.items():
        groups.setdefault(shape, []).append(key)
    return list(groups.values())


def _parts(sets: Sequence[Rows] | Sequence[Questions]) -> list[slice]:
    """Where each set lies in their concatenation."""
    ends = np.cumsum([len(s) for s in sets])
    return [slice(int(end) - len(s), int(end)) for s, end in zip(sets, ends, strict=True)]


def _padded(questions: Questions, length: int) -> Questions:
    missing = ((0, 0), (0, 0), (0, length - questions.tokens.shape[-1]))
    tokens, segments, scored = (np.pad(x, missing) for x in (questions.tokens, questions.segments, questions.scored))
    return Questions(tokens, segments, scored, questions.answer, questions.group)


def _thinned(rows: Rows, most: int) -> Rows:
    return rows.take(spread_indices(len(rows), most))


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError("the verbatim score decodes generated text; give make_evaluator a tokenizer.")
    return tokenizer
