"""Fronts: utility against forgetting along a run, and what is read off them at a level of forgetting.

What each item gave along a run (`RunItems`) says which fronts other items would have given. Methods are compared on the
same items, and seeds may share items too. So a resample is drawn for an item, not for a run: every run that has the
item draws it as often. Counts are Poisson with mean 1 (Hanley and MacGibbon 2006; Chamandy et al. 2012), which is the
bootstrap for ratios of sums, without a number of items that has to be the same everywhere.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy

from trace_jax.evaluation.intervals import Measurement
from trace_jax.evaluation.probes import relative_likelihood
from trace_jax.evaluation.task import Scoreboard
from trace_jax.unlearning.metrics import read_items

MEAN, FORGETTING = "mean_utility", "forgetting"


@dataclasses.dataclass(frozen=True)
class Front:
    """One run on one split, point by point along training."""

    steps: np.ndarray  # i64 [N], increasing
    forgetting: np.ndarray  # f64 [N], lower means more forgotten
    utilities: Mapping[str, np.ndarray]  # f64 [N]; 1 is the original model; "mean_utility" is the mean of the others
    measured: Mapping[str, np.ndarray]  # f64 [N], every value as it was measured, not divided by the original's

    def __post_init__(self):
        for name, values in {"forgetting": self.forgetting, **self.utilities, **self.measured}.items():
            if len(values) != len(self.steps) or not np.isfinite(values).all():
                raise ValueError(f"{name} of a front needs one finite value per step; got {values} for {self.steps}.")
        if not len(self.steps) or (np.diff(self.steps) <= 0).any():
            raise ValueError(f"a front needs at least one point and increasing steps; got {self.steps}.")


def front_from_history(
    history: Iterable[tuple[int, Sequence[Measurement]]],
    *,
    board: Scoreboard,
    split: str,
    original: Mapping[str, float] | None = None,
) -> Front:
    """The front of a run from the (step, measurements) of its evaluations; names that not every point has are left out.

    `original`: values that relative utilities are divided by; None: those of step 0.
    """
    points = {step: {m.name: m.value for m in ms if m.split == split} for step, ms in history}
    steps = sorted(points)
    original = points[steps[0]] if original is None else original
    names = [name for name in points[steps[0]] if all(name in values for values in points.values())]
    if board.forgetting not in names:
        raise ValueError(f"{board.forgetting} was not measured on {split} at every evaluation; measured: {names}.")
    measured = {name: np.array([points[step][name] for step in steps], np.float64) for name in names}
    utilities = {}
    for name, relative in board.utilities.items():
        if name in measured:
            scale = original.get(name) if relative else 1.0
            if scale is None or not scale > 0:
                raise ValueError(f"{name} of the original model is {scale}; a relative utility needs a positive value.")
            utilities[name] = measured[name] / scale
    if not utilities:
        raise ValueError(f"no utility was measured on {split}; expected one of {list(board.utilities)}.")
    utilities[MEAN] = np.mean(list(utilities.values()), axis=0)
    return Front(np.array(steps, np.int64), measured[board.forgetting], utilities, measured)


def crossings(forgetting: np.ndarray, level: float) -> Callable[[np.ndarray], np.ndarray]:
    """What reads values f64 [R, N] of R fronts where each first comes down to a level: f64 [R], linearly interpolated.

    A front that stays above the level, forgetting f64 [R, N], is read at its lowest evaluation.
    """
    below = forgetting <= level
    reached = np.asarray(below.any(axis=1))
    index = np.where(reached, below.argmax(axis=1), forgetting.argmin(axis=1))
    rows, before = np.arange(len(index)), np.maximum(index - 1, 0)
    start, end = forgetting[rows, before], forgetting[rows, index]
    inside = reached & (index > 0)
    share = np.where(inside, (start - level) / np.where(inside, start - end, 1.0), 1.0)
    return lambda values: values[rows, before] * (1 - share) + values[rows, index] * share


def bracket(forgetting: np.ndarray, level: float) -> float:
    """How far apart in forgetting the two evaluations are that a front, forgetting f64 [N], is read between there."""
    index = int(np.argmax(forgetting <= level))
    return float(forgetting[index - 1] - forgetting[index]) if index and forgetting[index] < level else 0.0


def mean_difference(first: Front, second: Front) -> float | None:
    """Mean difference of mean utility over the forgetting levels that both reach; None if there is no such range.

    Exact: between two neighbouring levels of evaluation both curves are straight, so the midpoint rule has no error.
    """
    fronts = first, second
    low, high = max(f.forgetting.min() for f in fronts), min(f.forgetting[0] for f in fronts)
    if not low < high:
        return None
    levels = np.unique(np.concatenate([first.forgetting, second.forgetting, [low, high]]))
    levels = levels[(levels >= low) & (levels <= high)]
    total = 0.0
    for left, right in itertools.pairwise(levels):
        ours, theirs = (crossings(f.forgetting[None], (left + right) / 2)(f.utilities[MEAN][None])[0] for f in fronts)
        total += (ours - theirs) * (right - left)
    return float(total / (high - low))


# --- what items gave

Draws = Callable[[np.ndarray], np.ndarray]  # names [G] -> how often each is drawn in each of R resamples, f64 [R, G]


def make_draws(*, resamples: int, seed: int) -> Draws:
    """The draws of items, the same for an item wherever it comes up; where none would be drawn, all are."""

    @functools.cache
    def of_item(name: int) -> np.ndarray:
        return np.random.default_rng((seed, name)).poisson(1.0, resamples).astype(np.float64)

    def draws(names: np.ndarray) -> np.ndarray:
        drawn = np.stack([of_item(int(name)) for name in names], axis=1)
        drawn[drawn.sum(axis=1) == 0] = 1.0
        return drawn

    return draws


@dataclasses.dataclass(frozen=True)
class Series:
    """One score along a run as a ratio of sums over its items.

    `finish`: what the ratio becomes: "share" as it is, "ratio" its exponential, "utility" that, at most 1. With "ks" it
    is no ratio, but the Kolmogorov-Smirnov statistic of `above` against `below`.
    """

    names: np.ndarray  # u32 [G], one for each item or group of items that is drawn as a whole
    above: np.ndarray  # f64 [G, T], sum over the group at each evaluation
    below: np.ndarray  # f64 [G], its share of the denominator: questions, or tokens
    counts: np.ndarray  # i64 [G], items in the group
    finish: str

    def values(self, draws: Draws) -> np.ndarray:
        """The score f64 [R, T] on the resamples."""
        counts = draws(self.names)
        if self.finish == "ks":
            return np.stack([ks_statistic(own, self.below, counts) for own in self.above.T], axis=1)
        ratio = counts @ self.above / (counts @ self.below)[:, None]
        if self.finish == "share":
            return ratio
        return np.exp(np.minimum(ratio, 0.0) if self.finish == "utility" else ratio)


@dataclasses.dataclass(frozen=True)
class RunItems:
    """What each item of one split gave along a run: the series of the forgetting score and of every utility."""

    forgetting: Series
    utilities: Mapping[str, Sequence[Series]]  # of several the harmonic mean
    relative: Mapping[str, bool]  # utilities that are divided by those of the first evaluation

    def resampled(self, draws: Draws) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Forgetting and utilities f64 [R, T] on resampled items, as `front_from_history` makes them of the items."""
        utilities = {}
        for name, several in self.utilities.items():
            values = [series.values(draws) for series in several]
            with np.errstate(divide="ignore", invalid="ignore"):  # the original may have none of the drawn ones right
                mean = values[0] if len(values) == 1 else scipy.stats.hmean(values)
                utilities[name] = mean / mean[:, :1] if self.relative[name] else mean
        utilities[MEAN] = np.mean(list(utilities.values()), axis=0)
        return self.forgetting.values(draws), utilities

    def counts(self, score: str) -> dict[int, int]:
        """Items behind a utility or the forgetting score, by the name of their group."""
        series = {**self.utilities, FORGETTING: [self.forgetting]}
        chosen = self.utilities.values() if score == MEAN else (series[score],)
        return {int(name): int(n) for own in chosen for s in own for name, n in zip(s.names, s.counts, strict=True)}


def ks_statistic(values: np.ndarray, others: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Largest distance, [R], of the distribution functions of values and others [G], both drawn counts [R, G] times."""
    both = np.concatenate([values, others])
    order = np.argsort(both, kind="stable")
    last = np.append(np.diff(both[order]) > 0, True)  # of equal ones
    distance = np.cumsum(np.concatenate([counts, -counts], axis=1)[:, order], axis=1)[:, last]
    return np.abs(distance).max(axis=1) / counts.sum(axis=1)


def load_run_items(directory: str | os.PathLike, front: Front, board: Scoreboard) -> RunItems | None:
    """The items behind a front on test; None where the run kept none, or not at every step of the front."""
    steps, items = read_items(directory)
    if not np.isin(front.steps, steps).all():
        return None
    series = board_series({name: values[np.searchsorted(steps, front.steps)] for name, values in items.items()}, board)
    utilities = {name: series[name] for name in board.utilities if name in series}
    if board.forgetting not in series or set(utilities) != set(front.utilities) - {MEAN}:
        return None
    return RunItems(series[board.forgetting][0], utilities, board.utilities)


def board_series(items: Mapping[str, np.ndarray], board: Scoreboard) -> dict[str, list[Series]]:
    """The scores that items of the test split give, by name; `Task.outcomes` of T evaluations, arrays [T, N]."""
    by_subject: dict[str, dict[str, np.ndarray]] = {}
    for path, values in items.items():
        split, subject, name = path.split("/")
        if split == "test":
            by_subject.setdefault(subject, {})[name] = values
    series: dict[str, list[Series]] = {}
    for subject, columns in by_subject.items():  # [T, N]
        score = columns.get("score", columns.get("correct"))
        if "reference" in columns and score is not None:
            about = columns["question"][0], score.T, columns["reference"][0], np.ones(score.shape[1], int), "ks"
            series[board.questions.get(subject, subject)] = [Series(*about)]
        elif score is not None:
            score, name = score.astype(np.float64), board.questions.get(subject, f"{subject}_accuracy")
            one = _grouped(columns["question"][0], score, np.ones(score.shape[1]), "share")
            series.setdefault(name, []).append(one)
        if "original" in columns and columns["tokens"][0].any():
            gain, tokens = columns["original"].astype(np.float64) - columns["nll"], columns["tokens"][0]
            about = columns["row"][0], gain, tokens.astype(np.float64), "ratio" if subject == "forget" else "utility"
            series[relative_likelihood(subject)] = [_grouped(*about)]
    return series


def _grouped(names: np.ndarray, above: np.ndarray, below: np.ndarray, finish: str) -> Series:
    scored = below > 0  # a row of which nothing is scored is no item
    names, group, counts = np.unique(names[scored], return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), len(above)))
    np.add.at(sums, group, above[:, scored].T)
    return Series(names, sums, np.bincount(group, below[scored], len(names)), counts, finish)
