"""The report page: one HTML file with everything inside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from trace_jax.io.files import as_path, replacing
from trace_jax.report import attacks, figures, routing_figures, words
from trace_jax.report.certificates import certificate_table
from trace_jax.report.data import Number, ReportData, known, report_data
from trace_jax.report.drawing import Figure
from trace_jax.report.heat_maps import TIMES_UNIFORM

MOST_MEASUREMENTS = 400  # rows per method in the list of measurements


def write_report(data: ReportData | Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes the report. The file needs nothing beside it and no network: style, figures and numbers are inside.

    Args:
      data: `ReportData`, or the same as nested plain mappings and lists (`report_data`).
      path: where to; replaced as a whole, never left half-written.

    Raises:
      ValueError: the mapping has keys that a report does not know.
      OSError: the file can't be written.
    """
    page = render_report(data)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return as_path(path)


def render_report(data: ReportData | Mapping[str, Any]) -> str:
    """The page as text; see `write_report`."""
    data = data if isinstance(data, ReportData) else report_data(data)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": words.format_number, "setting": words.format_setting, "plain": words.plain_name}
    source = resources.files("trace_jax.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        data=data,
        verdict=words.write_verdict(data),
        summary=_summary(data),
        fronts=[_safe(figure) for figure in figures.front_figures(data)],
        steps=[_safe(figure) for figure in figures.step_figures(data)],
        attacks=_attacks(data),
        legend=_legend(data),
        heat_maps=[_safe(figure) for figure in routing_figures.corpus_figures(data.routing)] if data.routing else [],
        colour_scale=TIMES_UNIFORM.legend() if data.routing else [],
        routing=_routing(data) if data.routing and data.routing.measured else None,
        certificates=certificate_table(data.certificates),
        measurements={method: _measurements(rows) for method, rows in data.measurements.items()},
        config=words.flatten(data.config),
        environment=words.flatten(data.environment),
        missing=words.MISSING,
    )


def _safe(figure: Figure) -> dict[str, Any]:
    return {"caption": figure.caption, "svg": Markup(figure.svg)}


def _legend(data: ReportData) -> list[dict[str, Any]]:
    methods = list(data.fronts) or list(dict.fromkeys(m for values in data.steps.values() for m in values))
    styles = figures.method_styles(methods, data.baseline)
    runs = {method: len(fronts) for method, fronts in data.fronts.items()}
    return [
        {"method": m, "runs": runs.get(m, 1), "swatch": Markup(figures.legend_swatch(s))} for m, s in styles.items()
    ]


def _attacks(data: ReportData) -> dict[str, Any] | None:
    """Table, figure and legend of the attacks; None where there were none."""
    table, figure = attacks.attack_table(data), attacks.attack_figure(data)
    if table is None:
        return None
    styles = figures.method_styles(list(dict.fromkeys([*data.fronts, *data.attacks])), data.baseline)
    swatches = {m: Markup(figures.legend_swatch(styles[m], "attack-swatch")) for m in data.attacks}
    legend = [{"method": method, "swatch": swatch} for method, swatch in swatches.items()]
    retrained = any(row.retrained is not None for rows in data.attacks.values() for row in rows)
    count = next(iter(data.attacks.values()))[0].value.n
    return {**table, "n": count, "retrained": retrained, "figures": [_safe(figure)] if figure else [], "legend": legend}


def _routing(data: ReportData) -> dict[str, Any]:
    """Groups of routing figures, their legend, and what was measured."""
    assert data.routing is not None
    measured = data.routing.measured
    styles = figures.method_styles(list(dict.fromkeys([*data.fronts, *measured])), data.baseline)
    groups = [
        {**vars(group), "panels": [_safe(f) for f in group.panels], "maps": [_safe(f) for f in group.maps]}
        for group in routing_figures.routing_groups(data.routing, styles)
    ]
    legend = [{"method": m, "swatch": Markup(figures.legend_swatch(styles[m], "routing-swatch"))} for m in measured]
    first = next(iter(measured.values()))
    return {
        "groups": groups,
        "legend": legend,
        "tokens": first.get("tokens", {}),
        "rows": first.get("rows", {}),
        "without_maps": max(0, len(measured) - routing_figures.MOST_METHODS),
    }


def _summary(data: ReportData) -> dict[str, Any]:
    """Columns and cells of the comparison."""
    utilities = list(dict.fromkeys(name for row in data.rows for name in row.utilities))
    columns = [data.forgetting, *utilities]
    table = [[row.forgetting, *(row.utilities.get(name) for name in utilities)] for row in data.rows]
    scales = [_scale([line[i] for line in table]) for i in range(len(columns))]
    rows = [
        {"row": row, "cells": [_cell(*cell) for cell in zip(columns, line, scales, strict=True)]}
        for row, line in zip(data.rows, table, strict=True)
    ]
    return {"columns": columns, "rows": rows}


def _scale(numbers: Sequence[Number | None]) -> float:
    """End of a column's bars, which start at 0: 1 for shares, a little above the largest otherwise; 0 draws no bars."""
    values = [x for number in numbers if number for x in (number.value, number.high) if x is not None and known(x)]
    if not values or min(values) < 0:
        return 0.0
    return 1.0 if max(values) <= 1 else 1.05 * max(values)


def _cell(name: str, number: Number | None, scale: float) -> dict[str, Any]:
    """Texts of one cell, and its dot and interval as percentages of the column's scale."""
    number = number or Number(None)
    cell: dict[str, Any] = {
        "name": words.plain_name(name),
        "value": words.format_number(number.value),
        "interval": words.format_interval(number.low, number.high),
        "n": words.format_number(number.n) if number.n is not None else "",
        "bar": None,
    }
    value = number.value
    if scale and value is not None and known(value):
        low = number.low if number.low is not None and known(number.low) else value
        high = number.high if number.high is not None and known(number.high) else value
        at, left, right = (100 * float(np.clip(x / scale, 0, 1)) for x in (value, low, high))
        cell["bar"] = {"at": f"{at:.1f}", "from": f"{left:.1f}", "width": f"{right - left:.1f}"}
    return cell


def _measurements(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = [
        {
            "name": words.plain_name(str(row.get("name", ""))),
            "value": words.format_number(row.get("value")),
            "interval": words.format_interval(row.get("low"), row.get("high")),
            "n": words.format_number(row.get("n")),
            "split": row.get("split") or "",
            "step": words.format_number(row["step"]) if row.get("step") is not None else "",
            "note": row.get("note") or "",
        }
        for row in rows[:MOST_MEASUREMENTS]
    ]
    steps = any(row["step"] for row in shown)
    return {"rows": shown, "steps": steps, "left_out": max(0, len(rows) - MOST_MEASUREMENTS)}
