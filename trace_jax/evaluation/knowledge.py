"""Knowledge: the share of four-option questions answered right."""

from __future__ import annotations

from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.likelihood import QuestionScores


def accuracy(scores: QuestionScores, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Share of questions whose right option is the likeliest; chance is one over the number of options.

    Questions of one group (a substance, a document) stand or fall together, so the interval is over groups.
    """
    return intervals.proportion(scores.correct, groups=scores.group, resamples=resamples, seed=seed)
