"""Prompting: an unlearned model is asked for what it forgot in other ways than its evaluation asks.

Three forms: behind solved examples or other forget passages; with more of the true text before the cut; in other words.
Each changes the queries alone: they are scored and measured as ever, on the unlearned and on the original model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trace_jax.attacks import queries
from trace_jax.attacks.attack import Case, Point
from trace_jax.attacks.config import PromptingConfig
from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.benchmark import Item
from trace_jax.data.probes import Prompts, Questions, encode_questions
from trace_jax.data.sources import revision_of
from trace_jax.data.tokenizer import start_and_end
from trace_jax.evaluation.benchmarks import scoreboard
from trace_jax.evaluation.continuations import context_length, make_reader
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.probes import Key, Memorization, QuestionAccuracy, TextLikelihood, Verbatim
from trace_jax.evaluation.task import SPLIT, Evaluator, ScoreStore, hazardous
from trace_jax.io.progress import say
from trace_jax.tasks.benchmarks import build_benchmark
from trace_jax.tasks.handbook import build_handbook
from trace_jax.tasks.wmdp import MultipleChoice

_OTHER = {"validation": "test", "test": "validation"}


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to ask: what `at` says, and its questions, prompts and tasks as an `Evaluator` has them.

    `source` is where its texts were read, if it has texts of its own.
    """

    at: str
    questions: Mapping[Key, Questions] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, Prompts] = dataclasses.field(default_factory=dict)
    tasks: tuple[MultipleChoice, ...] = ()
    source: str = ""

    def __bool__(self) -> bool:
        return bool(self.questions or self.prompts or self.tasks)


def prompting(settings: PromptingConfig, case: Case) -> list[Point]:
    """A point for each form that there is something to ask in: "3 examples", "half of the text", "paraphrase".

    Examples of one split are taken from the other, with `case.seed`; all models are asked the same.

    Raises:
      ConfigError: more examples than there are, or than the model can read at once.
      DataError: a file of paraphrases that can't be read.
    """
    forms = forms_of(settings, case)
    if not forms:
        say("prompting: there are no questions or beginnings of texts to ask in other ways")
    return [_measured(form, case) for form in forms]


def forms_of(settings: PromptingConfig, case: Case) -> list[Form]:
    """The forms that there is something to ask in; the unlearned model doesn't matter to them.

    Raises:
      ConfigError, DataError: see `prompting`.
    """
    forms = [form for form in _forms(settings, case) if form]
    for form in forms:
        _check_length(form, case)
    return forms


def _forms(settings: PromptingConfig, case: Case) -> Iterator[Form]:
    items = _items(case)
    for count in settings.examples:
        yield _with_examples(count, items, case)
    for share in settings.prefixes:
        yield _with_more_text(share, items, case)
    yield _in_other_words(settings.paraphrases, case)


def _with_examples(count: int, items: Mapping[Key, list[Item]], case: Case) -> Form:
    rng, vocabulary = np.random.default_rng([case.seed, count]), case.vocabulary
    questions, prompts = {}, {}
    for (split, subject), asked in items.items():
        behind = queries.items_with_examples(asked, items.get((_OTHER[split], subject), []), count, rng)
        questions[split, subject] = encode_questions(vocabulary, behind)
    pools = {"validation": case.corpora.validation, "test": case.corpora.test}
    for split, asked in _prompts(case).items():
        others = pools[_OTHER[split]].prompts.get("forget", asked.take(np.arange(0)))
        separator = queries.separator_tokens(vocabulary)
        prompts[split] = queries.prompts_with_examples(asked, others, count, rng, separator)
    tasks = [t.with_examples(count, seed=case.seed) for t in case.evaluator.tasks if isinstance(t, MultipleChoice)]
    return Form(f"{count} example{'s' * (count > 1)}", questions, prompts, tuple(tasks))


def _with_more_text(share: float, items: Mapping[Key, list[Item]], case: Case) -> Form:
    questions = {}
    if case.data.benchmark == "handbook":
        for key, asked in items.items():
            questions[key] = encode_questions(case.vocabulary, queries.items_with_statements(asked, share))
    _, end_mark = start_and_end(case.original.special)
    prompts = {
        split: queries.longer_prompts(asked, case.corpora.forget, share, end_mark)
        for split, asked in _prompts(case).items()
    }
    return Form("half of the text" if share == 0.5 else f"{100 * share:g} % of the text", questions, prompts)


def _in_other_words(paraphrases: str | None, case: Case) -> Form:
    questions, prompts, vocabulary = {}, {}, case.vocabulary
    if case.data.benchmark == "handbook":
        other = build_handbook(case.data, paraphrased=True)
        for split, part in (("validation", other.validation), ("test", other.test)):
            for subject, asked in part.questions.items():
                questions[split, subject] = encode_questions(vocabulary, asked)
    if paraphrases:
        written = queries.written_prompts(queries.read_paraphrases(paraphrases), vocabulary)
        prompts[SPLIT] = written.take(spread_indices(len(written), case.evaluator.config.max_prompts))
    return Form("paraphrase", questions, prompts, source=paraphrases or "")


def _asked(case: Case, name: str) -> Mapping[Any, Any]:
    """What a built-in task of the run asks."""
    return next((task.data for task in case.evaluator.tasks if task.name == name), {})  # pyright: ignore


def _prompts(case: Case) -> Mapping[str, Prompts]:
    return _asked(case, "verbatim")


def _items(case: Case) -> dict[Key, list[Item]]:
    """The evaluator's questions in plain text."""
    if not (questions := _asked(case, "questions")):
        return {}
    benchmark = build_benchmark(case.data)
    parts = {"validation": benchmark.validation, "test": benchmark.test}
    return {(split, subject): list(parts[split].questions[subject]) for split, subject in questions}


def _check_length(form: Form, case: Case) -> None:
    """Raises ConfigError if a query is longer than the model can read."""
    lengths = [int(questions.segments.sum(axis=2).max()) for questions in form.questions.values()]
    lengths += [queries.continuation_rows(prompts).tokens.shape[1] for prompts in form.prompts.values()]
    for task in form.tasks:
        reader = make_reader(case.original)
        lengths.append(1 + max(len(reader.encode(question.context)) for question in task.questions))
    most = context_length(case.original)
    if (longest := max(lengths)) > most:
        raise ConfigError(
            f"attacks.prompting: with {form.at} the longest query has {longest} tokens, and the model reads {most} at "
            "once. Ask for fewer examples or a smaller part of the text."
        )


def _measured(form: Form, case: Case) -> Point:
    """Likelihoods of continuations are measured too, relative to the original model asked in the same way."""
    settings, data = case.evaluator.config, revision_of(form.source) if form.source else ""
    if hazardous([form.source]):
        settings = dataclasses.replace(settings, audit_text=False)
    identity = fingerprint(case.identity, form.at, data)
    rows = {split: queries.continuation_rows(prompts) for split, prompts in form.prompts.items()}
    tasks: list[Any] = [
        QuestionAccuracy(form.questions, identity, scoreboard(case.data.benchmark).questions),
        TextLikelihood({(split, "forget"): continuations for split, continuations in rows.items()}, identity),
        Verbatim(form.prompts, fingerprint(identity, settings.audit_text)),
        Memorization(rows, identity),
    ]
    tasks = [task for task in tasks if task.data]
    evaluator = Evaluator(settings, (*tasks, *form.tasks), case.evaluator.mesh, case.evaluator.seed)
    directory = case.directory / form.at.replace(" ", "-").replace("%", "percent")
    original, unlearned = (
        evaluator.score(model, full=True, store=ScoreStore(directory / name, case.identity))
        for name, model in (("original", case.original), ("unlearned", case.unlearned))
    )
    evaluator = dataclasses.replace(evaluator, original=original)
    return Point(form.at, evaluator.measure(unlearned), evaluator.measure(original))
