"""What came back under attack: rows from results.json, the figure, and the table's cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trace_jax.evaluation.benchmarks import scoreboard
from trace_jax.report.data import AttackRow, Number, ReportData, known
from trace_jax.report.drawing import GRID, INK, MUTED, Figure, inline, panel
from trace_jax.report.figures import method_styles
from trace_jax.report.words import format_interval, format_number, format_share, plain_name

_SPLIT = "test"
_WIDTH = 7.2  # inches; scaled down to the page
BEFORE, AFTER = "before unlearning", "after unlearning"


def attack_rows(results: Mapping[str, Any]) -> dict[str, list[AttackRow]]:
    """Rows by method from the content of results.json; methods that were not attacked are left out."""
    measure = scoreboard(results["benchmark"]).forgetting
    original = _number(results["references"]["target"], measure)
    found = {}
    for label, result in results["methods"].items():
        after = _number(result["measurements"], measure)
        rows = [AttackRow("", "", after, original)]
        for name, attack in result.get("attacks", {}).items():
            if not attack["points"]:
                rows.append(AttackRow(name, "", Number(None), original, note=attack["failed"]))
            for place, point in enumerate(attack["points"]):
                value = _number(point["measurements"], measure)
                asked = _number(point["original"], measure) if "original" in point else original
                back = recovered(value.value, after.value, asked.value)
                rows.append(AttackRow(name, point["at"], value, asked, back, place == attack["strongest"]))
        if len(rows) > 1:
            found[label] = rows
    return found


def recovered(attacked: float | None, unlearned: float | None, original: float | None) -> float | None:
    """(attacked - unlearned) / (original - unlearned); None where unlearning took nothing away."""
    if attacked is None or unlearned is None or original is None or original <= unlearned:
        return None
    return (attacked - unlearned) / (original - unlearned)


def _number(measurements: Sequence[Mapping[str, Any]], name: str) -> Number:
    found = next((m for m in measurements if m["name"] == name and m["split"] == _SPLIT), None)
    return Number(None) if found is None else Number(found["value"], found["n"], found["low"], found["high"])


def attack_table(data: ReportData) -> dict[str, Any] | None:
    """Methods and lines of the table: before, after, and every form of every attack; None without attacks."""
    if not data.attacks:
        return None
    keys = list(dict.fromkeys((row.attack, row.at) for rows in data.attacks.values() for row in rows))
    by_method = {method: {(row.attack, row.at): row for row in rows} for method, rows in data.attacks.items()}
    lines = [{"name": BEFORE, "at": "", "cells": [_cell(rows[0].original) for rows in data.attacks.values()]}]
    for attack, at in keys:
        cells = []
        for rows in by_method.values():
            row = rows.get((attack, at))
            cells.append(_cell(Number(None)) if row is None else _cell(row.value, row))
        lines.append({"name": plain_name(attack) if attack else AFTER, "at": at, "cells": cells})
    return {"methods": list(data.attacks), "lines": lines}


def _cell(number: Number, row: AttackRow | None = None) -> dict[str, Any]:
    share = None if row is None or not row.attack else row.recovered
    return {
        "value": format_number(number.value),
        "interval": format_interval(number.low, number.high),
        "recovered": "" if share is None else f"{format_share(share)} back",
        "strongest": row is not None and row.strongest,
        "note": row.note if row is not None else "",
    }


def attack_figure(data: ReportData) -> Figure | None:
    """The forgetting measure before, after, and in the strongest form of each attack; one marker per method."""
    lines = _lines(data)
    if len(lines) < 3:
        return None
    styles = method_styles(list(dict.fromkeys([*data.fronts, *data.attacks])), data.baseline)
    figure, axes = panel(
        _WIDTH, 0.75 + 0.34 * len(lines), margins=(0.27, 0.98, 0.55 / (0.75 + 0.34 * len(lines)), 0.98)
    )
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    if data.chance is not None:
        axes.axvline(data.chance, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    spread = 0.5 / max(1, len(data.attacks))
    for number, (name, numbers) in enumerate(lines.items()):
        for place, (method, value) in enumerate(numbers.items()):
            if value.value is None or not known(value.value):
                continue
            y = -number + spread * ((len(numbers) - 1) / 2 - place)
            style = styles.get(method)
            colour, marker = (INK, "*") if name == BEFORE or style is None else (style.colour, style.marker)
            if value.low is not None and value.high is not None and known(value.low) and known(value.high):
                axes.plot([value.low, value.high], [y, y], color=colour, linewidth=1.4, alpha=0.7)
            axes.plot([value.value], [y], color=colour, marker=marker, markersize=6, linestyle="none")
    axes.set_yticks([-i for i in range(len(lines))], list(lines))
    axes.set_ylim(-len(lines) + 0.4, 0.6)
    axes.set_xlabel(f"{plain_name(data.forgetting)} (right: more is back)")
    label = f"{plain_name(data.forgetting)} before and after unlearning and after each attack, one marker per method"
    return Figure("", inline(figure, "attacks", label))


def _lines(data: ReportData) -> dict[str, dict[str, Number]]:
    """Numbers by method of each line of the figure, top to bottom."""
    if not data.attacks:
        return {}
    first = next(iter(data.attacks.values()))[0]
    lines: dict[str, dict[str, Number]] = {BEFORE: {"": first.original}, AFTER: {}}
    for method, rows in data.attacks.items():
        lines[AFTER][method] = rows[0].value
        for row in rows:
            if row.strongest:
                lines.setdefault(plain_name(row.attack), {})[method] = row.value
    return lines
