"""What came back under attack: rows from results.json, the figure, and the table's cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trace_jax.evaluation.benchmarks import scoreboard
from trace_jax.evaluation.task import SPLIT
from trace_jax.report.data import AttackRow, Number, ReportData, known
from trace_jax.report.drawing import GRID, INK, MUTED, Figure, inline, panel
from trace_jax.report.figures import method_styles
from trace_jax.report.words import format_interval, format_number, plain_name

_WIDTH = 5.6  # inches
_CONTROL = ""  # in the place of a method: the retrained model
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
                other = "original" in point  # asked in another way, so that before and after are not comparable
                asked = _number(point["original"], measure) if other else original
                back = None if other else recovered(value.value, after.value, original.value)
                strongest = place == attack["strongest"]
                control = _number(point["retrained"], measure) if "retrained" in point else None
                rows.append(AttackRow(name, point["at"], value, asked, back, strongest, "", other, control))
        if len(rows) > 1:
            found[label] = rows
    return found


def recovered(attacked: float | None, unlearned: float | None, original: float | None) -> float | None:
    """(attacked - unlearned) / (original - unlearned); None where unlearning took nothing away."""
    if attacked is None or unlearned is None or original is None or original <= unlearned:
        return None
    return (attacked - unlearned) / (original - unlearned)


def _number(measurements: Sequence[Mapping[str, Any]], name: str) -> Number:
    found = next((m for m in measurements if m["name"] == name and m["split"] == SPLIT), None)
    return Number(None) if found is None else Number(found["value"], found["n"], found["low"], found["high"])


def attack_table(data: ReportData) -> dict[str, Any] | None:
    """Methods, lines before, after, and of every attack at its strongest, and lines of all its forms; None without
    attacks."""
    if not data.attacks:
        return None
    first, names = next(iter(data.attacks.values()))[0], {}
    for rows in data.attacks.values():
        for row in rows[1:]:
            names.setdefault(row.attack, {}).setdefault(row.at, None)
    lines = [
        {"name": BEFORE, "at": "", "cells": [_cell(first.original)] * len(data.attacks)},
        {"name": AFTER, "at": "", "cells": [_cell(rows[0].value) for rows in data.attacks.values()]},
    ]
    forms = []
    for attack, ats in names.items():
        of_attack = [[row for row in rows if row.attack == attack] for rows in data.attacks.values()]
        strongest = [next((row for row in rows if row.strongest or row.note), None) for rows in of_attack]
        lines.append({"name": plain_name(attack), "at": "", "cells": [_row_cell(row, at=True) for row in strongest]})
        for at in ats:
            found = [next((row for row in rows if row.at == at), None) for rows in of_attack]
            forms.append({"name": plain_name(attack), "at": at, "cells": [_row_cell(row) for row in found]})
    return {"methods": list(data.attacks), "lines": lines, "forms": forms}


def _cell(number: Number, about: str = "") -> dict[str, str]:
    return {"value": format_number(number.value), "interval": format_interval(number.low, number.high), "about": about}


def _row_cell(row: AttackRow | None, *, at: bool = False) -> dict[str, str]:
    if row is None:
        return _cell(Number(None))
    about = [row.at] if at and row.at else []
    if row.recovered is not None:
        about.append(f"{round(100 * row.recovered)} % back")
    elif row.asked_otherwise:
        about.append(f"original: {format_number(row.original.value)}")
    if row.retrained is not None:
        about.append(f"retrained: {format_number(row.retrained.value)}")
    return _cell(row.value, ", ".join(about + [row.note] * bool(row.note)))


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
            colour, marker = (INK, "*" if name == BEFORE else "o") if style is None else (style.colour, style.marker)
            if value.low is not None and value.high is not None and known(value.low) and known(value.high):
                axes.plot([value.low, value.high], [y, y], color=colour, linewidth=1.4, alpha=0.7)
            hollow = {"markerfacecolor": "none"} if method == _CONTROL else {}
            axes.plot([value.value], [y], color=colour, marker=marker, markersize=6, linestyle="none", **hollow)
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
                numbers = lines.setdefault(plain_name(row.attack), {})
                if row.retrained is not None:
                    numbers.setdefault(_CONTROL, row.retrained)
                numbers[method] = row.value
    return lines
