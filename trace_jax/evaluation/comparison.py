"""Comparing methods fairly: equal budgets, settings chosen on validation, numbers reported on test.

For every method and forgetting level the setting (such as alpha) with the best mean validation utility over seeds is
chosen, and its test utility is reported, next to the gain over a baseline paired by seed and item. Intervals are over
seeds and items: where a run comes down to the level is read anew on every resample of its items; the setting stays.
"""

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation import fronts
from trace_jax.evaluation.fronts import FORGETTING, MEAN, Draws, Front, RunItems
from trace_jax.evaluation.intervals import Interval, seeds_and_items, t_interval
from trace_jax.evaluation.scoreboard import Scoreboard
from trace_jax.io.progress import aligned

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


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """A method at one forgetting level, on test: means over the seeds that reached it, with intervals."""

    method: str
    setting: str  # chosen on validation
    settings: int  # that were tried
    seeds: tuple[int, ...]  # that reached the level
    missed: tuple[int, ...]  # those that did not
    utilities: Mapping[str, Interval]  # empty if no seed reached the level
    gains: Mapping[str, Interval]  # utility / baseline - 1, paired by seed and item; likewise
    over_seeds: Mapping[str, Mapping[str, Interval]]  # "utilities" and "gains" with Student's intervals over seeds
    area: Interval | None  # `fronts.mean_difference` to the baseline, paired by seed, with Student's interval
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


def choose_setting(runs: Sequence[Run], *, level: float, reading: str = "first") -> str:
    """The setting of one method with the best validation utility at a forgetting level (`reading` as in `compare`).

    More seeds that reach the level count first, then the mean over those; of equal settings the first in `runs`.
    """

    def quality(setting: str) -> tuple[int, float]:
        validated = [dataclasses.replace(run, test=run.validation) for run in runs if run.setting == setting]
        reached = [values[MEAN][0] for run in validated if (values := _read(run, level, reading)) is not None]
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

    Reading "first" reads a run where it first comes down to the level, interpolated; "best" reads it at the evaluation
    with the best validation utility among those at or below the level on validation, so that a run that loses utility
    on its way and regains it is judged by what it regains, and not by the best of noisy test points.
    """
    check_equal_budgets(runs, exempt=exempt)
    by_method = collections.defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    if baseline not in by_method:
        raise ValueError(f"the baseline {baseline!r} was not run; there are {', '.join(by_method)}.")
    has_items = all(run.items is not None for run in runs)
    over = ("seeds and items" if len({run.seed for run in runs}) > 1 else "items") if has_items else "seeds"
    draws = fronts.make_draws(resamples=resamples, seed=0) if has_items else None
    chosen, readings, forgetting = {}, {}, {}
    for method, group in by_method.items():
        setting = choose_setting(group, level=level, reading=reading)
        chosen[method] = {run.seed: run for run in group if run.setting == setting}
        values = {seed: _read(run, level, reading, draws) for seed, run in chosen[method].items()}
        readings[method] = {seed: value for seed, value in values.items() if value is not None}
        forgetting[method] = {seed: {FORGETTING: value.pop(FORGETTING)} for seed, value in readings[method].items()}
    results = []
    for method, group in by_method.items():
        reached, runs_of, others = readings[method], chosen[method], readings[baseline]
        gains = {seed: _gains(ours, others[seed]) for seed, ours in reached.items() if seed in others}
        items = {seed: run.items for seed, run in runs_of.items() if run.items and has_items}
        pairs = [(run.test, chosen[baseline][seed].test) for seed, run in runs_of.items() if seed in chosen[baseline]]
        areas = [area for area in (fronts.mean_difference(*pair) for pair in pairs) if area is not None]
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
                forgetting=_combined(forgetting[method], items).get(FORGETTING) if reading == "best" else None,
            )
        )
    return Comparison(level, reading, over, baseline, tuple(m for m in by_method if m in exempt), tuple(results))


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


# --- as text


def equal_forgetting(of_methods: Mapping[str, Front], *, board: Scoreboard, level: float) -> dict[str, Any]:
    """Every method's measured columns where its front on test first comes down to `level`, as results.json has them.

    Fronts have step 0, the target model, as first point; its row comes first. A row has the run's `lowest` forgetting,
    and where it reached the level its interpolated `step`, and `values` by column.
    """
    first = next(iter(of_methods.values()))
    columns = [board.forgetting, *(name for name in board.utilities if name in first.measured), MEAN]

    def row(name: str, front: Front, read: Callable | None) -> dict[str, Any]:
        series = {**front.utilities, **front.measured}
        values = {column: read(series[column]) for column in columns} if read else {}
        step, lowest = read(front.steps) if read else None, float(front.forgetting.min())
        return {"name": name, "reached": read is not None, "step": step, "lowest": lowest, "values": values}

    rows = [row("target model", first, lambda values: float(values[0]))]
    rows[0] |= {"step": None, "lowest": float(first.forgetting[0])}
    rows += [row(name, front, fronts.crossing(front, level)) for name, front in of_methods.items()]
    return {"level": level, "split": "test", "columns": columns, "rows": rows}


def equal_forgetting_text(table: Mapping[str, Any]) -> str:
    """What `equal_forgetting` returns as plain text, columns aligned."""
    lines = [["", *(c.replace("_", " ") for c in table["columns"]), "step"]]
    for row in table["rows"]:
        step = "-" if row["step"] is None else f"{row['step']:.1f}"
        step = step if row["reached"] else f"lowest {row['lowest']:.3f}"
        lines.append([row["name"], *(number_text(row["values"].get(c)) for c in table["columns"]), step])
    caption = f"At equal forgetting ({lines[0][1]} <= {table['level']:g}), {table['split']} split"
    note = [] if all(row["reached"] for row in table["rows"]) else ["-: did not reach the level; its lowest is given"]
    return "\n".join([caption, *aligned(lines), *note])


def as_text(comparison: Comparison) -> str:
    """Means over seeds with intervals, and gains over the baseline in percent, as plain text."""
    return "\n".join([_caption(comparison), *aligned(_comparison_cells(comparison))])


def as_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    return f"{_caption(comparison)}:\n\n{_markdown(_comparison_cells(comparison))}"


def objectives_markdown(comparisons: Mapping[str, Comparison]) -> str:
    """One line an objective: mean utility of every method at one level with its setting, gains over the baseline."""
    first = next(iter(comparisons.values()))
    methods = [result.method for result in first.results]
    others = [method for method in methods if method != first.baseline]
    lines = [["objective", *methods, *(f"gain of {method}" for method in others), "settings chosen"]]
    for objective, comparison in comparisons.items():
        results = {result.method: result for result in comparison.results}
        utilities = [_interval(results[m].utilities.get(MEAN)) for m in methods]
        gains = [_interval(results[m].gains.get(MEAN), percent=True) for m in others]
        settings = "; ".join(f"{m} {results[m].setting}" for m in methods)
        lines.append([f"`{objective}`", *utilities, *gains, settings])
    return f"{_caption(first)}; mean utility:\n\n{_markdown(lines, last='---')}"


def _markdown(lines: Sequence[Sequence[str]], *, last: str = "---:") -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 2), last]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def _caption(comparison: Comparison) -> str:
    where = {"first": "where a run first comes down to", "best": "at the best evaluation at or below"}
    paired, note = {
        "seeds and items": ("seed and item", ""),
        "items": ("item", " (one seed)"),
        "seeds": ("seed", " (no items were kept)"),
    }[comparison.over]
    return (
        f"Test split, {where[comparison.reading]} forgetting {comparison.level:g}; means over seeds, 95 % intervals "
        f"over {comparison.over}{note}; gains over tuned {comparison.baseline}, paired by {paired}"
    )


def _comparison_cells(comparison: Comparison) -> list[list[str]]:
    names = list(dict.fromkeys(n for r in comparison.results for n in r.utilities))
    titles = [n.replace("_", " ") for n in names]
    best = ["test forgetting"] * (comparison.reading == "best")
    lines = [["", "setting", "seeds", *best, *titles, *(f"gain on {t}" for t in titles)]]
    for result in comparison.results:
        label = result.method + (" (own budget)" if result.method in comparison.exempt else "")
        seeds = f"{len(result.seeds)}/{len(result.seeds) + len(result.missed)}"
        cells = [_interval(result.utilities.get(n)) for n in names]
        gains = [_interval(result.gains.get(n), percent=True) for n in names]
        lines.append([label, result.setting, seeds, *(_interval(result.forgetting) for _ in best), *cells, *gains])
    return lines


def number_text(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _interval(interval: Interval | None, *, percent: bool = False) -> str:
    if interval is None:
        return "-"
    numbers = interval.value, interval.low, interval.high
    value, low, high = (f"{100 * x:+.1f}" if percent else f"{x:.3f}" for x in numbers)
    return value + " %" * percent + ("" if math.isnan(interval.low) else f" [{low}, {high}]")
