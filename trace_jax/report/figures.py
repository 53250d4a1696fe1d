"""Figures of the report as inline SVG.

The figures are drawn once and read in a light and in a dark page: matplotlib gets stand-in colours, and each stand-in
becomes a CSS variable of the page. Text stays text, so that it can be searched, copied and scaled.
"""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.report.data import Front, ReportData, Routing, known
from trace_jax.report.words import plain_name

_INK, _MUTED, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"}
_SERIES = tuple(f"#0a0c{i:02x}" for i in range(7))
_VARIABLES |= {colour: f"--series-{i}" for i, colour in enumerate(_SERIES)}
_NEUTRAL = 6  # the grey of the series: the baseline
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 3.9  # inches of 72 units: about the width of a phone, where a panel fills the page

# Frequencies are coloured by log2(f / uniform), from a quarter and less to four times and more.
LOG2_RANGE = 2.0
_COLOURS = "PuOr_r"
_MOST_SEGMENTS = 400  # outlines beyond this become pixels, which take less room in the file


@dataclasses.dataclass(frozen=True)
class Style:
    """How one method is drawn everywhere: colour (CSS variable), marker and dash."""

    colour: str
    variable: str
    marker: str
    dash: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """One panel: its caption and its SVG."""

    caption: str
    svg: str


def method_styles(methods: Sequence[str], baseline: str) -> dict[str, Style]:
    """A style per method: the baseline is grey, the others differ in colour and marker, then in dash."""
    styles, number = {}, 0
    for method in methods:
        index = _NEUTRAL if method == baseline else number % _NEUTRAL
        turn = 0 if method == baseline else number // _NEUTRAL
        number += method != baseline
        marker = _MARKERS[(index + turn) % len(_MARKERS)]
        styles[method] = Style(_SERIES[index], f"--series-{index}", marker, _DASHES[turn % len(_DASHES)])
    return styles


def legend_swatch(style: Style) -> str:
    """A short line with the method's marker, for the legend beside the figures."""
    figure, axes = _panel(0.45, 0.2, margins=(0.0, 1.0, 0.0, 1.0))
    axes.plot([0, 1, 2], [0, 0, 0], color=style.colour, linestyle=style.dash, linewidth=2)
    axes.plot([1], [0], color=style.colour, marker=style.marker, markersize=6)
    axes.set_axis_off()
    axes.set_ylim(-1, 1)
    return _inline(figure, f"swatch{style.variable}-{style.marker}", "")


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
    figure, axes = _panel(_WIDTH, 3.0, margins=(0.115, 0.98, 0.16, 0.94))
    axes.grid(color=_GRID, linewidth=0.8)
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
    return _inline(figure, prefix, f"{plain_name(utility)} against {plain_name(data.forgetting)}, one line per method")


def _reference_lines(axes: Any, data: ReportData, utility: str) -> None:
    if data.level is not None:
        axes.axvline(data.level, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"level {data.level:g}",
            (data.level, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=_MUTED,
            fontsize=9,
        )
    target = next((row for row in data.rows if row.kind == "reference"), None)
    value = target.utilities.get(utility) if target else None
    if target and value and known(value.value):
        axes.axhline(value.value, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
        if target.forgetting and known(target.forgetting.value):
            axes.plot([target.forgetting.value], [value.value], color=_INK, marker="*", markersize=11, zorder=5)


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


def routing_figures(routing: Routing) -> list[Figure]:
    """Heat maps layers x experts: forget, retain, and retain after each calibration, selected experts outlined."""
    panels = [("Forget set", routing.forget_frequency, None), ("Retain set, before", routing.retain_frequency, None)]
    for method in dict.fromkeys([*routing.calibrated_frequency, *routing.selected]):
        frequency = routing.calibrated_frequency.get(method)
        selected = routing.selected.get(method)
        if frequency is None:
            panels.append((f"Retain set, {method} (weights leave it as it is)", routing.retain_frequency, selected))
        else:
            panels.append((f"Retain set, calibrated by {method}", frequency, selected))
    return [
        Figure(name, _heat_map(frequency, selected, routing, f"heat{number}", name))
        for number, (name, frequency, selected) in enumerate(panels)
    ]


def _heat_map(frequency: Any, selected: Any, routing: Routing, prefix: str, name: str) -> str:
    frequency_LxE = np.atleast_2d(np.array(frequency, float))
    layers, experts = frequency_LxE.shape
    left, right, cell = 0.1, 0.99, float(np.clip(240 / layers, 4, 24)) / 72
    height = layers * cell + 0.5
    figure, axes = _panel(_WIDTH, height, margins=(left, right, 0.42 / height, 1 - 0.06 / height))
    with np.errstate(divide="ignore"):
        colour = np.log2(frequency_LxE / routing.uniform)
    colour = np.nan_to_num(np.clip(colour, -LOG2_RANGE, LOG2_RANGE), nan=0.0)
    axes.imshow(
        colour, cmap=_COLOURS, vmin=-LOG2_RANGE, vmax=LOG2_RANGE, aspect="auto", interpolation="none", origin="lower"
    )
    if selected is not None:
        cell_width = 72 * _WIDTH * (right - left) / experts
        _outline(axes, np.atleast_2d(np.array(selected, bool)), float(np.clip(0.12 * cell_width, 0.5, 1.6)))
    axes.set_xticks(_ticks(experts, 9))
    ticks = _ticks(layers, 9)
    axes.set_yticks(ticks, [routing.layers[row] if routing.layers else row for row in ticks])
    axes.tick_params(length=0, labelsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _inline(figure, prefix, f"{name}: activation frequency by layer and expert")


def _ticks(count: int, most: int) -> list[int]:
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, count) if math.ceil(count / s) <= most)
    return list(range(0, count, step))


def _outline(axes: Any, selected_LxE: np.ndarray, width: float) -> None:
    """Draws the border between selected experts and the rest: dark on a light halo, visible on every cell colour."""
    from matplotlib.collections import LineCollection

    segments = []
    for layer, expert in np.argwhere(selected_LxE):
        for row, column in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            i, j = layer + row, expert + column
            if 0 <= i < selected_LxE.shape[0] and 0 <= j < selected_LxE.shape[1] and selected_LxE[i, j]:
                continue
            x, y = expert + column / 2, layer + row / 2
            segments.append([(x - abs(row) / 2, y - abs(column) / 2), (x + abs(row) / 2, y + abs(column) / 2)])
    axes.autoscale(False)
    for colour, factor in (("#ffffff", 2.2), ("#111111", 1.0)):
        lines = LineCollection(segments, colors=colour, linewidths=factor * width, capstyle="projecting")
        lines.set_rasterized(len(segments) > _MOST_SEGMENTS)
        axes.add_collection(lines)


def colour_scale() -> list[tuple[str, str]]:
    """Steps of the heat maps' scale: colour and label, in multiples of the uniform frequency."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    labels = {-2: "¼ and less", -1: "½", 0: "uniform (K/E)", 1: "2", 2: "4 and more"}
    colours = mpl.colormaps[_COLOURS]
    return [(to_hex(colours((x / LOG2_RANGE + 1) / 2)), labels[x]) for x in (-2, -1, 0, 1, 2)]


def _panel(width: float, height: float, *, margins: tuple[float, float, float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas  # here, because importing matplotlib takes a second

    left, right, bottom, top = margins
    figure = Canvas(figsize=(width, height))
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_MUTED)
        spine.set_linewidth(0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=10, width=0.8)
    axes.xaxis.label.set(color=_INK, fontsize=10.5)
    axes.yaxis.label.set(color=_INK, fontsize=10.5)
    return figure, axes


def _inline(figure: Any, prefix: str, label: str) -> str:
    """The figure as an SVG element that fits into the page: no namespaces, unique ids, colours as CSS variables."""
    import matplotlib as mpl

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}
    with mpl.rc_context(settings | {"image.composite_image": False}):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    _, width, height = (float(x) for x in re.search(r'viewBox="0 (\S+) (\S+) (\S+)"', svg).groups())  # type: ignore[union-attr]
    name = f'role="img" aria-label="{html.escape(label)}"' if label else 'aria-hidden="true"'
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" {name}>', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
