"""TOFU's numbers (2401.06121) from what a model gave on its four sets of questions; pure functions on float64.

`log_prob` is the mean log-probability of an answer's tokens, end token included, given the question: the logarithm of
its length-normalised probability P(answer | question)^(1/length).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from rouge_score import rouge_scorer
from scipy import special, stats

from trace_jax.config import fingerprint
from trace_jax.data.sources import DataError, part, read_records, revision_and_content
from trace_jax.data.tokenizer import Vocabulary, encode_pairs, for_plain_text, start_and_end
from trace_jax.evaluation import intervals
from trace_jax.evaluation.config import TofuConfig
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.likelihood import TokenScores, score_sequences, spread_indices
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.evaluation.probes import exact_memorization, extraction_strength
from trace_jax.evaluation.task import SPLIT, TaskScores
from trace_jax.models.generate_text import continue_tokens
from trace_jax.models.model import Model

WrongMean = Literal["geometric", "arithmetic"]
Aggregator = Literal["closer_to_1_better", "true_better", "prob_mean"]


def probability(log_prob: np.ndarray) -> np.ndarray:
    """Length-normalised probability of each answer, f64 [N]."""
    return np.exp(np.asarray(log_prob, np.float64))


def probability_among(log_prob: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """p(answer) / (p(answer) + sum of p(wrong)), f64 [N]: the probability of real authors and world facts.

    The code of TOFU and of open-unlearning takes length-normalised probabilities here, the paper's formula plain ones.

    Args:
      log_prob: f64 [N].
      wrong: f64 [N, W], of the wrong answers; NaN where an item has fewer.
    """
    log_prob, wrong = np.asarray(log_prob, np.float64), _wrong(wrong)
    return special.softmax(np.concatenate([log_prob[:, None], wrong], axis=1), axis=1)[:, 0]


def log_truth_ratio(correct: np.ndarray, wrong: np.ndarray, *, wrong_mean: WrongMean = "geometric") -> np.ndarray:
    """log(p(wrong) / p(correct)) of each item, f64 [N]: towards -inf the model knows better, at 0 it can't tell.

    Args:
      correct: log_prob [N] of the paraphrased answer (of the answer, for real authors and world facts).
      wrong: log_prob [N, W] of the wrong answers; NaN where an item has fewer.
      wrong_mean: p(wrong) is the "geometric" mean of the wrong answers' probabilities (TOFU's aggregate_eval_stat.py,
        which makes its leaderboard, and open-unlearning) or the "arithmetic" one (TOFU's paper, and the utility in its
        utils.py).
    """
    wrong = _wrong(wrong)
    given = np.isfinite(wrong)
    count = given.sum(axis=1)
    if wrong_mean == "geometric":
        mean = np.where(given, wrong, 0.0).sum(axis=1) / count
    else:
        mean = special.logsumexp(wrong, axis=1) - np.log(count)
    return mean - np.asarray(correct, np.float64)


def aggregated(log_ratio: np.ndarray, aggregator: Aggregator) -> np.ndarray:
    """What is averaged over items of the truth ratio R = p(wrong) / p(correct), f64 [N] in 0..1.

    "closer_to_1_better": min(R, 1/R), for forget questions. "true_better": max(0, 1 - R), for all others.
    "prob_mean": 1 / (1 + R) = p(correct) / (p(correct) + p(wrong)), how much is known (open-unlearning, 2506.12618).
    The 1e-10 that open-unlearning adds to denominators is left out: it makes R nearly 0, "true", where a broken model
    gives every answer less than that.
    """
    log_ratio = np.asarray(log_ratio, np.float64)
    if aggregator == "closer_to_1_better":
        return np.exp(-np.abs(log_ratio))
    if aggregator == "true_better":
        return -np.expm1(np.minimum(log_ratio, 0.0))
    return special.expit(-log_ratio)


def forget_quality(log_ratio: np.ndarray, retrained: np.ndarray) -> tuple[float, float]:
    """(p-value, statistic) of the two-sample Kolmogorov-Smirnov test between two models' truth ratios.

    `retrained` is of the model that never saw the forget set. Near 1 the two can't be told apart. The test sees ranks
    alone, so that ratios, their inverses (as TOFU's code has them) and their logarithms give the same.
    """
    result: Any = stats.ks_2samp(np.asarray(log_ratio, np.float64), np.asarray(retrained, np.float64))
    return float(result.pvalue), float(result.statistic)


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Harmonic mean over the last axis of non-negative values; 0 where one of them is 0."""
    values = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        return values.shape[-1] / (1 / values).sum(axis=-1)


def model_utility(sets: Mapping[str, np.ndarray], *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Harmonic mean of the means of all columns of all sets, with a bootstrap interval.

    Args:
      sets: f64 [N, 3] of retain, real authors and world facts: probability, ROUGE-L recall and truth ratio
        ("true_better") of each item. The bootstrap draws items within each set, with all their columns.

    Returns:
      The interval; `n` counts the items of all sets. NaN ends where a set has fewer than two.
    """
    parts = [np.asarray(values, np.float64) for values in sets.values()]
    value = float(harmonic_mean(np.concatenate([part.mean(axis=0) for part in parts])))
    n = sum(len(part) for part in parts)
    if min(len(part) for part in parts) < 2:
        return Interval(value, math.nan, math.nan, n)
    drawn = [
        intervals.mean_resamples(part, resamples=resamples, seed=(seed, place)) for place, part in enumerate(parts)
    ]
    return intervals.quantile_interval(value, harmonic_mean(np.concatenate(drawn, axis=1)), n)


def rouge_recalls(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-1 and ROUGE-L recall with stemmer of each prediction, f64 [N, 2] in 0..1; 0 where nothing is predicted."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    found = [scorer.score(reference, given) for given, reference in zip(predictions, references, strict=True)]
    return np.array([[one["rouge1"].recall, one["rougeL"].recall] for one in found]).reshape(-1, 2)


def _wrong(log_prob: np.ndarray) -> np.ndarray:
    """Absent answers as log 0."""
    log_prob = np.asarray(log_prob, np.float64)
    return np.where(np.isnan(log_prob), -np.inf, log_prob)


SETS = ("forget", "retain", "real_authors", "world_facts")
_PARAPHRASED = ("forget", "retain")  # sets whose truth ratio is about a paraphrase of the answer
_UTILITY = SETS[1:]
_WRONG_MEANS: tuple[tuple[WrongMean, str], ...] = (("geometric", ""), ("arithmetic", "_arithmetic"))
_MEMORISED = {"extraction_strength": extraction_strength, "exact_memorization": exact_memorization}
_NO_RETRAINED = (
    "no forget quality: it compares with the truth ratios of a model that was trained without the forget set "
    "(target.retrained, model.retrained, or evaluate --retrained)"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer, the right answer of the truth ratio, and wrong answers (at least one)."""

    question: str
    answer: str
    correct: str
    wrong: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TofuTask:
    """TOFU's four sets. Make one with `tofu_task`.

    `revision` is that of the published data set, if it is one, and the hash of all that was read.
    """

    config: TofuConfig
    sets: Mapping[str, Sequence[Question]]
    revision: str
    name: str = "tofu"
    quick: bool = False  # it writes answers

    @property
    def identity(self) -> str:
        """Hash of every question and answer and of the settings."""
        return fingerprint(self.config, _content(self.sets))

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """Arrays by "SET/NAME", f64 over the N questions of a set: answer [N], correct [N], wrong [N, W] (mean
        log-probabilities, NaN where a question has fewer than W wrong answers), rouge [N, 2] (`rouge_recalls`), and of
        the forget set extraction_strength [N] and exact_memorization [N]."""
        arrays, items = {}, {}
        for name, questions in self.sets.items():
            arrays |= {f"{name}/{key}": v for key, v in self._likelihoods(model, name, batch_size, mesh).items()}
            written = self._written(model, questions, batch_size, mesh)
            arrays[f"{name}/rouge"] = rouge_recalls(written, [q.answer for q in questions])
            items[name] = _lines(questions, written, {k: v for k, v in arrays.items() if k.startswith(f"{name}/")})
        return TaskScores(arrays, items)

    def measure(
        self,
        scores: TaskScores,
        *,
        original: TaskScores | None,
        retrained: TaskScores | None,
        resamples: int,
        seed: int,
    ) -> list[Measurement]:
        """Forget quality first (it needs the retrained model), model utility, then what they are made of."""
        del original
        resampling: dict[str, Any] = {"resamples": resamples, "seed": seed}
        ratio = log_truth_ratio(scores.arrays["forget/correct"], scores.arrays["forget/wrong"])
        found = [] if retrained is None else _forget_quality(ratio, retrained)
        for wrong_mean, suffix in _WRONG_MEANS:
            parts = {name: _utility_parts(scores, name, wrong_mean) for name in _UTILITY}
            found.append(named(f"tofu_model_utility{suffix}", SPLIT, model_utility(parts, **resampling)))
        note = _NO_RETRAINED if retrained is None else ""
        means = [
            (f"tofu_{name}", values, note if name == "forget_truth_ratio" else "") for name, values in _means(scores)
        ]
        found += [
            named(name, SPLIT, intervals.bootstrap_mean(values, **resampling), note) for name, values, note in means
        ]
        return [dataclasses.replace(one, revision=self.revision) for one in found]

    def _likelihoods(self, model: Model, name: str, batch_size: int, mesh: Mesh | None) -> dict[str, np.ndarray]:
        questions, most = self.sets[name], max(len(q.wrong) for q in self.sets[name])
        pairs = [(q, text) for q in questions for text in (q.answer, q.correct, *q.wrong)]
        sequences, first = self._encoded(model, pairs)
        scores = iter(score_sequences(model, sequences, first, batch_size=batch_size, mesh=mesh))
        answers, correct, wrong = [], [], np.full((len(questions), most), np.nan)
        for row, question in enumerate(questions):
            answers.append(next(scores))
            correct.append(next(scores))
            wrong[row, : len(question.wrong)] = _log_probs([next(scores) for _ in question.wrong])
        arrays = {"answer": _log_probs(answers), "correct": _log_probs(correct), "wrong": wrong}
        if name == "forget":
            arrays |= {key: function([s.greedy for s in answers]) for key, function in _MEMORISED.items()}
        return arrays

    def _encoded(self, model: Model, pairs: Sequence[tuple[Question, str]]) -> tuple[list[list[int]], list[int]]:
        """Start, prompt, answer and end of each pair, and where the answer starts."""
        start, end = start_and_end(model.special)
        texts = [(self._prompt(q), self.config.answer.format(answer=answer)) for q, answer in pairs]
        encoded = encode_pairs(_vocabulary(model), texts)
        return [[start, *e.tokens.tolist(), end] for e in encoded], [1 + e.first_target for e in encoded]

    def _written(self, model: Model, questions: Sequence[Question], batch_size: int, mesh: Mesh | None) -> list[str]:
        """What the model says to each question, without white space around it."""
        start, _ = start_and_end(model.special)
        encoded = encode_pairs(_vocabulary(model), [(self._prompt(q), "") for q in questions])
        prompts = [[start, *e.tokens.tolist()] for e in encoded]
        written = continue_tokens(
            model, prompts, max_new_tokens=self.config.max_new_tokens, batch_size=batch_size, mesh=mesh
        )
        return [one.text.strip() for one in written]

    def _prompt(self, question: Question) -> str:
        return self.config.prompt.format(question=question.question)


def tofu_task(config: TofuConfig) -> TofuTask:
    """Reads the four sets.

    Raises:
      DataError: a set isn't there, or a row lacks a column; the message names the row.
    """
    sources = {
        name: part(config.data, f"{config.forget if name == 'forget' else name}_perturbed", "train") for name in SETS
    }
    sets: dict[str, Sequence[Question]] = {}
    for name, source in sources.items():
        sets[name] = [_question(row, name, f"{source}:{i}") for i, row in enumerate(read_records(source), start=1)]
    revision = revision_and_content(sources["forget"], fingerprint(_content(sets)))
    most = config.max_questions
    kept = {name: tuple(s[i] for i in spread_indices(len(s), most or len(s))) for name, s in sets.items()}
    return TofuTask(config, kept, revision)


def _content(sets: Mapping[str, Sequence[Question]]) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [dataclasses.astuple(question) for question in several] for name, several in sets.items()}


def _vocabulary(model: Model) -> Vocabulary:
    return Vocabulary(for_plain_text(model.tokenizer), model.special, model.config.vocab_size)


def _question(row: Mapping[str, Any], name: str, origin: str) -> Question:
    column = "paraphrased_answer" if name in _PARAPHRASED else "answer"
    for key in ("question", "answer", column):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(
                f"{origin}: {key} is missing or no text; expected TOFU's columns, for {name} with {column}."
            )
    wrong = row.get("perturbed_answer")
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, Sequence) or not wrong or not all(isinstance(one, str) and one.strip() for one in wrong):
        raise DataError(f"{origin}: perturbed_answer is missing or no list of texts; expected the wrong answers.")
    return Question(row["question"], row["answer"], row[column], tuple(wrong))


def _log_probs(scores: Sequence[TokenScores]) -> np.ndarray:
    return np.array([one.log_prob.mean(dtype=np.float64) for one in scores])


def _forget_quality(ratio: np.ndarray, retrained: TaskScores) -> list[Measurement]:
    theirs = log_truth_ratio(retrained.arrays["forget/correct"], retrained.arrays["forget/wrong"])
    pvalue, statistic = forget_quality(ratio, theirs)
    note = f"Kolmogorov-Smirnov test of {len(ratio)} truth ratios against the retrained model's; no interval"
    both = (("tofu_forget_quality", pvalue, f"p-value, {note}"), ("tofu_forget_ks", statistic, f"statistic, {note}"))
    return [Measurement(name, value, len(ratio), np.nan, np.nan, SPLIT, note) for name, value, note in both]


def _probability(scores: TaskScores, name: str) -> np.ndarray:
    if name in _PARAPHRASED:
        return probability(scores.arrays[f"{name}/answer"])
    return probability_among(scores.arrays[f"{name}/answer"], scores.arrays[f"{name}/wrong"])


def _truth(scores: TaskScores, name: str, aggregator: Aggregator, wrong_mean: WrongMean) -> np.ndarray:
    correct, wrong = (scores.arrays[f"{name}/{key}"] for key in ("correct", "wrong"))
    return aggregated(log_truth_ratio(correct, wrong, wrong_mean=wrong_mean), aggregator)


def _utility_parts(scores: TaskScores, name: str, wrong_mean: WrongMean) -> np.ndarray:
    """f64 [N, 3]: probability, ROUGE-L recall and truth ratio of each question."""
    truth = _truth(scores, name, "true_better", wrong_mean)
    return np.stack([_probability(scores, name), scores.arrays[f"{name}/rouge"][:, 1], truth], axis=1)


def _means(scores: TaskScores) -> list[tuple[str, np.ndarray]]:
    """What is averaged over the questions of a set, by name."""
    found = []
    for name in SETS:
        aggregator = "closer_to_1_better" if name == "forget" else "true_better"
        found += [(f"{name}_probability", _probability(scores, name))]
        found += [(f"{name}_rouge{kind}_recall", scores.arrays[f"{name}/rouge"][:, i]) for i, kind in enumerate("1L")]
        found += [(f"{name}_truth_ratio", _truth(scores, name, aggregator, "geometric"))]
        found += [(f"{name}_truth_ratio_arithmetic", _truth(scores, name, aggregator, "arithmetic"))]
    found += [("forget_truth_ratio_prob_mean", _truth(scores, "forget", "prob_mean", "geometric"))]
    return found + [(f"forget_{key}", scores.arrays[f"forget/{key}"]) for key in _MEMORISED]


def _lines(
    questions: Sequence[Question], written: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """One line a question: what was asked and said, and its numbers."""
    numbers = {key.partition("/")[2]: values for key, values in arrays.items()}
    return [
        {"question": q.question, "generation": text, "ground_truth": q.answer}
        | {key: _plain(values[i]) for key, values in numbers.items()}
        for i, (q, text) in enumerate(zip(questions, written, strict=True))
    ]


def _plain(value: np.ndarray) -> Any:
    """Numbers as JSON has them; what is missing as None."""
    return [None if np.isnan(x) else float(x) for x in value] if np.ndim(value) else float(value)
