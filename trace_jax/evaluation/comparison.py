"""Comparing methods fairly: equal budgets, settings chosen on validation, numbers reported on test.

For every method and forgetting level the setting (such as alpha) with the best mean validation utility over seeds is
chosen, and its test utility is reported, next to the gain over a baseline paired by seed and item. Intervals are over
seeds and items: where a run comes down to the level is estimated from its items, so it
is found anew on every resample of them; the setting stays.
"""

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from trace_jax.evaluation.fronts import (
    MEAN,
    Draws,
    Front,
    RunItems,
    crossings,
    make_draws,
    mean_difference,
)
from trace_jax.evaluation.intervals import Interval, seeds_and_items, t_interval

READINGS = ("first", "best")


class UnequalBudget(ValueError):
    """Methods were given different numbers of tuning runs, seeds or steps."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One unlearning run of a study: `setting` names the tuned values, such as "alpha=16".

    `items`: what each item of the test split gave, where that was kept.
    """

    method: str
    setting: str
    seed: int
    validation: Front
    test: Front
    items: RunItems | None = None


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """A method at one forgetting level, on test.

    Attributes:
      method, setting: the setting chosen on validation.
      settings: how many were tried.
      seeds: seeds that reached the level on test; only these are averaged. `missed`: those that did not.
      utilities: mean over seeds with its interval, per utility; empty if no seed reached the level.
      gains: relative gain over the baseline, utility / baseline - 1, paired by seed and item; likewise.
      over_seeds: {"utilities", "gains"}, the same with Student's intervals over seeds.
      area: how much higher the mean utility is than the baseline's on average over the forgetting levels that both
        reach (`mean_difference`), paired by seed, with Student's interval; None where no seed has such a range.
    """

    method: str
    setting: str
    settings: int
    seeds: tuple[int, ...]
    missed: tuple[int, ...]
    utilities: Mapping[str, Interval]
    gains: Mapping[str, Interval]
    over_seeds: Mapping[str, Mapping[str, Interval]]
    area: Interval | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods at one forgetting level; `exempt` methods had a budget of their own.

    `reading` says which point of a run counts (see `compare`), and `over` what the intervals are over: "seeds and
    items" (`seeds_and_items`; their n counts items), "items" where there is one seed, or "seeds" (Student's; n counts
    seeds) where a run kept no items.
    """

    level: float
    reading: str
    over: str
    baseline: str
    exempt: tuple[str, ...]
    results: tuple[MethodResult, ...]


def check_equal_budgets(runs: Sequence[Run], *, exempt: Collection[str] = ()) -> None:
    """Every method has the same number of settings, the same seeds for each of them, and the same number of steps.

    Args:
      runs: all runs that are compared.
      exempt: methods that are labelled as having another budget, such as "uniform_2x"; they are checked against
        nothing but themselves (every setting with the same seeds).

    Raises:
      UnequalBudget: what differs, for which methods.
      ValueError: two runs have the same method, setting and seed.
    """
    seeds, steps = collections.defaultdict(lambda: collections.defaultdict(list)), collections.defaultdict(int)
    for run in runs:
        seeds[run.method][run.setting].append(run.seed)
        steps[run.method] = max(steps[run.method], int(run.test.steps[-1]))  # a run that diverged ends early
    budgets = {}
    for method, by_setting in seeds.items():
        for setting, used in by_setting.items():
            if len(set(used)) != len(used):
                raise ValueError(f"{method} with {setting} was run twice with one seed: seeds {sorted(used)}.")
        distinct = {tuple(sorted(used)) for used in by_setting.values()}
        if len(distinct) > 1:
            listed = "; ".join(f"{setting}: {sorted(used)}" for setting, used in by_setting.items())
            raise UnequalBudget(f"the settings of {method} were run with different seeds: {listed}.")
        if method not in exempt:
            budgets[method] = (len(by_setting), distinct.pop(), steps[method])
    if len(set(budgets.values())) > 1:
        lines = "; ".join(f"{m}: {n} settings, seeds {list(s)}, {t} steps" for m, (n, s, t) in budgets.items())
        raise UnequalBudget(
            f"the methods had unequal budgets, so a comparison would not be fair ({lines}). Run the missing ones, or "
            "label a method as exempt where the difference is the point."
        )


def choose_setting(runs: Sequence[Run], *, level: float, reading: str = "first") -> str:
    """The setting of one method with the best validation utility at a forgetting level (`reading` as in `compare`).

    Settings that reach the level with more seeds come first, then the higher mean over those seeds; of equal ones the
    first in `runs`.
    """

    def quality(setting: str) -> tuple[int, float]:
        reached = []
        for front in (run.validation for run in runs if run.setting == setting):
            if read := _reader(front, front, level, reading):
                reached.append(read(front.forgetting[None], front.utilities[MEAN][None])[0])
        return len(reached), float(np.mean(reached)) if reached else -math.inf

    return max(dict.fromkeys(run.setting for run in runs), key=quality)


def compare(
    runs: Sequence[Run],
    *,
    level: float,
    baseline: str = "uniform",
    exempt: Collection[str] = (),
    reading: str = "first",
    resamples: int = 1000,
) -> Comparison:
    """All methods of a study at one forgetting level, each with its best setting, against a tuned baseline.

    Args:
      runs: every run of the study; methods appear in the result in the order of their first run.
      level: forgetting level on the benchmark's scale.
      baseline: method that gains are relative to.
      exempt: methods with a budget of their own (see `check_equal_budgets`).
      reading: "first" reads a run where it first comes down to the level, interpolated; "best" reads it at the
        evaluation with the best validation utility among those at or below the level on validation, so that a run that
        loses utility on its way and regains it is judged by what it regains, and not by the best of noisy test points.
      resamples: of the items of every run.
    """
    check_equal_budgets(runs, exempt=exempt)
    by_method = collections.defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    if baseline not in by_method:
        raise ValueError(f"the baseline {baseline!r} was not run; there are {', '.join(by_method)}.")
    has_items = all(run.items is not None for run in runs)
    over = "seeds" if not has_items else "seeds and items" if len({run.seed for run in runs}) > 1 else "items"
    draws = make_draws(resamples=resamples, seed=0) if has_items else None
    chosen, readings = {}, {}
    for method, group in by_method.items():
        setting = choose_setting(group, level=level, reading=reading)
        chosen[method] = {run.seed: run for run in group if run.setting == setting}
        readers = {s: _reader(run.validation, run.test, level, reading) for s, run in chosen[method].items()}
        readings[method] = {s: _read(chosen[method][s], read, draws) for s, read in readers.items() if read}
    results = []
    for method, group in by_method.items():
        reached, runs_of, others = readings[method], chosen[method], readings[baseline]
        gains = {seed: _gains(ours, others[seed]) for seed, ours in reached.items() if seed in others}
        items = {seed: run.items for seed, run in runs_of.items() if run.items and has_items}
        pairs = [(run.test, chosen[baseline][seed].test) for seed, run in runs_of.items() if seed in chosen[baseline]]
        areas = [area for area in (mean_difference(*pair) for pair in pairs) if area is not None]
        results.append(
            MethodResult(
                method=method,
                setting=next(iter(runs_of.values())).setting,
                settings=len({run.setting for run in group}),
                seeds=tuple(sorted(reached)),
                missed=tuple(sorted({run.seed for run in group} - set(reached))),
                utilities=_combined(reached, items),
                gains=_combined(gains, items),
                over_seeds={"utilities": _combined(reached, {}), "gains": _combined(gains, {})},
                area=t_interval(np.array(areas)) if areas else None,
            )
        )
    return Comparison(level, reading, over, baseline, tuple(m for m in by_method if m in exempt), tuple(results))


Reader = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Values of one seed by name, f64 [1 + R]: first of the items as they are, then of the resamples (R = 0: none).
Reading = Mapping[str, np.ndarray]


def _reader(validation: Front, test: Front, level: float, reading: str) -> Reader | None:
    """What reads utilities f64 [R] off forgetting and utility [R, N] of a run; None if it doesn't reach the level."""
    if reading == "first":
        return (lambda f, u: crossings(f, level)(u)) if test.forgetting.min() <= level else None
    reached = np.flatnonzero(validation.forgetting <= level)
    if not len(reached):
        return None
    best = reached[np.argmax(validation.utilities[MEAN][reached])]
    return lambda forgetting, utility: utility[:, best]


def _read(run: Run, read: Reader, draws: Draws | None) -> Reading:
    values = {name: read(run.test.forgetting[None], u[None]) for name, u in run.test.utilities.items()}
    if run.items is None or draws is None:
        return values
    forgetting, utilities = run.items.resampled(draws)
    return {name: np.concatenate([v, read(forgetting, utilities[name])]) for name, v in values.items()}


def _gains(ours: Reading, baseline: Reading) -> Reading:
    """ours / baseline - 1, of utilities that the baseline has anything left of."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample on which the baseline has nothing left
        return {name: v / baseline[name] - 1 for name, v in ours.items() if baseline[name][0] > 0}


def _combined(readings: Mapping[int, Reading], items: Mapping[int, RunItems]) -> dict[str, Interval]:
    """Means over seeds with intervals over seeds and items; with Student's over seeds alone if there are no items."""
    combined = {}
    for name in dict.fromkeys(name for reading in readings.values() for name in reading):
        having = [seed for seed, reading in readings.items() if name in reading]
        values = np.stack([readings[seed][name] for seed in having], axis=1)  # [1 + R, S]
        if items:
            counts = functools.reduce(operator.or_, (items[seed].counts(name) for seed in having))  # shared ones once
            combined[name] = seeds_and_items(values[0], values[1:], sum(counts.values()))
        else:
            combined[name] = t_interval(values[0])
    return combined
