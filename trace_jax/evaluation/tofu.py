"""TOFU's numbers (2401.06121) from what a model gave on its four sets of questions; pure functions on float64.

`log_prob` is the mean log-probability of an answer's tokens, end token included, given the question: the logarithm of
its length-normalised probability P(answer | question)^(1/length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from rouge_score import rouge_scorer
from scipy import special, stats

from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval

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
