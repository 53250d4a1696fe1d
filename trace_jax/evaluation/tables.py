"""Tables for people: methods at equal forgetting, as plain text and as a dict for results.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from trace_jax.evaluation.comparison import Comparison
from trace_jax.evaluation.fronts import MEAN, Crossing, Front, Scoreboard, crossing
from trace_jax.evaluation.intervals import Interval
from trace_jax.io.text import aligned


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: `values` per column, empty where the level was never reached; `lowest` forgetting of the run."""

    name: str
    reached: bool
    step: float | None
    lowest: float
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class EqualForgetting:
    """Methods read off at one forgetting level, by linear interpolation, with the target model above them."""

    level: float
    split: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def text(self) -> str:
        """The table as plain text, columns aligned."""
        lines = [["", *(c.replace("_", " ") for c in self.columns), "step"]]
        for row in self.rows:
            step = f"lowest {row.lowest:.3f}" if not row.reached else "-" if row.step is None else f"{row.step:.1f}"
            lines.append([row.name, *(number_text(row.values.get(c)) for c in self.columns), step])
        caption = f"At equal forgetting ({self.columns[0].replace('_', ' ')} <= {self.level:g}), {self.split} split"
        note = [] if all(row.reached for row in self.rows) else ["-: never forgot that much; its lowest is given"]
        return "\n".join([caption, *aligned(lines), *note])


def equal_forgetting(
    fronts: Mapping[str, Front], *, board: Scoreboard, level: float, split: str = "test", target: str = "target model"
) -> EqualForgetting:
    """Every method's measured columns where its front first comes down to `level`.

    Args:
      fronts: front per method, each with step 0 (the target model) as first point.
      board: names the columns.
      level: forgetting level.
      split: what the fronts were measured on; for the caption.
      target: name of the target model's row.
    """
    if not fronts:
        raise ValueError("there is no method to put in the table; give at least one front.")
    first = next(iter(fronts.values()))
    columns = (board.forgetting, *(u.name for u in board.utilities if u.name in first.measured), MEAN)
    rows = [Row(target, True, None, float(first.forgetting[0]), _values(first, columns, at=None))]
    for name, front in fronts.items():
        at, lowest = crossing(front, level), float(front.forgetting.min())
        values = {} if at is None else _values(front, columns, at=at)
        rows.append(Row(name, at is not None, None if at is None else at.step, lowest, values))
    return EqualForgetting(level, split, columns, tuple(rows))


def comparison_text(comparison: Comparison) -> str:
    """A study's comparison as plain text: means over seeds with intervals, and gains over the baseline in percent."""
    return "\n".join([_caption(comparison), *aligned(_comparison_cells(comparison))])


def comparison_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    header, *lines = _comparison_cells(comparison)
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
    return f"{_caption(comparison)}:\n\n{table}"


def objectives_markdown(comparisons: Mapping[str, Comparison]) -> str:
    """One line an objective: mean utility of every method at one level with its setting, gains over the baseline."""
    first = next(iter(comparisons.values()))
    methods = [result.method for result in first.results]
    others = [method for method in methods if method != first.baseline]
    header = ["objective", *methods, *(f"gain of {method}" for method in others), "settings chosen"]
    lines = []
    for objective, comparison in comparisons.items():
        results = {result.method: result for result in comparison.results}
        utilities = [_interval(results[m].utilities.get(MEAN)) for m in methods]
        gains = [_interval(results[m].gains.get(MEAN), percent=True) for m in others]
        settings = "; ".join(f"{m} {results[m].setting}" for m in methods)
        lines.append([f"`{objective}`", *utilities, *gains, settings])
    rule = ["---", *["---:"] * (len(header) - 2), "---"]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
    return f"{_caption(first)}; mean utility:\n\n{table}"


def _caption(comparison: Comparison) -> str:
    where = {"first": "where a run first comes down to", "best": "at the best evaluation at or below"}
    paired = {"seeds and items": "seed and item", "items": "item", "seeds": "seed"}[comparison.over]
    note = {"seeds and items": "", "items": " (one seed)", "seeds": " (no items were kept)"}[comparison.over]
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


def _values(front: Front, columns: Sequence[str], *, at: Crossing | None) -> dict[str, float]:
    """Columns of a front at a crossing, or at its first point (`at` None)."""
    series = {c: front.measured[c] if c in front.measured else front.utilities[c] for c in columns}
    return {c: float(v[0]) if at is None else at.value(v) for c, v in series.items()}


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
