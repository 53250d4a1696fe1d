"""Measurements, and their intervals: how far a number could be from the number on endlessly many items.

Bootstrap intervals are percentile intervals. They are invariant under increasing functions, so the interval of
`exp(mean)` is the exponential of the interval of the mean.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy

from trace_jax.io.files import encode

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_CHUNK = 4_000_000  # counts of a bootstrap held at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate over n items (questions, rows, texts) with the ends of its 95 % interval; NaN: too few to say."""

    value: float
    low: float
    high: float
    n: int

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The interval of an increasing function of the estimated quantity."""
        return Interval(function(self.value), function(self.low), function(self.high), self.n)


@dataclasses.dataclass(frozen=True)
class Measurement(Interval):
    """What was estimated, and where."""

    name: str  # stable, such as "forget_accuracy"
    split: str  # "validation" or "test"; "train" where the rows that were unlearned with are looked at (routing)
    note: str = ""  # what a reader must know beside the number, in a few words
    profile: str = ""  # whose protocol was followed to the letter, where there are several, such as "open_unlearning"
    revision: str = ""  # of the data set, where it is known

    def to_json(self) -> dict[str, Any]:
        """Plain dict that `json.dumps` takes and `decode` reads; NaN becomes None, since JSON has no NaN."""
        return {"name": self.name} | {key: value for key, value in encode(self).items() if value != ""}

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name} {self.split}: {self.value:.4f} [{self.low:.4f}, {self.high:.4f}] n={self.n}{note}"


def named(
    name: str, split: str, interval: Interval, note: str = "", profile: str = "", revision: str = ""
) -> Measurement:
    """The measurement of an estimate with its interval; where that has no ends, the note says so."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        note = f"{note}; too few items for an interval".removeprefix("; ")
    return Measurement(**vars(interval), name=name, split=split, note=note, profile=profile, revision=revision)


def find(measurements: Iterable[Measurement], name: str, split: str) -> Measurement | None:
    """The measurement of that name and split, or None."""
    return next((m for m in measurements if m.name == name and m.split == split), None)


def bootstrap_mean(
    values: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` [N], or sum(values) / sum(weights), with a bootstrap interval over items or groups of items.

    With total NLL and tokens [N] of rows the estimate is the NLL per token. Items of one of `groups` i32 [N] are not
    independent, so whole groups are resampled; with fewer than two the ends are NaN.
    """
    values, n = np.asarray(values, np.float64), len(values)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not weights.sum() > 0:
        raise ValueError("there is nothing to average: no item, or weights that sum to zero.")
    estimate = float(values.sum() / weights.sum())
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        values, weights = np.bincount(group, values), np.bincount(group, weights)
    means = [np.zeros(0)]
    if len(values) > 1:
        for counts in resample_counts(len(values), resamples=resamples, rng=np.random.default_rng(seed)):
            totals = counts @ weights
            means.append((counts @ values)[totals > 0] / totals[totals > 0])
    return quantile_interval(estimate, np.concatenate(means), n)


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion of independent items (Wilson 1927)."""
    z, p = float(scipy.special.ndtri(0.5 + LEVEL / 2)), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def proportion(
    correct: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Share of True in bool [N]: Wilson where items are independent, bootstrap over groups where they are not.

    Where every item agrees, a bootstrap says nothing; then the interval is Wilson's with the groups as items.
    """
    correct = np.asarray(correct, bool)
    number = len(correct) if groups is None else len(np.unique(groups))
    if number == len(correct):
        return wilson(int(correct.sum()), len(correct))
    if correct.all() or not correct.any() or number < 2:
        bounds = wilson(round(float(correct.mean()) * number), number)
        return Interval(float(correct.mean()), bounds.low, bounds.high, len(correct))
    return bootstrap_mean(correct, groups=groups, resamples=resamples, seed=seed)


def t_interval(values: np.ndarray) -> Interval:
    """Mean over a few independent runs (seeds) with Student's interval; NaN ends for a single run."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(scipy.special.stdtrit(n - 1, 0.5 + LEVEL / 2) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def seeds_and_items(values: np.ndarray, resampled: np.ndarray, n: int) -> Interval:
    """Mean of `values` f64 [S], one a seed, with its interval over other seeds and other items, of which there are n.

    `resampled` are the values on resampled items, f64 [R, S]; resamples with a NaN are left out. The spread of the
    seeds holds whatever differs between them, but not the items that they share, which a resample moves together. With
    `s` the standard deviation of the values, and K the covariance of the resampled ones, the half width is

        sqrt(t² s² / S + z² c), at least z sqrt(k),    c: mean of K off its diagonal, k: mean of all of K

    with Student's t of S - 1 degrees and the normal z: exact if every seed has its own items, and never narrower than
    the items alone allow. One seed: the percentile interval of its resamples. docs/evaluation.md has the coverage.
    """
    resampled, seeds, mean = resampled[np.isfinite(resampled).all(axis=1)], len(values), float(values.mean())
    if seeds == 1 or len(resampled) < 2:
        return quantile_interval(mean, resampled[:, 0], n)
    covariance = np.cov(resampled, rowvar=False)
    together = float(covariance.mean())
    shared = max(0.0, float((covariance.sum() - np.trace(covariance)) / (seeds * (seeds - 1))))
    t, z = scipy.special.stdtrit(seeds - 1, 0.5 + LEVEL / 2), scipy.special.ndtri(0.5 + LEVEL / 2)
    half = math.sqrt(max(t**2 * values.var(ddof=1) / seeds + z**2 * shared, z**2 * together))
    return Interval(mean, mean - half, mean + half, n)


Counts = tuple[np.ndarray, np.ndarray]  # how often each positive f64 [R, P] and each negative f64 [R, N] is drawn


def auc(positive: np.ndarray, negative: np.ndarray, counts: Counts | None = None) -> np.ndarray:
    """Probability that a positive [P] scores above a negative [N], ties counted as one half: f64 [R] of the resamples.

    `counts` None: every item once, R = 1.
    """
    positive, negative, (counts_p, counts_n) = _two_sides(positive, negative, counts)
    order = np.argsort(negative, kind="stable")
    cumulative = np.concatenate([np.zeros((len(counts_n), 1)), np.cumsum(counts_n[:, order], axis=1)], axis=1)
    below, up_to = (np.searchsorted(negative[order], positive, side=side) for side in ("left", "right"))
    wins = (cumulative[:, below] + cumulative[:, up_to]) / 2
    return (counts_p * wins).sum(axis=1) / (counts_p.sum(axis=1) * counts_n.sum(axis=1))


def true_positive_rate(
    positive: np.ndarray, negative: np.ndarray, counts: Counts | None = None, *, rate: float
) -> np.ndarray:
    """Share of positives above the lowest threshold that lets at most `rate` (below 1) of negatives through, f64 [R].

    Scores equal to the threshold stay below it. Every resample has a threshold of its own. Arguments as of `auc`.
    """
    positive, negative, (counts_p, counts_n) = _two_sides(positive, negative, counts)
    order = np.argsort(negative)[::-1]
    allowed = int(rate * len(negative) + 1e-9)
    threshold = negative[order][np.argmax(np.cumsum(counts_n[:, order], axis=1) > allowed, axis=1)]
    return (counts_p * (positive > threshold[:, None])).sum(axis=1) / counts_p.sum(axis=1)


def resampled_sides(
    statistic: Callable, positive: np.ndarray, negative: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Bootstrap distribution f64 [resamples] of `auc` or `true_positive_rate`; the sides are resampled separately.

    The same seed draws the same items, whatever the scores. Empty with fewer than two items on a side.
    """
    if min(sides := [len(positive), len(negative)]) < 2:
        return np.zeros(0)
    draws = resample_sides(sides, resamples=resamples, seed=seed)
    return np.concatenate([statistic(positive, negative, counts) for counts in draws])


def bootstrap_sides(statistic: Callable, positive: np.ndarray, negative: np.ndarray, **resampling: int) -> Interval:
    """`auc` or `true_positive_rate` with its bootstrap interval; `n` counts both sides."""
    resampled = resampled_sides(statistic, positive, negative, **resampling)
    return quantile_interval(float(statistic(positive, negative)[0]), resampled, len(positive) + len(negative))


def quantile_interval(value: float, resampled: np.ndarray, n: int) -> Interval:
    """Percentile interval of a statistic from its own bootstrap distribution [R]; NaN ends with fewer than two."""
    low, high = np.quantile(resampled, TAILS) if len(resampled) > 1 else (math.nan, math.nan)
    return Interval(value, float(low), float(high), n)


def resample_counts(
    items: int, *, resamples: int, rng: np.random.Generator, size: int | None = None
) -> Iterator[np.ndarray]:
    """How often each item is drawn, f64 [R, items], in chunks of resamples."""
    step = max(1, _CHUNK // (size or items))
    for start in range(0, resamples, step):
        draws = rng.multinomial(items, np.full(items, 1 / items), size=min(step, resamples - start))
        yield draws.astype(np.float64)


def resample_sides(
    items: Sequence[int], *, resamples: int, seed: int, size: int = 0
) -> Iterator[tuple[np.ndarray, ...]]:
    """The same for each of several sides, in step; `size`: numbers that a resample takes, at least the largest side."""
    options = {"resamples": resamples, "size": max(*items, size)}
    rngs = (np.random.default_rng((seed, side)) for side in range(len(items)))
    return zip(*(resample_counts(n, rng=rng, **options) for n, rng in zip(items, rngs, strict=True)), strict=True)


def _two_sides(
    positive: np.ndarray, negative: np.ndarray, counts: Counts | None
) -> tuple[np.ndarray, np.ndarray, Counts]:
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if not all(len(scores) and np.isfinite(scores).all() for scores in (positive, negative)):
        raise ValueError("an AUC needs at least one finite score on each side.")
    return positive, negative, counts or (np.ones((1, len(positive))), np.ones((1, len(negative))))
