"""Memorisation under teacher forcing: how much of a text a model would continue word for word.

Both scores read one flag per scored token: whether it is the model's greedy choice, given everything before it in the
true text (`TokenScores.greedy`). A greedy continuation from a true prefix follows the text for as long as the flags
are true, so that nothing has to be generated.

Profiles: "exact" is the definition. "open_unlearning" is what github.com/locuslab/open-unlearning computes
(src/evals/metrics/memorization.py): the last scored token is dropped (in question-answer data it is the end token, in
running text a word), and a text of n tokens of which nothing can be extracted scores 1/n instead of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from trace_jax.data.rows import Rows
from trace_jax.evaluation.intervals import bootstrap_mean
from trace_jax.evaluation.likelihood import row_texts, score_sequences
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.models.model import Model

Profile = Literal["exact", "open_unlearning"]


@dataclasses.dataclass(frozen=True)
class MemorizationScores:
    """Of N texts, f64 [N], profile "exact"."""

    extraction_strength: np.ndarray
    exact_memorization: np.ndarray


def score_memorization(
    model: Model, rows: Rows, *, batch_size: int = 16, mesh: Mesh | None = None
) -> MemorizationScores:
    """Scores of every document of `rows` that has a scored token."""
    scores = score_sequences(model, *row_texts(rows), batch_size=batch_size, mesh=mesh)
    greedy = [one.greedy for one in scores]
    return MemorizationScores(extraction_strength(greedy), exact_memorization(greedy))


def measure_memorization(
    scores: MemorizationScores, *, split: str, resamples: int = 1000, seed: int = 0
) -> list[Measurement]:
    """The mean of each score over texts; nothing where there is no text."""
    return [
        named(field.name, split, bootstrap_mean(values, resamples=resamples, seed=seed))
        for field in dataclasses.fields(scores)
        if len(values := getattr(scores, field.name))
    ]


def extraction_strength(greedy: Sequence[np.ndarray], profile: Profile = "exact") -> np.ndarray:
    """Share of each text that the model gives back once it has seen the rest: f64 [N] in 0..1.

    1 - k/n for the smallest k such that the last n - k tokens are all the greedy choice (2406.09179, after 2012.07805):
    1 if the text follows from its prompt alone, 0 if not even its last token follows.

    Args:
      greedy: bool [n] of each text. A text without a token has no score (NaN; 0 in profile "open_unlearning").
      profile: see above.
    """
    return np.array([_strength(flags, profile) for flags in _kept(greedy, profile)])


def exact_memorization(greedy: Sequence[np.ndarray], profile: Profile = "exact") -> np.ndarray:
    """Share of the tokens of each text that are the greedy choice given the true text before: f64 [N] in 0..1.

    Exact memorisation of 2205.10770, for unlearning in 2406.09179. A text without a token has no score (NaN).
    """
    return np.array([flags.mean() if len(flags) else np.nan for flags in _kept(greedy, profile)])


def _kept(greedy: Sequence[np.ndarray], profile: Profile) -> list[np.ndarray]:
    flags = [np.asarray(one, bool) for one in greedy]
    return [one[:-1] for one in flags] if profile == "open_unlearning" else flags


def _strength(flags: np.ndarray, profile: Profile) -> float:
    n = len(flags)
    if not n:
        return 0.0 if profile == "open_unlearning" else np.nan
    wrong = np.flatnonzero(~flags)
    suffix = n - 1 - wrong[-1] if len(wrong) else n
    return max(suffix, 1 if profile == "open_unlearning" else 0) / n
