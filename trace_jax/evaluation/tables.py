"""Tables for people: methods at equal forgetting, and a study's comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trace_jax.evaluation.comparison import Comparison
from trace_jax.evaluation.fronts import MEAN, Front, Scoreboard, crossing
from trace_jax.evaluation.intervals import Interval
from trace_jax.io.progress import aligned


def equal_forgetting(
    fronts: Mapping[str, Front], *, board: Scoreboard, level: float, split: str = "test"
) -> dict[str, Any]:
    """Every method's measured columns where its front first comes down to `level`, as results.json has them.

    Args:
      fronts: front per method, each with step 0 (the target model) as first point.
      board: names the columns.
      split: what the fronts were measured on; for the caption.

    Returns:
      level, split, columns, and rows, the target model's first: each has name, reached, step (interpolated), lowest,
      the run's lowest forgetting, and values by column, empty where the level was not reached.
    """
    first = next(iter(fronts.values()))
    columns = [board.forgetting, *(name for name in board.utilities if name in first.measured), MEAN]

    def row(name: str, front: Front, read: Callable | None, lowest: float) -> dict[str, Any]:
        series = {**front.utilities, **front.measured}
        values = {} if read is None else {c: read(series[c]) for c in columns}
        step = None if read is None else read(front.steps)
        return {"name": name, "reached": read is not None, "step": step, "lowest": lowest, "values": values}

    start = row("target model", first, lambda values: float(values[0]), float(first.forgetting[0])) | {"step": None}
    rows = [row(name, front, crossing(front, level), float(front.forgetting.min())) for name, front in fronts.items()]
    return {"level": level, "split": split, "columns": columns, "rows": [start, *rows]}


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


def comparison_text(comparison: Comparison) -> str:
    """A study's comparison as plain text: means over seeds with intervals, and gains over the baseline in percent."""
    return "\n".join([_caption(comparison), *aligned(_comparison_cells(comparison))])


def comparison_markdown(comparison: Comparison) -> str:
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
    lines = [["", "setting", "seeds", *titles, *(f"gain on {t}" for t in titles)]]
    for result in comparison.results:
        label = result.method + (" (own budget)" if result.method in comparison.exempt else "")
        seeds = f"{len(result.seeds)}/{len(result.seeds) + len(result.missed)}"
        cells = [_interval(result.utilities.get(n)) for n in names]
        gains = [_interval(result.gains.get(n), percent=True) for n in names]
        lines.append([label, result.setting, seeds, *cells, *gains])
    return lines


def number_text(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _interval(interval: Interval | None, *, percent: bool = False) -> str:
    if interval is None:
        return "-"
    if percent:
        value, low, high = (f"{100 * x:+.1f}" for x in (interval.value, interval.low, interval.high))
        return f"{value} %" if math.isnan(interval.low) else f"{value} % [{low}, {high}]"
    value = f"{interval.value:.3f}"
    return value if math.isnan(interval.low) else f"{value} [{interval.low:.3f}, {interval.high:.3f}]"
