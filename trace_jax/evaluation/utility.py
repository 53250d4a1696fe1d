"""Utility: what is left of the original model's likelihood of text that should not be forgotten."""

from __future__ import annotations

import math

from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.likelihood import RowScores


def mean_nll(scores: RowScores, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """NLL per token over all rows, nats, with its interval over rows."""
    return intervals.bootstrap_mean(scores.nll, weights=scores.tokens, resamples=resamples, seed=seed)


def probability_ratio(scores: RowScores, original: RowScores, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """exp(NLL_original - NLL): per-token probability of the text (geometric mean) relative to the original model.

    Both models are scored on the same rows; the interval is over rows, paired. It is 1 for the original itself.
    """
    if len(scores) != len(original) or (scores.valid != original.valid).any():
        raise ValueError("a probability ratio compares two models on the same rows; these rows differ.")
    gain = intervals.bootstrap_mean(original.nll - scores.nll, weights=scores.tokens, resamples=resamples, seed=seed)
    return gain.map(math.exp)


def utility(scores: RowScores, original: RowScores, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """`probability_ratio` capped at 1: unlearning is not credited for text that it made likelier."""
    return probability_ratio(scores, original, resamples=resamples, seed=seed).map(lambda x: min(x, 1.0))
