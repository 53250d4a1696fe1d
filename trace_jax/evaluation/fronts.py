"""Fronts: utility against forgetting along a run, and what is read off them.

A method is a front, not a point: two methods are compared at the same forgetting level. Levels are on the
benchmark's own forgetting scale, where lower means more forgotten.

What each item gave along a run (`RunItems`) says which fronts other items would have given. Methods are compared on the
same items, and seeds may share items too (published benchmarks have one test set). So a resample is drawn for an item,
not for a run: how often it is drawn depends on the item and the resample alone, and every run that has the item draws
it as often. Counts are Poisson with mean 1 (Hanley and MacGibbon 2006; Chamandy et al. 2012), which is the bootstrap
for ratios of sums, without a number of items that has to be the same everywhere.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation.measurement import Measurement
from trace_jax.evaluation.probes import relative_likelihood
from trace_jax.io.codec import decode, encode
from trace_jax.unlearning.metrics import read_items

MEAN = "mean_utility"


@dataclasses.dataclass(frozen=True)
class UtilityScore:
    """A measurement that should stay high; `relative` ones are divided by the original model's value."""

    name: str
    relative: bool = False


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """Names of the measurements that methods are compared on, on one benchmark.

    Attributes:
      forgetting: lower means more forgotten.
      utilities: higher is better; 1 is the original model once relative ones are divided.
      questions: name of the accuracy measured on each subject's questions.
      chance: value of `forgetting` for a model that knows nothing, for the report; None where there is none.
    """

    forgetting: str
    utilities: tuple[UtilityScore, ...]
    questions: Mapping[str, str]
    chance: float | None = None


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
        return encode(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Front":
        """The inverse of `to_json`."""
        return decode(cls, plain)


def front_from_history(
    history: Iterable[tuple[int, Sequence[Measurement]]],
    *,
    board: Scoreboard,
    split: str,
    original: Mapping[str, float] | None = None,
) -> Front:
    """The front of a run from its evaluations.

    Args:
      history: (step, measurements) pairs; measurements of other splits are ignored, and so are names that not every
        point has.
      board, split: say which measurements are forgetting and utility.
      original: values of the original model that relative utilities are divided by; None: those of step 0.

    Raises:
      ValueError: a needed measurement is missing, or an original value is zero.
    """
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
            scale = original.get(score.name) if score.relative else 1.0
            if scale is None or not scale > 0:
                raise ValueError(
                    f"{score.name} of the original model is {scale}; a relative utility needs a positive value."
                )
            utilities[score.name] = measured[score.name] / scale
    if not utilities:
        raise ValueError(f"no utility was measured on {split}; expected one of {[u.name for u in board.utilities]}.")
    utilities[MEAN] = np.mean(list(utilities.values()), axis=0)
    steps = np.array([step for step, _ in points], np.int64)
    return Front(steps, measured[board.forgetting], utilities, measured)


def front_point(
    measurements: Sequence[Measurement], *, board: Scoreboard, split: str, original: Sequence[Measurement]
) -> tuple[float, float]:
    """(forgetting, mean utility) of one evaluation, as a front has them; `original`: those of the original model."""
    before = {m.name: m.value for m in original if m.split == split}
    front = front_from_history([(0, measurements)], board=board, split=split, original=before)
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
        return float(_interpolated(values[None], np.array([self.index]), np.array([self.share]))[0])


def crossing(front: Front, level: float) -> Crossing | None:
    """First time along training that forgetting <= level, linearly interpolated; None if it never happens."""
    reached, index, share = _crossings(front.forgetting[None], level)
    if not reached[0]:
        return None
    step = _interpolated(front.steps[None], index, share)[0]
    return Crossing(int(index[0]), float(share[0]), float(step))


def utility_at(front: Front, level: float, utility: str = MEAN) -> float | None:
    """Utility at the first crossing of a forgetting level; None if the run never forgets that much."""
    at = crossing(front, level)
    return None if at is None else at.value(front.utilities[utility])


def resampled_utility_at(forgetting: np.ndarray, utility: np.ndarray, level: float) -> np.ndarray:
    """Utility f64 [R] at the first crossing of a level by each of many fronts, forgetting and utility f64 [R, N].

    A front that stays above the level is read at its lowest evaluation.
    """
    _, index, share = _crossings(forgetting, level)
    return _interpolated(utility, index, share)


def _crossings(forgetting: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of fronts [R, N]: whether each reaches the level; index and share of its `Crossing`, or of its lowest point."""
    below = forgetting <= level
    reached = np.asarray(below.any(axis=1))
    index = np.where(reached, below.argmax(axis=1), forgetting.argmin(axis=1))
    rows, before = np.arange(len(index)), np.maximum(index - 1, 0)
    start, end = forgetting[rows, before], forgetting[rows, index]
    inside = reached & (index > 0)
    return reached, index, np.where(inside, (start - level) / np.where(inside, start - end, 1.0), 1.0)


def _interpolated(values: np.ndarray, index: np.ndarray, share: np.ndarray) -> np.ndarray:
    rows, before = np.arange(len(index)), np.maximum(index - 1, 0)
    return values[rows, before] * (1 - share) + values[rows, index] * share


def best_point(front: Front, level: float, utility: str = MEAN) -> int | None:
    """Index of the evaluation with the highest utility among those with forgetting <= level; None if there is none.

    A run that loses utility on its way to the level and regains it later is judged by what it regains. Choose on
    validation and read the test front at the same index, or the best of many noisy points is reported.
    """
    reached = np.flatnonzero(front.forgetting <= level)
    return int(reached[np.argmax(front.utilities[utility][reached])]) if len(reached) else None


def mean_difference(first: Front, second: Front, *, utility: str = MEAN) -> float | None:
    """Mean of utility_at(first) - utility_at(second) over the levels that both reach; None if there is no such range.

    The area between two fronts divided by its width. Exact: between two neighbouring levels of evaluation both curves
    are straight, so the midpoint rule has no error.
    """
    low = max(float(f.forgetting.min()) for f in (first, second))
    high = min(float(f.forgetting[0]) for f in (first, second))
    if not low < high:
        return None
    levels = np.unique(np.concatenate([first.forgetting, second.forgetting, [low, high]]))
    levels = levels[(levels >= low) & (levels <= high)]
    total = 0.0
    for left, right in itertools.pairwise(levels):
        ours, theirs = (utility_at(f, (left + right) / 2, utility) for f in (first, second))
        assert ours is not None and theirs is not None  # both reach every level above `low`
        total += (ours - theirs) * (right - left)
    return float(total / (high - low))


# --- what items gave


@dataclasses.dataclass(frozen=True)
class Series:
    """One score along a run as a ratio of sums over its items.

    Attributes:
      names: u32 [G], one for each item or group of items that is drawn as a whole.
      above: f64 [G, T], sum over the group at each evaluation.
      below: f64 [G], its share of the denominator: questions, or tokens.
      counts: i64 [G], items in the group.
      finish: what the ratio becomes: "share" as it is, "ratio" its exponential, "utility" that, at most 1.
    """

    names: np.ndarray
    above: np.ndarray
    below: np.ndarray
    counts: np.ndarray
    finish: str

    def values(self, draws: np.ndarray) -> np.ndarray:
        """The score f64 [R, T] on resamples that draw each group so often, f64 [R, G]."""
        ratio = draws @ self.above / (draws @ self.below)[:, None]
        if self.finish == "share":
            return ratio
        return np.exp(np.minimum(ratio, 0.0) if self.finish == "utility" else ratio)


class Draws:
    """How often each item is drawn in each of `resamples` resamples; the same for an item wherever it comes up."""

    def __init__(self, *, resamples: int, seed: int):
        self.resamples, self._seed = resamples, seed
        self._known: dict[int, np.ndarray] = {}

    def of(self, names: np.ndarray) -> np.ndarray:
        """f64 [R, G]. A resample that draws none of these items is the sample itself."""
        drawn = np.stack([self._item(int(name)) for name in names], axis=1)
        drawn[drawn.sum(axis=1) == 0] = 1.0
        return drawn

    def _item(self, name: int) -> np.ndarray:
        if name not in self._known:
            rng = np.random.default_rng((self._seed, name))
            self._known[name] = rng.poisson(1.0, self.resamples).astype(np.float64)
        return self._known[name]


@dataclasses.dataclass(frozen=True)
class RunItems:
    """What each item of one split gave along a run: the series of the forgetting score and of every utility."""

    steps: np.ndarray
    forgetting: Series
    utilities: Mapping[str, Series]
    relative: frozenset[str]

    def resampled(self, draws: Draws) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Forgetting and utilities f64 [R, T] on resampled items, as `front_from_history` makes them of the items."""
        forgetting = self.forgetting.values(draws.of(self.forgetting.names))
        utilities = {}
        for name, series in self.utilities.items():
            values = series.values(draws.of(series.names))
            with np.errstate(divide="ignore", invalid="ignore"):  # the original may have none of the drawn ones right
                utilities[name] = values / values[:, :1] if name in self.relative else values
        utilities[MEAN] = np.mean(list(utilities.values()), axis=0)
        return forgetting, utilities

    def counts(self, utility: str) -> dict[int, int]:
        """Items behind a utility, by the name of their group."""
        chosen = self.utilities.values() if utility == MEAN else (self.utilities[utility],)
        return {int(name): int(n) for s in chosen for name, n in zip(s.names, s.counts, strict=True)}


def load_run_items(directory: str | os.PathLike, front: Front, board: Scoreboard, *, split: str) -> RunItems | None:
    """The items behind a front; None where the run kept none, or not at every step of the front."""
    stored = read_items(directory)
    if stored is None:
        return None
    steps, items = stored
    at = np.searchsorted(steps, front.steps)
    if (at >= len(steps)).any() or (steps[at] != front.steps).any():
        return None
    by_subject: dict[str, dict[str, np.ndarray]] = {}
    for path, values in items.items():
        part, subject, name = path.split("/")
        if part == split:
            by_subject.setdefault(subject, {})[name] = values[at]
    series = {}
    for subject, columns in by_subject.items():  # [T, N]
        if "correct" in columns:
            name, correct = board.questions.get(subject, f"{subject}_accuracy"), columns["correct"].astype(np.float64)
            series[name] = _grouped(columns["question"][0], correct, np.ones(correct.shape[1]), "share")
        if "original" in columns and columns["tokens"][0].any():
            gain, tokens = columns["original"].astype(np.float64) - columns["nll"], columns["tokens"][0]
            finish = "ratio" if subject == "forget" else "utility"
            name = relative_likelihood(subject)
            series[name] = _grouped(columns["row"][0], gain, tokens.astype(np.float64), finish)
    utilities = {u.name: series[u.name] for u in board.utilities if u.name in series}
    if board.forgetting not in series or set(utilities) != set(front.utilities) - {MEAN}:
        return None
    relative = frozenset(u.name for u in board.utilities if u.relative)
    return RunItems(front.steps, series[board.forgetting], utilities, relative)


def _grouped(names: np.ndarray, above: np.ndarray, below: np.ndarray, finish: str) -> Series:
    scored = below > 0  # a row of which nothing is scored is no item
    names, group, counts = np.unique(names[scored], return_inverse=True, return_counts=True)
    member = (np.arange(len(names))[:, None] == group).astype(np.float64)  # [G, N]
    return Series(names, member @ above[:, scored].T, member @ below[scored], counts, finish)
