"""Fronts: utility against forgetting along a run, and what is read off them.

A method is a front, not a point: two methods are compared at the same forgetting level. Levels are on the
benchmark's own forgetting scale, where lower means more forgotten.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation.benchmarks import scoreboard
from trace_jax.evaluation.measurement import Measurement

MEAN = "mean_utility"


@dataclasses.dataclass(frozen=True)
class Front:
    """One run on one split, point by point along training.

    Attributes:
      steps: i64 [N], increasing.
      forgetting: f64 [N], lower means more forgotten.
      utilities: f64 [N] per name; 1 is the original model. "mean_utility" is the mean of the others.
      measured: f64 [N] per name, every value as it was measured (accuracies not divided by the original's).
    """

    steps: np.ndarray
    forgetting: np.ndarray
    utilities: Mapping[str, np.ndarray]
    measured: Mapping[str, np.ndarray]

    def __post_init__(self):
        for name, values in {"forgetting": self.forgetting, **self.utilities, **self.measured}.items():
            if len(values) != len(self.steps) or not np.isfinite(values).all():
                raise ValueError(f"{name} of a front needs one finite value per step; got {values} for {self.steps}.")
        if not len(self.steps) or (np.diff(self.steps) <= 0).any():
            raise ValueError(f"a front needs at least one point and increasing steps; got {self.steps}.")

    def to_json(self) -> dict[str, Any]:
        """Plain dict that `json.dumps` takes."""
        plain = {f: getattr(self, f).tolist() for f in ("steps", "forgetting")}
        return plain | {f: {k: v.tolist() for k, v in getattr(self, f).items()} for f in ("utilities", "measured")}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Front:
        """The inverse of `to_json`."""
        columns = ({k: np.asarray(v, np.float64) for k, v in plain[f].items()} for f in ("utilities", "measured"))
        return cls(np.asarray(plain["steps"], np.int64), np.asarray(plain["forgetting"], np.float64), *columns)


def front_from_history(
    history: Iterable[tuple[int, Sequence[Measurement]]],
    *,
    benchmark: str,
    split: str,
    original: Mapping[str, float] | None = None,
) -> Front:
    """The front of a run from its evaluations.

    Args:
      history: (step, measurements) pairs in order of steps; measurements of other splits are ignored, and so are
        names that not every point has.
      benchmark, split: say which measurements are forgetting and utility.
      original: values of the original model that relative utilities are divided by; None: those of step 0.

    Raises:
      ValueError: a needed measurement is missing, or an original value is zero.
    """
    board = scoreboard(benchmark)
    points = sorted(
        ((step, {m.name: m.value for m in ms if m.split == split}) for step, ms in history), key=lambda p: p[0]
    )
    if not points:
        raise ValueError("the run has no evaluation yet; a front needs at least one.")
    if original is None and points[0][0] != 0:
        raise ValueError(
            f"the first evaluation is at step {points[0][0]}; give the original model's values, or step 0."
        )
    original = points[0][1] if original is None else original
    names = [name for name in points[0][1] if all(name in values for _, values in points)]
    if board.forgetting not in names:
        raise ValueError(f"{board.forgetting} was not measured on {split} at every evaluation; measured: {names}.")
    measured = {name: np.array([values[name] for _, values in points], np.float64) for name in names}
    utilities = {}
    for score in board.utilities:
        if score.name in measured:
            utilities[score.name] = measured[score.name] / (_positive(original, score.name) if score.relative else 1.0)
    if not utilities:
        raise ValueError(f"no utility was measured on {split}; expected one of {[u.name for u in board.utilities]}.")
    utilities[MEAN] = np.mean(list(utilities.values()), axis=0)
    steps = np.array([step for step, _ in points], np.int64)
    return Front(steps, measured[board.forgetting], utilities, measured)


def standing(
    measurements: Sequence[Measurement], *, benchmark: str, split: str, original: Sequence[Measurement]
) -> tuple[float, float]:
    """(forgetting, mean utility) of one evaluation, as a front has them; `original`: those of the original model."""
    before = {m.name: m.value for m in original if m.split == split}
    front = front_from_history([(0, measurements)], benchmark=benchmark, split=split, original=before)
    return float(front.forgetting[0]), float(front.utilities[MEAN][0])


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where a front first comes down to a level: between evaluations `index - 1` and `index`.

    `share` in 0..1 is how far along that stretch; 1 is the evaluation itself. `step` is interpolated likewise.
    """

    index: int
    share: float
    step: float

    def value(self, values: np.ndarray) -> float:
        """`values` [N] of the front's points, interpolated at the crossing."""
        if self.index == 0:
            return float(values[0])
        return float(values[self.index - 1] * (1 - self.share) + values[self.index] * self.share)


def crossing(front: Front, level: float) -> Crossing | None:
    """First time along training that forgetting <= level, linearly interpolated; None if it never happens."""
    reached = np.flatnonzero(front.forgetting <= level)
    if not len(reached):
        return None
    index = int(reached[0])
    if index == 0:
        return Crossing(0, 1.0, float(front.steps[0]))
    before, after = front.forgetting[index - 1], front.forgetting[index]
    share = float((before - level) / (before - after))
    step = front.steps[index - 1] * (1 - share) + front.steps[index] * share
    return Crossing(index, share, float(step))


def utility_at(front: Front, level: float, utility: str = MEAN) -> float | None:
    """Utility at the first crossing of a forgetting level; None if the run never forgets that much."""
    at = crossing(front, level)
    return None if at is None else at.value(front.utilities[utility])


def resampled_utility_at(forgetting: np.ndarray, utility: np.ndarray, level: float) -> np.ndarray:
    """Utility f64 [R] at the first crossing of a level by each of many fronts, forgetting and utility f64 [R, N].

    A front that stays above the level is read at its lowest evaluation.
    """
    reached = forgetting <= level
    index = np.where(reached.any(axis=1), reached.argmax(axis=1), forgetting.argmin(axis=1))
    rows, before = np.arange(len(index)), np.maximum(index - 1, 0)
    start, end = forgetting[rows, before], forgetting[rows, index]
    inside = reached[rows, index] & (index > 0)
    share = np.where(inside, (start - level) / np.where(inside, start - end, 1.0), 1.0)
    return utility[rows, before] * (1 - share) + utility[rows, index] * share


def best_point(front: Front, level: float, utility: str = MEAN) -> int | None:
    """Index of the evaluation with the highest utility among those with forgetting <= level; None if there is none.

    A run that loses utility on its way to the level and regains it later is judged by what it regains. Choose on
    validation and read the test front at the same index, or the best of many noisy points is reported.
    """
    reached = np.flatnonzero(front.forgetting <= level)
    return int(reached[np.argmax(front.utilities[utility][reached])]) if len(reached) else None


@dataclasses.dataclass(frozen=True)
class Area:
    """Signed area between two fronts over the forgetting levels [low, high] that both reach.

    `mean_difference` is the area divided by the width: by how much utility is higher on average over the levels.
    """

    low: float
    high: float
    mean_difference: float


def area_between(first: Front, second: Front, *, utility: str = MEAN) -> Area | None:
    """Mean of utility_at(first) - utility_at(second) over the common range of levels; None if there is none.

    Exact: between two neighbouring levels of evaluation both curves are straight, so the midpoint rule has no error.
    """
    low = max(float(f.forgetting.min()) for f in (first, second))
    high = min(float(f.forgetting[0]) for f in (first, second))
    if not low < high:
        return None
    levels = np.unique(np.concatenate([first.forgetting, second.forgetting, [low, high]]))
    levels = levels[(levels >= low) & (levels <= high)]
    total = 0.0
    for left, right in itertools.pairwise(levels):
        values = [utility_at(f, (left + right) / 2, utility) for f in (first, second)]
        assert values[0] is not None and values[1] is not None  # both reach every level above `low`
        total += (values[0] - values[1]) * (right - left)
    return Area(low, high, float(total / (high - low)))


def _positive(original: Mapping[str, float], name: str) -> float:
    value = original.get(name)
    if value is None or not value > 0:
        raise ValueError(f"{name} of the original model is {value}; a relative utility needs a positive value.")
    return value
