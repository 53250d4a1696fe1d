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
from trace_jax.evaluation.scoreboard import Scoreboard
from trace_jax.io.files import decode, encode
from trace_jax.io.progress import aligned, plain_name

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


class Tried(NamedTuple):
    """What validation says of a setting at a level."""

    reached: int  # seeds that reached it
    utility: float  # mean utility over these; NaN if there are none


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


def try_settings(runs: Sequence[Run], *, level: float, reading: str = "first") -> dict[str, Tried]:
    """What the settings of one method give on validation at a forgetting level (`reading` as in `compare`)."""
    tried = {}
    for setting in dict.fromkeys(run.setting for run in runs):
        validated = [dataclasses.replace(run, test=run.validation) for run in runs if run.setting == setting]
        reached = [values[MEAN][0] for run in validated if (values := _read(run, level, reading)) is not None]
        tried[setting] = Tried(len(reached), float(np.mean(reached)) if reached else math.nan)
    return tried


def choose_setting(tried: Mapping[str, Tried]) -> str:
    """More seeds that reach the level count first, then the utility; of equal settings the first."""
    return max(tried, key=lambda setting: (tried[setting].reached, tried[setting].reached and tried[setting].utility))


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
    tried = {method: try_settings(group, level=level, reading=reading) for method, group in by_method.items()}
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


# --- as text


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


def conclusion(table: Mapping[str, Any]) -> str:
    """What `equal_forgetting` found of one seed, in a sentence or two: the best method and its gain, or what to do."""
    where = f"{plain_name(table['columns'][0])} {table['level']:g}"
    if not any(row["reached"] for row in table["rows"][1:]):
        low = min(table["rows"][1:], key=lambda row: row["lowest"])
        return (
            f"Not reached: no method came down to {where} (lowest: {low['name']}, {low['lowest']:.3f}). Train longer "
            "(unlearning.steps), weight the retain loss less (unlearning.alpha), or compare at a higher level "
            "(evaluation.levels)."
        )
    utilities, gains = ({r["name"]: r[of].get(MEAN) for r in table["rows"][1:]} for of in ("intervals", "gains"))
    found = _best(table["best"], utilities, gains, table["baseline"])
    return f"At {where} {found}."


def study_conclusion(compared: Mapping[str, Any], measure: str, controls: Collection[str]) -> str:
    """The same of a `Comparison` as JSON, over its seeds."""
    where, baseline, results = f"{plain_name(measure)} {compared['level']:g}", compared["baseline"], compared["results"]
    utilities = {r["method"]: r["utilities"].get(MEAN) for r in results}
    gains = {r["method"]: r["gains"].get(MEAN) for r in results if r["method"] != baseline}
    own = {name: u["value"] for name, u in utilities.items() if u and name not in controls}
    if not any(utilities.values()):
        return f"Not reached: no method came down to {where}. Try more steps, lower alphas, or a higher level."
    found = _best(max(own, key=lambda n: own[n]) if own else None, utilities, gains, f"tuned {baseline}")
    seeds = max(len(r["seeds"]) for r in results)
    tuned = tuned_text(compared.get("tuning_seeds", ()), ", settings chosen on")
    return f"At {where} {found}. {f'{seeds} seeds' if seeds > 1 else 'One seed'}{tuned}."


def _best(best: str | None, utilities: Mapping[str, Any], gains: Mapping[str, Any], baseline: str) -> str:
    """Utilities and gains by method, an `Interval` as JSON or None; controls and rivals that kept more are named."""
    least = utilities[best]["value"] if best else -math.inf
    above = {name: u["value"] for name, u in utilities.items() if u and name != best and u["value"] > least}
    text = "no method but controls came"
    if best:
        text = f"the best mean utility is that of {best}, {interval_text(decode(Interval, utilities[best]))}"
        if gain := gains.get(best):
            text += f", {interval_text(decode(Interval, gain), percent=True)} over {baseline}"
    others = ", ".join(f"{name} {value:.3f}" for name, value in above.items())
    return f"{text}; controls and rivals with more: {others}" if others else text


def equal_forgetting_text(table: Mapping[str, Any]) -> str:
    """What `equal_forgetting` returns as plain text, columns aligned."""
    lines = [["", *(c.replace("_", " ") for c in table["columns"]), "95 % interval", "step"]]
    for row in table["rows"]:
        step = "-" if row["step"] is None else f"{row['step']:.1f}"
        step = step if row["reached"] else f"lowest {row['lowest']:.3f}"
        ends = [row["intervals"].get(MEAN, {}).get(end) for end in ("low", "high")]
        interval = "-" if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"
        lines.append([row["name"], *(number_text(row["values"].get(c)) for c in table["columns"]), interval, step])
    caption = f"At equal forgetting ({lines[0][1]} <= {table['level']:g}), {table['split']} split"
    note = [] if all(row["reached"] for row in table["rows"]) else ["-: did not reach the level; its lowest is given"]
    if any(row["between"] for row in table["rows"]):
        note.append("values lie on straight lines between the evaluations around the level")
    return "\n".join([caption, *aligned(lines), *note])


def as_text(comparison: Comparison) -> str:
    """Means over seeds with intervals, and gains over the baseline in percent, as plain text."""
    return "\n".join([_caption(comparison), *aligned(_comparison_cells(comparison))])


def as_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    return f"{_caption(comparison)}:\n\n{markdown_table(_comparison_cells(comparison))}"


def objectives_markdown(comparisons: Mapping[str, Comparison]) -> str:
    """One line an objective: mean utility of every method at one level with its setting, gains over the baseline."""
    first = next(iter(comparisons.values()))
    methods = [result.method for result in first.results]
    others = [method for method in methods if method != first.baseline]
    lines = [["objective", *methods, *(f"gain of {method}" for method in others), "settings chosen"]]
    for objective, comparison in comparisons.items():
        results = {result.method: result for result in comparison.results}
        utilities = [interval_text(results[m].utilities.get(MEAN)) for m in methods]
        gains = [interval_text(results[m].gains.get(MEAN), percent=True) for m in others]
        settings = "; ".join(f"{m} {results[m].setting}" for m in methods)
        lines.append([f"`{objective}`", *utilities, *gains, settings])
    return f"{_caption(first)}; mean utility:\n\n{markdown_table(lines, last='---')}"


def markdown_table(lines: Sequence[Sequence[str]], *, last: str = "---:") -> str:
    """Rows of cells, the head first, as Markdown; numbers to the right."""
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
        + tuned_text(comparison.tuning_seeds, "; settings chosen on")
    )


def tuned_text(seeds: Sequence[int], before: str) -> str:
    """On which seeds settings were chosen, after words that lead there; empty where it were those that are reported."""
    return f"{before} seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""


def _comparison_cells(comparison: Comparison) -> list[list[str]]:
    names = list(dict.fromkeys(n for r in comparison.results for n in r.utilities))
    titles = [n.replace("_", " ") for n in names]
    best = ["test forgetting"] * (comparison.reading == "best")
    between = [] if best else ["bracket"]
    lines = [["", "setting", "seeds", *between, *best, *titles, *(f"gain on {t}" for t in titles)]]
    for result in comparison.results:
        label = result.method + (" (own budget)" if result.method in comparison.exempt else "")
        seeds = f"{len(result.seeds)}/{len(result.seeds) + len(result.missed)}"
        cells = [interval_text(result.utilities.get(n)) for n in names]
        gains = [interval_text(result.gains.get(n), percent=True) for n in names]
        bracket = [number_text(result.bracket) for _ in between]
        lines.append(
            [label, result.setting, seeds, *bracket, *(interval_text(result.forgetting) for _ in best), *cells, *gains]
        )
    return lines


def number_text(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def interval_text(interval: Interval | None, *, percent: bool = False) -> str:
    """`0.860 [0.814, 0.906]`, in percent with its sign; a dash where there is none."""
    if interval is None:
        return "-"
    numbers = interval.value, interval.low, interval.high
    value, low, high = (f"{100 * x:+.1f}" if percent else f"{x:.3f}" for x in numbers)
    return value + " %" * percent + ("" if math.isnan(interval.low) else f" [{low}, {high}]")
