"""Comparing methods fairly: equal budgets, settings chosen on validation, numbers reported on test.

For every method and forgetting level the setting (such as alpha) with the best mean validation utility over seeds is
chosen, on the seeds that are reported or on others, and its test utility is reported, next to the gain over a baseline
paired by seed and item. Intervals are over seeds and items: where a run comes down to the level is read anew on every
resample of its items; the setting stays.
"""

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trace_jax.evaluation import fronts
from trace_jax.evaluation.fronts import FORGETTING, MEAN, Draws, Front, RunItems
from trace_jax.evaluation.intervals import Interval, seeds_and_items, t_interval
from trace_jax.evaluation.task import Scoreboard
from trace_jax.io.files import encode

READINGS = ("first", "best")


@dataclasses.dataclass(frozen=True)
class Run:
    """One unlearning run of a study."""

    method: str
    setting: str  # names the tuned values, such as "alpha=16"
    seed: int
    validation: Front
    test: Front
    items: RunItems | None = None  # of the test split, where they were kept


SPARE = 0.2  # of the level, which a setting for fresh seeds must come down by more


class Tried(NamedTuple):
    """What validation says of a setting at a level."""

    reached: int  # seeds that came down to it, or as far below as was asked
    utility: float  # mean utility of those that came down to it; NaN if there are none


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """A method at one forgetting level, on test: means over the seeds that reached it, with intervals."""

    method: str
    setting: str  # chosen on validation
    tried: Mapping[str, Tried]  # by setting
    seeds: tuple[int, ...]  # that reached the level
    missed: tuple[int, ...]  # those that did not
    utilities: Mapping[str, Interval]  # empty if no seed reached the level
    gains: Mapping[str, Interval]  # utility / baseline - 1, paired by seed and item; likewise
    over_seeds: Mapping[str, Mapping[str, Interval]]  # "utilities" and "gains" with Student's intervals over seeds
    area: Interval | None  # `fronts.mean_difference` to the baseline, paired by seed, with Student's interval
    bracket: float | None = (
        None  # widest forgetting between two evaluations that "first" interpolates between, any seed
    )
    forgetting: Interval | None = None  # of reading "best" on test, where it may be off the level that validation met


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods at one forgetting level.

    `over`: what the intervals are over, "seeds and items" (`seeds_and_items`; their n counts items), "items" where
    there is one seed, or "seeds" (Student's; n counts seeds) where a run kept no items.
    """

    level: float
    reading: str  # which point of a run counts (`compare`)
    over: str
    baseline: str
    exempt: tuple[str, ...]  # methods that had a budget of their own
    results: tuple[MethodResult, ...]
    tuning_seeds: tuple[int, ...] = ()  # that settings were chosen on; none: those that are reported


def check_equal_budgets(runs: Sequence[Run], *, exempt: Collection[str] = ()) -> None:
    """Every method has the same number of settings, the same seeds for each of them, and the same number of steps.

    Methods that are `exempt`, such as "uniform_2x", only have the same seeds for every setting.
    """
    budgets = {}
    for method in dict.fromkeys(run.method for run in runs):
        own, seeds = [run for run in runs if run.method == method], collections.defaultdict(list)
        for run in own:
            seeds[run.setting].append(run.seed)
        for setting, used in seeds.items():
            if len(set(used)) != len(used):
                raise ValueError(f"{method} with {setting} was run twice with one seed: seeds {sorted(used)}.")
        distinct = {tuple(sorted(used)) for used in seeds.values()}
        if len(distinct) > 1:
            listed = "; ".join(f"{setting}: {sorted(used)}" for setting, used in seeds.items())
            raise ValueError(f"the settings of {method} were run with different seeds: {listed}.")
        if method not in exempt:  # a run that diverged ends early
            budgets[method] = len(seeds), distinct.pop(), max(int(run.test.steps[-1]) for run in own)
    if len(set(budgets.values())) > 1:
        lines = "; ".join(f"{m}: {n} settings, seeds {list(s)}, {t} steps" for m, (n, s, t) in budgets.items())
        about = f"the methods had unequal budgets, so a comparison would not be fair ({lines})"
        raise ValueError(
            f"{about}. Run the missing ones, or label a method as exempt where the difference is the point."
        )


def try_settings(runs: Sequence[Run], *, level: float, reading: str = "first", fresh: bool = False) -> dict[str, Tried]:
    """What the settings of one method give on validation at a forgetting level (`reading` as in `compare`). Chosen for
    `fresh` seeds, a setting has to come down by `SPARE` of the level more: the best is often the slowest that just
    reached it, and misses it elsewhere.
    """
    to = level * (1 - SPARE * fresh)
    tried = {}
    for setting in dict.fromkeys(run.setting for run in runs):
        validated = [dataclasses.replace(run, test=run.validation) for run in runs if run.setting == setting]
        reached = [values[MEAN][0] for run in validated if (values := _read(run, level, reading)) is not None]
        count = sum(run.validation.forgetting.min() <= to for run in validated)
        tried[setting] = Tried(int(count), float(np.mean(reached)) if reached else math.nan)
    return tried


def choose_setting(tried: Mapping[str, Tried]) -> str:
    """More seeds that reach the level count first, then the utility; of equal settings the first."""
    return max(tried, key=lambda setting: (tried[setting].reached, np.nan_to_num(tried[setting].utility, nan=-np.inf)))


def compare(
    runs: Sequence[Run],
    *,
    level: float,
    tuning: Sequence[Run] = (),
    baseline: str = "uniform",
    exempt: Collection[str] = (),
    reading: str = "first",
    resamples: int = 1000,
) -> Comparison:
    """All methods of a study at one forgetting level, each with its best setting, against a tuned baseline.

    Reading "first" reads a run where it first comes down to the level, interpolated; "best" reads it at the evaluation
    with the best validation utility among those at or below the level on validation, so that a run that loses utility
    on its way and regains it is judged by what it regains, and not by the best of noisy test points.

    `tuning`: runs of other seeds, on which the settings are chosen; of `runs` those with a chosen setting count then.
    """
    check_equal_budgets(tuning or runs, exempt=exempt)
    by_method = collections.defaultdict(list)
    for run in tuning or runs:
        by_method[run.method].append(run)
    about: Any = {"level": level, "reading": reading, "fresh": bool(tuning)}
    tried = {method: try_settings(group, **about) for method, group in by_method.items()}
    settings = {method: choose_setting(of_method) for method, of_method in tried.items()}
    runs = [run for run in runs if run.setting == settings[run.method]]
    if len({tuple(sorted(run.seed for run in runs if run.method == method)) for method in settings}) > 1:
        raise ValueError("the methods were not run with the same seeds in the settings that were chosen.")
    if baseline not in settings:
        raise ValueError(f"the baseline {baseline!r} was not run; there are {', '.join(settings)}.")
    has_items = all(run.items is not None for run in runs)
    over = ("seeds and items" if len({run.seed for run in runs}) > 1 else "items") if has_items else "seeds"
    draws = fronts.make_draws(resamples=resamples, seed=0) if has_items else None
    chosen, readings, forgetting = {}, {}, {}
    for method in settings:
        chosen[method] = {run.seed: run for run in runs if run.method == method}
        values = {seed: _read(run, level, reading, draws) for seed, run in chosen[method].items()}
        readings[method] = {seed: value for seed, value in values.items() if value is not None}
        forgetting[method] = {seed: {FORGETTING: value.pop(FORGETTING)} for seed, value in readings[method].items()}
    results = []
    for method, setting in settings.items():
        reached, runs_of, others = readings[method], chosen[method], readings[baseline]
        gains = {seed: _gains(ours, others[seed]) for seed, ours in reached.items() if seed in others}
        items = {seed: run.items for seed, run in runs_of.items() if run.items and has_items}
        pairs = [(run.test, chosen[baseline][seed].test) for seed, run in runs_of.items() if seed in chosen[baseline]]
        brackets = [fronts.bracket(runs_of[seed].test.forgetting, level) for seed in reached]
        areas = [area for area in (fronts.mean_difference(*pair) for pair in pairs) if area is not None]
        results.append(
            MethodResult(
                method=method,
                setting=setting,
                tried=tried[method],
                seeds=tuple(sorted(reached)),
                missed=tuple(sorted(runs_of.keys() - reached.keys())),
                utilities=_combined(reached, items),
                gains=_combined(gains, items),
                over_seeds={"utilities": _combined(reached, {}), "gains": _combined(gains, {})},
                area=t_interval(np.array(areas)) if areas else None,
                bracket=max(brackets, default=None) if reading == "first" else None,
                forgetting=_combined(forgetting[method], items).get(FORGETTING) if reading == "best" else None,
            )
        )
    own_budget, tuned_on = tuple(m for m in settings if m in exempt), tuple(sorted({run.seed for run in tuning}))
    return Comparison(level, reading, over, baseline, own_budget, tuple(results), tuned_on)


# Values of one seed by name, f64 [1 + R]: first of the items as they are, then of the resamples (R = 0: none).
Reading = dict[str, np.ndarray]


def _read(run: Run, level: float, reading: str, draws: Draws | None = None) -> Reading | None:
    """Utilities and forgetting of a run on test where it is at the level; None if it doesn't reach it."""
    below = np.flatnonzero((run.test if reading == "first" else run.validation).forgetting <= level)
    if not len(below):
        return None
    samples = [(run.test.forgetting[None], {name: values[None] for name, values in run.test.utilities.items()})]
    if draws is not None and run.items is not None:
        samples.append(run.items.resampled(draws))
    if reading == "first":
        readers = [fronts.crossings(forgetting, level) for forgetting, _ in samples]
    else:
        best = below[np.argmax(run.validation.utilities[MEAN][below])]
        readers = [lambda values: values[:, best]] * len(samples)
    both = [(read, {**utilities, FORGETTING: f}) for read, (f, utilities) in zip(readers, samples, strict=True)]
    names = (*run.test.utilities, FORGETTING)
    return {name: np.concatenate([read(values[name]) for read, values in both]) for name in names}


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


# --- of one run


def equal_forgetting(
    runs: Sequence[Run], *, board: Scoreboard, level: float, baseline: str = "uniform", controls: Collection[str] = (),
    resamples: int = 1000,
) -> dict[str, Any]:  # fmt: skip
    """The methods of one run, one seed, where each first comes down to `level` on test, as results.json has them.

    Fronts have step 0, the target model, as first point; its row comes first. A row has the run's `lowest` forgetting,
    and where it reached the level its interpolated `step` with the two evaluations that it lies `between` (none where
    it is one), and by column `values` as they were measured, their `intervals` and `gains` over the baseline. These
    are over items, and a run is read anew on every resample of them (`fronts.RunItems`); without items they have no
    ends. `best`: the method with the highest mean utility that reached the level and is none of `controls`, or None.
    """
    columns = [board.forgetting, *(name for name in board.utilities if name in runs[0].test.measured), MEAN]
    draws = fronts.make_draws(resamples=resamples, seed=0)
    found = {run.method: _measured(run, columns, level, draws) for run in runs}
    rows: list[dict[str, Any]] = [{"name": "target model", "reached": True, "step": None, "between": []}]
    first = runs[0].test
    series = {**first.utilities, **first.measured}
    rows[0] |= {"lowest": float(first.forgetting[0]), "values": {c: float(series[c][0]) for c in columns}}
    rows[0] |= {"intervals": {}, "gains": {}}
    for run in runs:
        front, reading, other = run.test, found[run.method], found.get(baseline)
        row = {"name": run.method, "reached": reading is not None, "step": None, "between": []}
        row |= {"lowest": float(front.forgetting.min()), "values": {}, "intervals": {}, "gains": {}}
        rows.append(row)
        if reading is None:
            continue
        at = int(np.argmax(front.forgetting <= level))
        if at and front.forgetting[at] < level:
            around = ((int(front.steps[i]), float(front.forgetting[i])) for i in (at - 1, at))
            row["between"] = [{"step": step, "forgetting": forgetting} for step, forgetting in around]
        row["step"] = float(fronts.crossings(front.forgetting[None], level)(front.steps[None])[0])
        row["values"] = {board.forgetting: float(reading.pop(FORGETTING)[0])}
        row["values"] |= {name: float(values[0]) for name, values in reading.items()}
        row["intervals"] = encode(_combined({run.seed: reading}, {run.seed: run.items} if run.items else {}))
        if other is not None and run.method != baseline:
            paired = all(one.items for one in runs if one.method in (run.method, baseline))
            items = {run.seed: run.items} if run.items and paired else {}
            row["gains"] = encode(_combined({run.seed: _gains(reading, other)}, items))
    reached = [row for row in rows[1:] if row["reached"] and row["name"] not in controls]
    best = max(reached, key=lambda row: row["values"][MEAN])["name"] if reached else None
    about = {"level": level, "split": "test", "columns": columns, "baseline": baseline, "seed": runs[0].seed}
    return {**about, "best": best, "rows": rows}


def _measured(run: Run, columns: Sequence[str], level: float, draws: Draws) -> Reading | None:
    """What `_read` gives at the first crossing, of values as they were measured: a mean utility stays relative."""
    relative = _read(run, level, "first", draws)
    if relative is None:
        return None
    names = [name for name in columns if name in run.test.utilities and name != MEAN]
    front = dataclasses.replace(run.test, utilities={name: run.test.measured[name] for name in names})
    items = run.items and dataclasses.replace(run.items, relative=dict.fromkeys(run.items.utilities, False))
    plain = _read(dataclasses.replace(run, test=front, items=items), level, "first", draws)
    return {**(plain or {}), MEAN: relative[MEAN]}
