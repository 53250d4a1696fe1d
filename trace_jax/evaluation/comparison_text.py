"""Comparisons in words: sentences of what they found, and tables as plain text and Markdown."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from trace_jax.evaluation.comparison import Comparison
from trace_jax.evaluation.fronts import MEAN
from trace_jax.evaluation.intervals import Interval
from trace_jax.io.files import decode
from trace_jax.io.progress import aligned, plain_name


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
        ends = [row["intervals"].get(MEAN, {}).get(end) for end in ("low", "high")]
        interval = "-" if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"
        lines.append(
            [row["name"], *(number_text(row["values"].get(c)) for c in table["columns"]), interval, step_text(row)]
        )
    caption = f"At equal forgetting ({lines[0][1]} <= {table['level']:g}), {table['split']} split"
    note = [] if all(row["reached"] for row in table["rows"]) else ["-: did not reach the level; its lowest is given"]
    if any(row["between"] for row in table["rows"]):
        note.append("values lie on straight lines between the evaluations around the level")
    return "\n".join([caption, *aligned(lines), *note])


def step_text(row: Mapping[str, Any]) -> str:
    """Where a row of `equal_forgetting` is read: at which step, or how low it came that did not reach the level."""
    if not row["reached"]:
        return f"lowest {row['lowest']:.3f}"
    return "-" if row["step"] is None else f"{row['step']:.1f}"


def as_text(comparison: Comparison) -> str:
    """Means over seeds with intervals, and gains over the baseline in percent, as plain text."""
    return "\n".join([_caption(comparison), *aligned(_comparison_cells(comparison))])


def as_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    return f"{_caption(comparison)}:\n\n{markdown_table(_comparison_cells(comparison))}"


def variants_markdown(comparisons: Mapping[str, Comparison]) -> str:
    """One line a variant: mean utility of every method at one level with its setting, gains over the baseline."""
    first = next(iter(comparisons.values()))
    methods = [result.method for result in first.results]
    others = [method for method in methods if method != first.baseline]
    lines = [["variant", *methods, *(f"gain of {method}" for method in others), "settings chosen"]]
    for variant, comparison in comparisons.items():
        results = {result.method: result for result in comparison.results}
        utilities = [interval_text(results[m].utilities.get(MEAN)) for m in methods]
        gains = [interval_text(results[m].gains.get(MEAN), percent=True) for m in others]
        settings = "; ".join(f"{m} {results[m].setting}" for m in methods)
        lines.append([f"`{variant}`", *utilities, *gains, settings])
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
