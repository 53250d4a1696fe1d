"""Prompting: an unlearned model is asked for what it forgot in other ways than its evaluation asks.

Three forms: behind solved examples or other forget passages; with more of the true text before the cut; in other words.
Each changes the queries alone: they are scored and measured as ever, on the unlearned and on the original model.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from trace_jax.attacks.attack import Attack, Case, Context, Point
from trace_jax.config import ConfigError, fingerprint, option
from trace_jax.data.corpora import Item, Prompts, encode_questions, prompts_of
from trace_jax.data.rows import Rows
from trace_jax.data.sources import DataError, read_records
from trace_jax.evaluation.likelihood import row_texts, spread_indices
from trace_jax.evaluation.probes import Key, Memorization, QuestionAccuracy, TextLikelihood, Verbatim
from trace_jax.evaluation.task import SPLIT, Evaluator, ScoreStore, Task, hazardous
from trace_jax.io.progress import say
from trace_jax.models.model import TextCodec, start_and_end
from trace_jax.models.sharding import pad
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.wmdp import MultipleChoice

BLANK_LINE = "\n\n"  # between examples, as in lm-eval
Items = Mapping[Key, Sequence[Item]]
_OTHER = {"validation": "test", "test": "validation"}
_COLUMNS = (("prompt", "continuation"), ("question", "answer"))


class Prompting(Attack):
    """The same questions and texts, asked for in other ways."""

    examples: tuple[int, ...] = option((3,), help="solved examples before a query, one attack each", minimum=1)
    prefixes: tuple[float, ...] = option((0.5, 0.75), help="share of a forget text that is given, one attack each")
    paraphrases: str | None = option(None, help="queries in other words (`read_paraphrases`), beside the handbook's")

    read: ClassVar = staticmethod(lambda source: read_paraphrases(source))

    def __post_init__(self):
        super().__post_init__()
        if wrong := [share for share in self.prefixes if not 0 < share < 1]:
            raise ConfigError(f"prefixes has {wrong[0]}; expected shares above 0 and below 1, such as (0.5, 0.75).")

    @property
    def source(self) -> str | None:
        return self.paraphrases

    def prepare(self, context: Context) -> list[tuple[str, tuple[Task, ...]]]:
        """The forms that there is something to ask in, such as "3 examples", each with what it is measured by. Examples
        of one split are taken from the other, with the run's seed; all models are asked the same.
        """
        forms, codec = [], context.codec
        for at, items, prompts, choices in self._forms(context):
            identity = fingerprint(at, self.revisions, self._audited(context))
            questions = {key: encode_questions(codec, several) for key, several in items.items()}
            rows = {split: continuation_rows(several) for split, several in prompts.items()}
            lengths = [int(several.segments.sum(axis=2).max()) for several in questions.values()]
            lengths += [several.tokens.shape[1] for several in rows.values()]
            lengths += [1 + len(codec.encode(question.context)) for task in choices for question in task.questions]
            if (longest := max(lengths, default=0)) > codec.context_length:
                raise ConfigError(
                    f"attacks.prompting: with {at} the longest query has {longest} tokens, and the model reads "
                    f"{codec.context_length} at once. Ask for fewer examples or a smaller part of the text."
                )
            tasks = (
                QuestionAccuracy(questions, identity, context.data.board.questions),
                TextLikelihood({(split, "forget"): several for split, several in rows.items()}, identity),
                Verbatim(prompts, identity),
                Memorization(rows, identity),
            )
            if tasks := (*(task for task in tasks if task.data), *choices):
                forms.append((at, tasks))
        if not forms:
            say("prompting: there are no questions or beginnings of texts to ask in other ways")
        return forms

    def points(self, case: Case) -> list[Point]:
        """A point for each form, on the unlearned and on the original model; likelihoods of continuations are relative
        to the original model asked in the same way.
        """
        context, points = case.context, []
        settings = dataclasses.replace(context.evaluator.config, audit_text=self._audited(context))
        for at, tasks in context.prepared:
            evaluator = Evaluator(settings, tasks, context.evaluator.mesh, context.evaluator.seed)
            name = at.replace(" ", "-").replace("%", "percent")
            original, unlearned = (
                evaluator.score(model, full=True, store=ScoreStore(of.directory / name, of.identity))
                for model, of in ((context.original, context), (case.unlearned, case))
            )
            evaluator = dataclasses.replace(evaluator, original=original)
            points.append(Point(at, evaluator.measure(unlearned), evaluator.measure(original)))
        return points

    def _audited(self, context: Context) -> bool:
        return context.evaluator.config.audit_text and not hazardous([self.source or ""])

    def _forms(self, context: Context) -> Iterator[tuple[str, Items, Mapping[str, Prompts], list[MultipleChoice]]]:
        """Every form with its questions, its prompts by split, and its multiple-choice tasks."""
        corpora, codec, tasks = context.corpora, context.codec, context.evaluator.tasks
        prompts = {split: own for task in tasks if isinstance(task, Verbatim) for split, own in task.data.items()}
        asked = [key for task in tasks if isinstance(task, QuestionAccuracy) for key in task.data]
        benchmark = context.data.build() if asked else None
        items: Items = {(split, subject): getattr(benchmark, split).questions[subject] for split, subject in asked}
        multiple_choice = [task for task in tasks if isinstance(task, MultipleChoice)]
        before, both = (codec.literal.encode(t, add_special_tokens=False).ids for t in ("a", "a" + BLANK_LINE))
        for count in self.examples:
            rng = np.random.default_rng([context.seed, count])
            behind = {
                (split, subject): items_with_examples(own, items.get((_OTHER[split], subject), []), count, rng)
                for (split, subject), own in items.items()
            }
            longer = {}
            for split, own in prompts.items():
                others = getattr(corpora, _OTHER[split]).prompts.get("forget", own.take(np.arange(0)))
                longer[split] = prompts_with_examples(own, others, count, rng, both[len(before) :])
            choices = [task.with_examples(count, seed=context.seed) for task in multiple_choice]
            yield f"{count} example{'s' * (count > 1)}", behind, longer, choices
        handbook = context.data if isinstance(context.data, HandbookConfig) else None
        _, end_mark = start_and_end(context.original.special)
        for share in self.prefixes:
            at = "half of the text" if share == 0.5 else f"{100 * share:g} % of the text"
            behind = {key: items_with_statements(own, share) for key, own in items.items()} if handbook else {}
            longer = {split: longer_prompts(own, corpora.forget, share, end_mark) for split, own in prompts.items()}
            yield at, behind, longer, []
        behind, written = {}, {}
        if handbook:
            other = handbook.build(paraphrased=True)
            parts = {split: getattr(other, split).questions for split in _OTHER}
            behind = {(split, subject): own for split, part in parts.items() for subject, own in part.items()}
        if self.paraphrases:
            own = written_prompts(read_paraphrases(self.paraphrases), codec)
            written[SPLIT] = own.take(spread_indices(len(own), context.evaluator.config.max_prompts))
        yield "paraphrase", behind, written, []


def items_with_examples(
    items: Sequence[Item], solved: Sequence[Item], count: int, rng: np.random.Generator
) -> list[Item]:
    """The items, each behind `count` of `solved` with their right options, drawn for it and joined by blank lines: none
    of its own group or with one of its options, so that what was forgotten can't be copied.
    """
    behind = []
    for item in items:
        options = [option.strip() for option in item.options]
        statements = [_statement(s) for s in solved if s.group != item.group]
        usable = [text for text in statements if not any(o in text for o in options)]
        texts = [*_draw(usable, count, rng), item.prompt]
        behind.append(dataclasses.replace(item, prompt=BLANK_LINE.join(texts)))
    return behind


def items_with_statements(items: Sequence[Item], share: float) -> list[Item]:
    """The items, each behind true statements about its group: the share (rounded up) of the group's other items that
    comes first, solved. Items that are alone in their group stay as they are.
    """
    behind = []
    for item in items:
        others = [other for other in items if other.group == item.group and other is not item]
        texts = [f"{_statement(other)}." for other in others[: int(np.ceil(share * len(others)))]]
        behind.append(dataclasses.replace(item, prompt=" ".join([*texts, item.prompt])))
    return behind


def prompts_with_examples(
    prompts: Prompts, others: Prompts, count: int, rng: np.random.Generator, separator: Sequence[int]
) -> Prompts:
    """The prompts, each behind `count` of `others` with their continuations, drawn for it, `separator` in between, and
    the start mark once. What contains the prompt's own continuation is no example.
    """
    texts = [[*prompt[1:], *rest] for prompt, rest in _pairs(others)]
    written = [np.array(text, np.int32).tobytes() for text in texts]
    pairs = []
    for prompt, continuation in _pairs(prompts):
        asked = np.array(continuation, np.int32).tobytes()
        usable = [text for text, seen in zip(texts, written, strict=True) if asked not in seen]
        drawn = [token for text in _draw(usable, count, rng) for token in (*text, *separator)]
        pairs.append(([prompt[0], *drawn, *prompt[1:]], continuation))
    return prompts_of(pairs)


def longer_prompts(prompts: Prompts, rows: Rows, share: float, end_mark: int) -> Prompts:
    """The chunks of `rows` (forget) that `prompts` with their continuations begin, cut in two: `share` of the text is
    given, at least one token, and the rest is to come, at least one; the end mark isn't text.
    """
    beginnings = [(*prompt, *continuation) for prompt, continuation in _pairs(prompts)]
    texts, lengths = reversed(row_texts(rows)[0]), {len(beginning) for beginning in beginnings}
    chunks = {tuple(text[:length]): text for text in texts for length in lengths}  # of equal ones the first
    pairs = []
    for beginning in beginnings:
        start, *text = chunks[beginning]
        text = text[:-1] if text[-1] == end_mark else text
        cut = min(max(1, int(share * len(text))), len(text) - 1)
        pairs.append(([start, *text[:cut]], text[cut:]))
    return prompts_of(pairs)


def read_paraphrases(source: str) -> list[tuple[str, str]]:
    """(what is asked, what should come) of every row {"prompt", "continuation"} or {"question", "answer"} of a source.
    The second follows the first as it is: white space in between belongs to one of them. Errors quote no text.
    """
    pairs = []
    for number, record in enumerate(read_records(source), 1):
        names = next((names for names in _COLUMNS if all(isinstance(record.get(n), str) for n in names)), None)
        if names is None:
            raise DataError(
                f"{source}: row {number} has {', '.join(map(str, record)) or 'nothing'}; expected the texts prompt and "
                "continuation, or question and answer."
            )
        pairs.append((record[names[0]], record[names[1]]))
        if not all(text.strip() for text in pairs[-1]):
            raise DataError(f"{source}: row {number} has an empty {names[0]} or {names[1]}; both need text.")
    return pairs


def written_prompts(pairs: Sequence[tuple[str, str]], codec: TextCodec) -> Prompts:
    """Prompts of pairs of texts, which are read as one text; a token with characters of both is to come."""
    start, _ = start_and_end(codec.special)
    cut = [(e.tokens.tolist(), e.first_target) for e in codec.pairs(pairs)]
    return prompts_of([([start, *tokens[:first]], tokens[first:]) for tokens, first in cut])


def continuation_rows(prompts: Prompts) -> Rows:
    """Every prompt with its continuation as a row, of which only the tokens of the continuation are scored."""
    pairs = _pairs(prompts)
    tokens = pad([prompt + continuation for prompt, continuation in pairs])
    segments = pad([[1] * len(prompt + continuation) for prompt, continuation in pairs])
    scored = [[False] * (len(prompt) - 1) + [True] * len(continuation) for prompt, continuation in pairs]
    valid = pad(scored, width=tokens.shape[1], dtype=bool)
    return Rows(tokens, segments, valid, np.zeros(len(pairs), np.int32))


def _statement(item: Item) -> str:
    return item.prompt + item.options[item.answer]


def _draw(usable: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    if len(usable) < count:
        raise ConfigError(
            f"examples = {count}: only {len(usable)} can stand before one of the queries; of its own group, and with "
            f"its answer in them, none may. Ask for at most {len(usable)}, or give more data."
        )
    return [usable[i] for i in rng.choice(len(usable), count, replace=False)]


def _pairs(prompts: Prompts) -> list[tuple[list[int], list[int]]]:
    """(tokens of the prompt, tokens of the continuation) without padding."""
    given, to_come = prompts.unpadded(prompts.prompt, side=0), prompts.unpadded(prompts.continuation)
    return list(zip(given, to_come, strict=True))
