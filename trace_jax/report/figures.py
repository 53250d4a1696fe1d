"""Figures of the report: how methods look everywhere, and utility against forgetting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.report.data import Front, ReportData, known
from trace_jax.report.drawing import GRID, INK, MUTED, SERIES, WIDTH, Figure, inline, panel
from trace_jax.report.words import plain_name

_NEUTRAL = 6  # the grey of the series: the baseline
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Style:
    """How one method is drawn everywhere: colour (CSS variable), marker and dash."""

    colour: str
    variable: str
    marker: str
    dash: str


def method_styles(methods: Sequence[str], baseline: str) -> dict[str, Style]:
    """A style per method: the baseline is grey, the others differ in colour and marker, then in dash."""
    styles, number = {}, 0
    for method in methods:
        index = _NEUTRAL if method == baseline else number % _NEUTRAL
        turn = 0 if method == baseline else number // _NEUTRAL
        number += method != baseline
        marker = _MARKERS[(index + turn) % len(_MARKERS)]
        styles[method] = Style(SERIES[index], f"--series-{index}", marker, _DASHES[turn % len(_DASHES)])
    return styles


def legend_swatch(style: Style, prefix: str = "swatch") -> str:
    """A short line with the method's marker, for the legend beside the figures; ids begin with `prefix`."""
    figure, axes = panel(0.45, 0.2, margins=(0.0, 1.0, 0.0, 1.0))
    axes.plot([0, 1, 2], [0, 0, 0], color=style.colour, linestyle=style.dash, linewidth=2)
    axes.plot([1], [0], color=style.colour, marker=style.marker, markersize=6)
    axes.set_axis_off()
    axes.set_ylim(-1, 1)
    return inline(figure, f"{prefix}{style.variable}-{style.marker}", "")


def front_figures(data: ReportData) -> list[Figure]:
    """Utility against forgetting, one panel per utility; further right is more forgotten, further up is better."""
    styles = method_styles(list(data.fronts), data.baseline)
    figures = []
    for number, utility in enumerate(data.utility_names()):
        points = [p for fronts in data.fronts.values() for front in fronts for p in front.points]
        if any(known(p.forgetting) and known(p.utilities.get(utility)) for p in points):
            svg = _front_panel(data, utility, styles, f"front{number}")
            figures.append(Figure(plain_name(utility), svg))
    return figures


def _front_panel(data: ReportData, utility: str, styles: Mapping[str, Style], prefix: str) -> str:
    figure, axes = panel(WIDTH, 3.0, margins=(0.115, 0.98, 0.16, 0.94))
    axes.grid(color=GRID, linewidth=0.8)
    _reference_lines(axes, data, utility)
    for method, fronts in data.fronts.items():
        style = styles[method]
        band = data.bands.get(method, {}).get(utility)
        if band:
            x, low, high = (np.array([point[k] for point in band], float) for k in ("forgetting", "low", "high"))
            axes.fill_between(x, low, high, color=style.colour, alpha=0.16, linewidth=0)
        if len(fronts) > 1:
            for front in fronts:
                x, y = _coordinates(front, utility)
                axes.plot(x, y, color=style.colour, linestyle=style.dash, linewidth=0.8, alpha=0.4)
        x, y = _coordinates(mean_front(fronts), utility)
        axes.plot(x, y, color=style.colour, linestyle=style.dash, linewidth=1.8, marker=style.marker, markersize=4.5)
    axes.locator_params(nbins=6)
    axes.invert_xaxis()
    axes.set_xlabel(f"{plain_name(data.forgetting)} (right: more forgotten)")
    return inline(figure, prefix, f"{plain_name(utility)} against {plain_name(data.forgetting)}, one line per method")


def step_figures(data: ReportData) -> list[Figure]:
    """A measurement after each step of a series, one panel per measurement and one line per method."""
    styles = method_styles(list(dict.fromkeys(m for methods in data.steps.values() for m in methods)), data.baseline)
    figures = []
    for number, (name, methods) in enumerate(data.steps.items()):
        figure, axes = panel(WIDTH, 2.4, margins=(0.16, 0.98, 0.2, 0.94))
        axes.grid(color=GRID, linewidth=0.8)
        for method, values in methods.items():
            y = [math.nan if value is None else value for value in values]
            style = styles[method]
            axes.plot(y, color=style.colour, linestyle=style.dash, linewidth=1.8, marker=style.marker, markersize=4.5)
        count = max(len(values) for values in methods.values())
        axes.set_xticks(range(count), ["start", *map(str, range(1, count))])
        axes.set_xlabel("step")
        label = f"{plain_name(name)} after each step, one line per method"
        figures.append(Figure(plain_name(name), inline(figure, f"steps{number}", label)))
    return figures


def _reference_lines(axes: Any, data: ReportData, utility: str) -> None:
    if data.level is not None:
        axes.axvline(data.level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"level {data.level:g}",
            (data.level, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=9,
        )
    target = next((row for row in data.rows if row.kind == "reference"), None)
    value = target.utilities.get(utility) if target else None
    if target and value and known(value.value):
        axes.axhline(value.value, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        if target.forgetting and known(target.forgetting.value):
            axes.plot([target.forgetting.value], [value.value], color=INK, marker="*", markersize=11, zorder=5)


def mean_front(fronts: Sequence[Front]) -> Front:
    """The mean over runs at the steps that every run was evaluated at. One run is its own mean."""
    if len(fronts) == 1:
        return fronts[0]
    by_step = [{p.step: p for p in front.points} for front in fronts]
    steps = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    points = []
    for step in steps:
        here = [run[step] for run in by_step]
        names = here[0].utilities
        mean = {name: _mean([p.utilities.get(name) for p in here]) for name in names}
        points.append(type(here[0])(step, _mean([p.forgetting for p in here]), mean))
    return Front(seed=-1, points=points)


def _mean(values: Sequence[float | None]) -> float:
    return math.nan if not all(known(v) for v in values) else float(np.mean(np.array(values, float)))


def _coordinates(front: Front, utility: str) -> tuple[list[float], list[float]]:
    pairs = [(p.forgetting, p.utilities.get(utility)) for p in front.points]
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None and known(x) and known(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]
