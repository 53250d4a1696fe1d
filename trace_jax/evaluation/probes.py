"""The built-in tasks: questions, text, verbatim and memorised text of both splits (`membership` is the fifth); ROUGE.

Data is by (split, subject), or by split where it is of the forget set; arrays of scores are by "SPLIT/SUBJECT/NAME".
ROUGE is that of the package `rouge-score` (Google's, which MUSE, TOFU and open-unlearning use).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.config import fingerprint
from trace_jax.data.corpora import Probes, Prompts, Questions
from trace_jax.data.rows import Rows
from trace_jax.evaluation.intervals import Measurement, bootstrap_mean, named, proportion
from trace_jax.evaluation.likelihood import row_texts, score_questions, score_rows, score_sequences, spread_indices
from trace_jax.evaluation.membership import ATTACKS, SIDES, Membership
from trace_jax.evaluation.task import EvaluationConfig, Task, TaskScores, item_lines
from trace_jax.models.generate import generate
from trace_jax.models.model import Model

Key = tuple[str, str]  # (split, subject)
SHOWN, MOST_SHOWN = ("test", "forget"), 5  # questions whose text is kept beside the scores


def probe_tasks(
    probes: Mapping[str, Probes], config: EvaluationConfig, *, accuracies: Mapping[str, str], identity: str
) -> tuple[Task, ...]:
    """The built-in tasks that there is something to measure on; `probes`, by split, have the hash `identity`.

    Sets that are larger than the settings say are thinned evenly. `accuracies`: names by subject, of a scoreboard.
    """

    def thinned(items: Any, most: int) -> Any:
        return items.take(spread_indices(len(items), most))

    questions, text, prompts, members = {}, {}, {}, {}
    for split, probe in probes.items():
        questions |= {(split, subject): q for subject, q in probe.questions.items() if len(q)}
        text |= {(split, subject): thinned(rows, config.max_rows) for subject, rows in probe.text.items() if len(rows)}
        if (beginnings := probe.prompts.get("forget")) is not None and len(beginnings):
            prompts[split] = thinned(beginnings, config.max_prompts)
        sides = [probe.members[side] for side in SIDES if side in probe.members]
        if len(sides) == len(SIDES) and all(map(len, sides)):
            members[split] = tuple(thinned(side, config.max_members) for side in sides)
    texts = fingerprint(identity, config.max_rows)
    tasks = (
        QuestionAccuracy(questions, identity, accuracies),
        TextLikelihood(text, texts),
        Verbatim(prompts, fingerprint(identity, config.max_prompts, config.audit_text)),
        Memorization({split: rows for (split, subject), rows in text.items() if subject == "forget"}, texts),
        Membership(
            members, fingerprint(identity, config.max_members, config.max_gradients, ATTACKS), config.max_gradients
        ),
    )
    return tuple(task for task in tasks if task.data)


@dataclasses.dataclass(frozen=True)
class QuestionAccuracy(Task):
    """Share of multiple-choice questions whose right option is the likeliest (the first of equal ones).

    Questions of one group (a substance, a paragraph) stand or fall together, so intervals are over groups.
    """

    data: Mapping[Key, Questions]
    identity: str
    accuracies: Mapping[str, str]
    name = "questions"
    quick = True

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """`log_likelihood` f64 [Q, O]. Sets of equal option count share their batches, padded to the longest. Lines of
        the first few questions that are to be forgotten have their text.
        """
        scores = _scored_together(self.data, lambda q: score_questions(model, q, batch_size=batch_size, mesh=mesh))
        arrays, lines = {}, []
        for (split, subject), values in scores.items():
            own = self.data[split, subject]
            columns = {"group": own.group, "log_likelihood": values, "answer": own.answer}
            correct = values.argmax(axis=1) == own.answer
            lines += item_lines({"split": split, "subject": subject}, **columns, correct=correct)
            if (split, subject) == SHOWN and model.tokenizer is not None:
                for index in spread_indices(len(own), MOST_SHOWN).tolist():
                    lines[index - len(own)] |= _question_text(own, index, model.tokenizer)
            arrays[f"{split}/{subject}/log_likelihood"] = values
        return TaskScores(arrays, {"items": lines})

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        measurements = []
        for (split, subject), correct in self._correct(scores):
            accuracy = proportion(correct, groups=self.data[split, subject].group, **resampling)
            measurements.append(named(self.accuracies.get(subject, f"{subject}_accuracy"), split, accuracy))
        return measurements

    def outcomes(self, scores: TaskScores, original: TaskScores | None, retrained) -> dict[str, np.ndarray]:
        """`question`, a hash of the group that it stands or falls with, the same in every run, and `correct`."""
        outcomes = {}
        for (split, subject), correct in self._correct(scores):
            questions = self.data[split, subject]
            outcomes[f"{split}/{subject}/question"] = _hashes(questions.tokens, questions.group)
            outcomes[f"{split}/{subject}/correct"] = correct
        return outcomes

    def _correct(self, scores: TaskScores) -> Iterator[tuple[Key, np.ndarray]]:
        for (split, subject), questions in self.data.items():
            values = scores.arrays[f"{split}/{subject}/log_likelihood"]
            yield (split, subject), values.argmax(axis=1) == questions.answer


@dataclasses.dataclass(frozen=True)
class TextLikelihood(Task):
    """NLL per token of text, nats, and the per-token probability relative to the original model.

    The latter is exp(NLL_original - NLL), with its interval over rows, paired; capped at 1 for text that isn't
    to be forgotten: unlearning is not credited for text that it made likelier.
    """

    data: Mapping[Key, Rows]
    identity: str
    name = "text"
    quick = True

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """`nll` f64 [N], sum over the scored tokens of each row, and their number, `tokens` f64 [N]."""
        arrays, lines = {}, []
        scores = _scored_together(self.data, lambda rows: score_rows(model, rows, batch_size=batch_size, mesh=mesh))
        for (split, subject), by_token in scores.items():
            nll, tokens = by_token.sum(axis=1, dtype=np.float64), self.data[split, subject].valid.sum(axis=1)
            lines += item_lines({"split": split, "subject": subject}, nll=nll, tokens=tokens)
            arrays[f"{split}/{subject}/nll"] = nll
            arrays[f"{split}/{subject}/tokens"] = tokens.astype(np.float64)
        return TaskScores(arrays, {"items": lines})

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        measurements = []
        for split, subject in self.data:
            nll, tokens = (scores.arrays[f"{split}/{subject}/{name}"] for name in ("nll", "tokens"))
            if not tokens.sum():
                continue
            mean = bootstrap_mean(nll, weights=tokens, **resampling)
            measurements.append(named(f"{subject}_nll", split, mean))
            if original is not None and (before := original.arrays.get(f"{split}/{subject}/nll")) is not None:
                ratio = bootstrap_mean(before - nll, weights=tokens, **resampling).map(math.exp)
                ratio = ratio if subject == "forget" else ratio.map(lambda x: min(x, 1.0))
                measurements.append(named(relative_likelihood(subject), split, ratio))
        return measurements

    def outcomes(self, scores: TaskScores, original: TaskScores | None, retrained) -> dict[str, np.ndarray]:
        """`row`, `tokens`, `nll` and, with the original model's scores, its `original` NLL (nats, sums over rows)."""
        outcomes = {}
        for (split, subject), rows in self.data.items():
            where = f"{split}/{subject}"
            outcomes[f"{where}/row"] = _hashes(rows.tokens)
            outcomes[f"{where}/tokens"] = scores.arrays[f"{where}/tokens"].astype(np.int32)
            outcomes[f"{where}/nll"] = scores.arrays[f"{where}/nll"].astype(np.float32)
            if original is not None:
                outcomes[f"{where}/original"] = original.arrays[f"{where}/nll"].astype(np.float32)
        return outcomes


def _question_text(questions: Questions, index: int, tokenizer: Any) -> dict[str, Any]:
    """A question and its options as text."""
    tokens, scored = questions.tokens[index], questions.scored[index]
    options = [row[1:][flags[:-1]].tolist() for row, flags in zip(tokens, scored, strict=True)]
    prompt = tokens[0, : int(scored[0].argmax()) + 1].tolist()
    return {"question": tokenizer.decode(prompt).strip(), "options": [tokenizer.decode(o).strip() for o in options]}


def relative_likelihood(subject: str) -> str:
    """Name of the likelihood of a subject's text relative to the original model."""
    return "forget_probability_ratio" if subject == "forget" else f"{subject}_utility"


@dataclasses.dataclass(frozen=True)
class Verbatim(Task):
    """Greedy continuation of beginnings of forget documents against how they go on (MUSE's VerbMem, 2407.06460).

    As many new tokens are generated as the true continuation has; there are no stop strings and no stemmer.
    """

    data: Mapping[str, Prompts]
    identity: str
    name = "verbatim"

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """ROUGE-L F of each prompt, `score` f64 [N] in 0..1. Lines have prompt, generation and truth."""
        params, arrays, lines = model.unguided("generation"), {}, []
        if model.tokenizer is None:
            raise ValueError("the verbatim score decodes generated text; the model has no tokenizer.")
        for split, prompts in self.data.items():
            count, length = prompts.continuation.shape
            several = []
            for start in range(0, count, batch_size):
                rows = np.arange(start, min(start + batch_size, count))
                batch = prompts.take(np.resize(rows, min(batch_size, count)))  # one shape for all
                lengths = None if batch.lengths is None else batch.lengths[:, 0]
                options = {"lengths": lengths, "max_new_tokens": length, "mesh": mesh}
                several.append(generate(params, model.config, batch.prompt, **options))
            generated = np.concatenate(several)[:count]
            written, truth = map(model.tokenizer.decode_batch, map(prompts.unpadded, (generated, prompts.continuation)))
            score = rouge_l(written, truth)
            arrays |= {f"{split}/score": score, f"{split}/generated": generated}
            begun = model.tokenizer.decode_batch(prompts.unpadded(prompts.prompt, side=0))
            texts = {"prompt": begun, "generation": written, "ground_truth": truth}
            lines += item_lines({"split": split}, score=score, **texts)
        return TaskScores(arrays, {"items": lines})

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        values = {split: scores.arrays[f"{split}/score"] for split in self.data}
        return [named(self.name, split, bootstrap_mean(score, **resampling)) for split, score in values.items()]


@dataclasses.dataclass(frozen=True)
class Memorization(Task):
    """How much of the forget text a model would continue word for word, from its greedy choices given the true text.

    A greedy continuation from a true prefix follows the text for as long as it is the greedy choice (`TokenScores`), so
    that nothing has to be generated.
    """

    data: Mapping[str, Rows]
    identity: str
    name = "memorization"

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """`extraction_strength` and `exact_memorization`, f64 [N], of every document that has a scored token."""
        arrays, lines = {}, []
        for split, rows in self.data.items():
            scores = score_sequences(model, *row_texts(rows), batch_size=batch_size, mesh=mesh)
            columns = {name: function([one.greedy for one in scores]) for name, function in MEMORIZED.items()}
            arrays |= {f"{split}/{name}": values for name, values in columns.items()}
            lines += item_lines({"split": split}, **columns)
        return TaskScores(arrays, {"items": lines})

    def measure(self, scores: TaskScores, *, original, retrained, **resampling: Any) -> list[Measurement]:
        return [
            named(name, split, bootstrap_mean(values, **resampling))
            for split in self.data
            for name in MEMORIZED
            if len(values := scores.arrays[f"{split}/{name}"])
        ]


def extraction_strength(greedy: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each text that the model gives back once it has seen the rest: f64 [N] in 0..1; NaN without a token.

    1 - k/n for the smallest k such that the last n - k of `greedy`, bool [n], are true (2406.09179, after 2012.07805):
    1 if the text follows from its prompt alone, 0 if not even its last token follows.
    """
    suffixes = [len(flags) - 1 - np.flatnonzero(~flags).max(initial=-1) for flags in greedy]
    return np.array([n / len(flags) if len(flags) else np.nan for n, flags in zip(suffixes, greedy, strict=True)])


def exact_memorization(greedy: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each text's tokens that are the greedy choice: f64 [N] in 0..1 or NaN (2205.10770; 2406.09179)."""
    return np.array([flags.mean() if len(flags) else np.nan for flags in greedy])


MEMORIZED = {"extraction_strength": extraction_strength, "exact_memorization": exact_memorization}


def rouge_l(predictions: Sequence[str], references: Sequence[str], *, stem: bool = False) -> np.ndarray:
    """ROUGE-L F-measure of each prediction against its reference, f64 [N] in 0..1; 0 where one of them has no word.

    Words are runs of a-z and 0-9 in lower case; Porter's stemmer may shorten those of more than three letters.
    """
    from rouge_score import rouge_scorer  # here: it imports all of nltk

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem)
    return np.array([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)])


def rouge_recalls(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-1 and ROUGE-L recall with stemmer of each prediction, f64 [N, 2] in 0..1; 0 where nothing is predicted."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return np.array([[one["rouge1"].recall, one["rougeL"].recall] for one in scores]).reshape(-1, 2)


def _scored_together(data: Mapping[Key, Any], score: Callable[[Any], np.ndarray]) -> dict[Key, np.ndarray]:
    """`score` of every set. Sets with as many options, or rows as long, are scored as one, padded to the longest."""
    groups: dict[int, list[Key]] = {}
    for key, one in data.items():
        groups.setdefault(one.tokens.shape[1], []).append(key)
    results = {}
    for keys in groups.values():
        sets = [data[key] for key in keys]
        longest = max(one.tokens.shape[-1] for one in sets)
        columns = []
        for field in dataclasses.fields(sets[0]):
            parts = [getattr(one, field.name) for one in sets]
            if parts[0].ndim > 1:
                parts = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])]) for x in parts]
            columns.append(np.concatenate(parts))
        ends = np.cumsum([len(one) for one in sets])[:-1]
        results |= dict(zip(keys, np.split(score(type(sets[0])(*columns)), ends), strict=True))
    return {key: results[key] for key in data}


def _hashes(tokens: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """u32 [N]: hash of each item's tokens, or of those of its whole group."""
    number = (np.arange(len(tokens)) if group is None else group).tolist()
    hashes: dict[int, int] = {}
    for index, content in zip(number, tokens, strict=True):
        hashes[index] = zlib.crc32(content.tobytes(), hashes.get(index, 0))
    return np.array([hashes[index] for index in number], np.uint32)
