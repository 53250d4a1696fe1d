"""Comparing methods fairly: equal budgets, settings chosen on validation, numbers reported on test.

For every method and forgetting level the setting (such as alpha) with the best mean validation utility over seeds is
chosen, and its test utility is reported over seeds, next to the gain over a baseline paired by seed.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation.fronts import MEAN, Front, area_between, best_point, utility_at
from trace_jax.evaluation.intervals import Interval, t_interval

READINGS = ("first", "best")


class UnequalBudget(ValueError):
    """Methods were given different numbers of tuning runs, seeds or steps."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One unlearning run of a study: `setting` names the tuned values, such as "alpha=16"."""

    method: str
    setting: str
    seed: int
    validation: Front
    test: Front


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """A method at one forgetting level, on test.

    Attributes:
      method, setting: the setting chosen on validation.
      settings: how many were tried.
      seeds: seeds that reached the level on test; only these are averaged. `missed`: those that did not.
      utilities: mean over seeds with Student's interval, per utility; empty if no seed reached the level.
      gains: relative gain over the baseline, utility / baseline - 1, paired by seed; likewise.
      area: how much higher the mean utility is than the baseline's on average over the forgetting levels that both
        reach (`area_between`), paired by seed; None where no seed has such a range.
    """

    method: str
    setting: str
    settings: int
    seeds: tuple[int, ...]
    missed: tuple[int, ...]
    utilities: Mapping[str, Interval]
    gains: Mapping[str, Interval]
    area: Interval | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods at one forgetting level; `exempt` methods had a budget of their own.

    `reading` says which point of a run counts (see `compare`).
    """

    level: float
    reading: str
    baseline: str
    exempt: tuple[str, ...]
    results: tuple[MethodResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dict that `json.dumps` takes; NaN becomes None."""
        text = json.dumps(dataclasses.asdict(self), default=dict)
        return json.loads(text, parse_constant=lambda _: None)


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
            raise UnequalBudget(f"the settings of {method} were run with different seeds: {_by_key(by_setting)}.")
        if method not in exempt:
            budgets[method] = (len(by_setting), distinct.pop(), steps[method])
    if len(set(budgets.values())) > 1:
        lines = "; ".join(f"{m}: {n} settings, seeds {list(s)}, {t} steps" for m, (n, s, t) in budgets.items())
        raise UnequalBudget(
            f"the methods had unequal budgets, so a comparison would not be fair ({lines}). Run the missing ones, or "
            "label a method as exempt where the difference is the point."
        )


def choose_setting(runs: Sequence[Run], *, level: float, utility: str = MEAN, reading: str = "first") -> str:
    """The setting of one method with the best validation utility at a forgetting level (`reading` as in `compare`).

    Settings that reach the level with more seeds come first, then the higher mean over those seeds; of equal ones the
    first in `runs`.
    """
    methods = {run.method for run in runs}
    if len(methods) != 1:
        raise ValueError(f"settings are chosen per method; got runs of {sorted(methods)}.")

    def quality(setting: str) -> tuple[int, float]:
        chosen = [run.validation for run in runs if run.setting == setting]
        if reading == "first":
            values = [utility_at(front, level, utility) for front in chosen]
        else:
            points = [(front, best_point(front, level, utility)) for front in chosen]
            values = [None if i is None else float(front.utilities[utility][i]) for front, i in points]
        reached = [v for v in values if v is not None]
        return len(reached), float(np.mean(reached)) if reached else -math.inf

    return max(dict.fromkeys(run.setting for run in runs), key=quality)


def compare(
    runs: Sequence[Run],
    *,
    level: float,
    baseline: str = "uniform",
    exempt: Collection[str] = (),
    choose_by: str = MEAN,
    reading: str = "first",
) -> Comparison:
    """All methods of a study at one forgetting level, each with its best setting, against a tuned baseline.

    Args:
      runs: every run of the study; methods appear in the result in the order of their first run.
      level: forgetting level on the benchmark's scale.
      baseline: method that gains are relative to.
      exempt: methods with a budget of their own (see `check_equal_budgets`).
      choose_by: validation utility by which settings are chosen.
      reading: "first" reads a run where it first comes down to the level, interpolated; "best" reads it at the
        evaluation with the best validation utility among those at or below the level on validation.

    Raises:
      UnequalBudget: see `check_equal_budgets`.
    """
    check_equal_budgets(runs, exempt=exempt)
    by_method = collections.defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    if baseline not in by_method:
        raise ValueError(f"the baseline {baseline!r} was not run; there are {', '.join(by_method)}.")
    if reading not in READINGS:
        raise ValueError(f"reading is {reading!r}; expected one of {', '.join(READINGS)}.")
    chosen = {m: choose_setting(g, level=level, utility=choose_by, reading=reading) for m, g in by_method.items()}
    at_level = {m: _test_utilities(g, chosen[m], level, choose_by, reading) for m, g in by_method.items()}
    results = []
    for method, group in by_method.items():
        reached, all_seeds = at_level[method], sorted({run.seed for run in group})
        results.append(
            MethodResult(
                method=method,
                setting=chosen[method],
                settings=len({run.setting for run in group}),
                seeds=tuple(sorted(reached)),
                missed=tuple(s for s in all_seeds if s not in reached),
                utilities=_over_seeds(reached),
                gains=_over_seeds(_relative_gains(reached, at_level[baseline])),
                area=_mean_area(group, chosen[method], by_method[baseline], chosen[baseline]),
            )
        )
    return Comparison(level, reading, baseline, tuple(m for m in by_method if m in exempt), tuple(results))


Utilities = dict[int, dict[str, float]]  # per seed, per name


def _test_utilities(runs: Sequence[Run], setting: str, level: float, choose_by: str, reading: str) -> Utilities:
    found: Utilities = {}
    for run in runs:
        if run.setting != setting:
            continue
        if reading == "first":
            values = {name: utility_at(run.test, level, name) for name in run.test.utilities}
        else:
            index = best_point(run.validation, level, choose_by)
            values = {n: None if index is None else float(v[index]) for n, v in run.test.utilities.items()}
        if all(value is not None for value in values.values()):
            found[run.seed] = {name: value for name, value in values.items() if value is not None}
    return found


def _relative_gains(ours: Utilities, baseline: Utilities) -> Utilities:
    return {
        seed: {name: value / baseline[seed][name] - 1 for name, value in values.items() if baseline[seed][name] > 0}
        for seed, values in ours.items()
        if seed in baseline
    }


def _mean_area(
    runs: Sequence[Run], setting: str, baseline_runs: Sequence[Run], baseline_setting: str
) -> Interval | None:
    baseline = {run.seed: run.test for run in baseline_runs if run.setting == baseline_setting}
    pairs = [(run.test, baseline[run.seed]) for run in runs if run.setting == setting and run.seed in baseline]
    areas = [area for area in (area_between(ours, theirs) for ours, theirs in pairs) if area is not None]
    return t_interval(np.array([area.mean_difference for area in areas])) if areas else None


def _over_seeds(values: Utilities) -> dict[str, Interval]:
    names = dict.fromkeys(name for by_name in values.values() for name in by_name)
    return {n: t_interval(np.array([v[n] for v in values.values() if n in v])) for n in names}


def _by_key(by_setting: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{setting}: {sorted(used)}" for setting, used in by_setting.items())
