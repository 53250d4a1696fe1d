"""Figures of the report: panels as inline SVG, how methods look, scales of colour, and each kind of figure.

The figures are drawn once and read in a light and in a dark page: matplotlib gets stand-in colours, and each stand-in
becomes a CSS variable of the page. Text stays text, so that it can be searched, copied and scaled.
"""

import functools
import html
import io
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from trace_jax.io.progress import plain_name

INK, MUTED, GRID = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(7))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}
WIDTH = 3.9  # inches of 72 units: about the width of a phone, where a panel fills the page
_NEUTRAL = 6  # the grey of the series: the baseline
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_STEPS = 33  # colours of a scale
_FEW_LAYERS = 8  # up to here points have error bars, above lines have bands
_MOST_BANDS = 4
_MOST_SEGMENTS = 400  # outlines beyond this become pixels, which take less room in the file
_RIGHT = 0.99
_DASHED, _DOTTED = (0, (4, 3)), (0, (1, 2))
_THICK = {"linewidth": 1.8, "markersize": 4.5}

Style = Mapping[str, Any]  # how a method is drawn everywhere: color, marker and linestyle of matplotlib's `plot`
Number = Mapping[str, Any]  # an estimate as results.json has it: value, n, low and high; None where it isn't known
Front = Mapping[str, Any]  # as results.json has it: steps, forgetting, utilities by name


class Figure(NamedTuple):
    """One panel: its caption and its SVG."""

    caption: str
    svg: Markup


def panel(width: float, height: float, margins: tuple[float, float, float, float], grid: Any = None) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches; margins are left, right, bottom and top of the axes, as shares.

    `grid`: "x" or "both", along which axes there are lines.
    """
    from matplotlib.figure import Figure as Canvas  # here, because importing matplotlib takes a second

    left, right, bottom, top = margins
    figure = Canvas(figsize=(width, height))
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=MUTED, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=10, width=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=10.5)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    return figure, axes


def inline(figure: Any, label: str, *, hidden: bool = False) -> Markup:
    """The figure as an SVG element that fits into the page: no namespaces, unique ids, colours as CSS variables.

    `label`, unique on the page, says what the figure shows to who can't see it; it isn't read out if `hidden`.
    """
    import matplotlib as mpl

    prefix, buffer = f"f{zlib.crc32(label.encode()):08x}", io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}
    with mpl.rc_context(settings | {"image.composite_image": False}):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    width, height = (72 * inches for inches in figure.get_size_inches())
    name = 'aria-hidden="true"' if hidden else f'role="img" aria-label="{html.escape(label)}"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg viewBox="0 0 {width:g} {height:g}" {name}>', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px system-ui, sans-serif", svg)
    # Path data in hundredths of a unit, without line breaks: half the length.
    shorter = functools.partial(re.sub, r"-?\d+\.\d+", lambda x: f"{round(float(x[0]), 2):g}")
    svg = re.sub(r'\bd="[^"]*"', lambda d: shorter(d[0]).replace("\n", ""), svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)


def method_styles(methods: Iterable[str], baseline: str) -> dict[str, Style]:
    """A style per method: the baseline is grey, the others differ in colour and marker, then in dash."""
    styles, others = {}, itertools.count()
    for method in dict.fromkeys(methods):
        turn, index = (0, _NEUTRAL) if method == baseline else divmod(next(others), _NEUTRAL)
        marker, dash = _MARKERS[(index + turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)]
        styles[method] = {"color": SERIES[index], "marker": marker, "linestyle": dash}
    return styles


def swatch(style: Style, name: str) -> Markup:
    """A short line with the method's marker, for a legend; `name` is unique on the page."""
    figure, axes = panel(0.45, 0.2, (0.0, 1.0, 0.0, 1.0))
    axes.plot([0, 1, 2], [0, 0, 0], **style, markevery=[1], markersize=6, linewidth=2)
    axes.set_axis_off()
    axes.set_ylim(-1, 1)
    return inline(figure, name, hidden=True)


class Scale(NamedTuple):
    """Which colour a value gets. Colours change in steps, so that an image is small and a cell can be read off."""

    low: float
    high: float
    colours: (
        str | tuple[str, ...]
    )  # a colour map of matplotlib from low to high, or colours of the categories 0, 1, ...
    labels: Sequence[tuple[float, str]]  # values that the legend names, with their text

    def colour_map(self) -> Any:
        """As matplotlib takes it."""
        from matplotlib import colormaps, colors

        if isinstance(self.colours, str):
            return colormaps[self.colours].resampled(_STEPS)
        return colors.ListedColormap(list(self.colours))

    def legend(self) -> list[tuple[str, str]]:
        """(colour, text) of the values that are named."""
        from matplotlib.colors import to_hex

        colours, span = self.colour_map(), self.high - self.low
        return [(to_hex(colours((value - self.low) / span)), text) for value, text in self.labels]


# log2(f / uniform), from a quarter and less to four times and more. Purple and orange differ for every kind of eye.
TIMES_UNIFORM = Scale(
    -2.0, 2.0, "PuOr_r", ((-2, "¼ and less"), (-1, "½"), (0, "uniform (K/E)"), (1, "2"), (2, "4 and more"))
)


def scale_of(arrays: Sequence[np.ndarray], *, diverging: bool) -> Scale:
    """A scale for all of these, around 0 or from 0; its ends are round numbers that hold 99 of 100 values."""
    values = np.concatenate([np.abs(array[np.isfinite(array)]).ravel() for array in arrays] or [np.zeros(0)])
    largest = (float(np.quantile(values, 0.99)) or float(values.max()) if len(values) else 0.0) or 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    end = next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest * (1 - 1e-9))
    if not diverging:
        return Scale(0.0, end, "Oranges", ((0.0, "0"), (end / 2, f"{end / 2:g}"), (end, f"{end:g} and more")))
    texts = (f"−{end:g} and less", f"−{end / 2:g}", "0", f"+{end / 2:g}", f"+{end:g} and more")
    return Scale(-end, end, "PuOr_r", tuple(zip((-end, -end / 2, 0.0, end / 2, end), texts, strict=True)))


# --- kinds of figure


def front_figures(
    fronts: Mapping[str, Sequence[Front]], styles: Mapping[str, Style], *, forgetting: str, level: float,
    target: Mapping[str, Any] | None,
) -> list[Figure]:  # fmt: skip
    """Utility against forgetting, one panel per utility; `target` is the row of the model before unlearning."""
    figures, measure = [], plain_name(forgetting)
    for name in dict.fromkeys(name for runs in fronts.values() for front in runs for name in front["utilities"]):
        figure, axes = panel(WIDTH, 3.0, (0.115, 0.98, 0.16, 0.94), grid="both")
        axes.axvline(level, color=MUTED, linewidth=1, linestyle=_DASHED)
        at = {"transform": axes.get_xaxis_transform(), "ha": "center"}
        axes.text(level, 1.02, f"level {level:g}", **at, color=MUTED, fontsize=9)
        before = target["utilities"].get(name) if target else None
        if target and before and before["value"] is not None:
            axes.axhline(before["value"], color=MUTED, linewidth=1, linestyle=_DOTTED)
            if target["forgetting"]:
                x = target["forgetting"]["value"]
                axes.plot([x], [before["value"]], color=INK, marker="*", markersize=11, zorder=5)
        for method, runs in fronts.items():
            thin = {**styles[method], "marker": "", "linewidth": 0.8, "alpha": 0.4}
            for run in runs if len(runs) > 1 else ():
                axes.plot(run["forgetting"], run["utilities"][name], **thin)
            mean = mean_front(runs)
            axes.plot(mean["forgetting"], mean["utilities"][name], **styles[method], **_THICK)
        axes.locator_params(nbins=6)
        axes.invert_xaxis()
        axes.set_xlabel(f"{measure} (right: more forgotten)")
        label = f"{plain_name(name)} against {measure}, one line per method"
        figures.append(Figure(plain_name(name), inline(figure, label)))
    return figures


def mean_front(fronts: Sequence[Front]) -> Front:
    """The mean over runs at the steps that every run was evaluated at. One run is its own mean."""
    steps = sorted(set.intersection(*(set(front["steps"]) for front in fronts)))

    def mean(columns: Sequence[Sequence[float]]) -> np.ndarray:
        rows = [[column[f["steps"].index(s)] for s in steps] for f, column in zip(fronts, columns, strict=True)]
        return np.mean(np.array(rows, float), axis=0)

    utilities = {name: mean([f["utilities"][name] for f in fronts]) for name in fronts[0]["utilities"]}
    return {"steps": steps, "forgetting": mean([f["forgetting"] for f in fronts]), "utilities": utilities}


def step_figures(scores: Mapping[str, Mapping[str, Sequence]], styles: Mapping[str, Style]) -> list[Figure]:
    """Each measurement before the first step of a series and after every step, one line per method."""
    figures = []
    for name, methods in scores.items():
        figure, axes = panel(WIDTH, 2.4, (0.16, 0.98, 0.2, 0.94), grid="both")
        for method, values in methods.items():
            axes.plot(np.array(values, float), **styles[method], **_THICK)
        count = max(len(values) for values in methods.values())
        axes.set_xticks(range(count), ["start", *map(str, range(1, count))])
        axes.set_xlabel("step")
        label = f"{plain_name(name)} after each step, one line per method"
        figures.append(Figure(plain_name(name), inline(figure, label)))
    return figures


def row_plot(
    rows: Mapping[str, Mapping[Any, Number]], styles: Mapping[str, Style], caption: str, label: str, *,
    below: str = "", chance: float | None = None, share: bool = False,
) -> Figure:  # fmt: skip
    """Values side by side: one row per name, in it one marker per method with its 95 % interval, rows downwards.

    A value under "" (the model before unlearning) is a star, one under None (a control) a hollow circle.
    """
    height = 0.75 + 0.34 * len(rows)
    figure, axes = panel(5.6, height, (0.3, 0.98, 0.55 / height, 0.98), grid="x")
    if chance is not None:
        axes.axvline(chance, color=MUTED, linewidth=1, linestyle=_DOTTED)
    spread = 0.5 / max(map(len, rows.values()))
    for row, numbers in enumerate(rows.values()):
        for place, (method, number) in enumerate(numbers.items()):
            style = styles[method] if method else {"color": INK, "marker": "*" if method == "" else "o"}
            if number["value"] is None:
                continue
            y = -row + spread * ((len(numbers) - 1) / 2 - place)
            if number["low"] is not None and number["high"] is not None:
                axes.plot([number["low"], number["high"]], [y, y], color=style["color"], linewidth=1.4, alpha=0.7)
            hollow = {"markerfacecolor": "none"} if method is None else {}
            axes.plot([number["value"]], [y], **style, markersize=6, **hollow)
    axes.set_yticks([-row for row in range(len(rows))], [n if len(n) <= 24 else f"{n[:23]}…" for n in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(below)
    if share:
        axes.set_xlim(-0.01, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    return Figure(caption, inline(figure, label))


def layer_plot(
    quantities: Mapping[str, Mapping[str, Any]], styles: Mapping[str, Style], caption: str, label: str, *,
    original: Mapping[str, Any] | None, limits: tuple[float, float], below: str = "layer", ticks: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """A quantity against the layer, one line per method, with 95 % intervals; `limits` are the ends of its axis.

    `quantities`: by method, lists "layers" (their numbers) and "value", and where it has intervals "low" and "high";
    `original`: the same of the original model, drawn dotted. `ticks`: words in the place of the layers' numbers.
    """
    figure, axes = panel(WIDTH, 2.3, (0.125, 0.985, 0.2, 0.96), grid="both")
    layers = list(next(iter(quantities.values()))["layers"])
    few = len(layers) <= _FEW_LAYERS
    places = np.linspace(-0.25, 0.25, len(quantities) + 2)[1:-1] if few else np.zeros(len(quantities))
    if original is not None:
        dotted = {"color": INK, "linestyle": ":", "linewidth": 1.6, "zorder": 4}
        if few:
            axes.hlines(original["value"], np.array(layers) - 0.4, np.array(layers) + 0.4, **dotted)
        else:
            axes.plot(layers, np.array(original["value"], float), **dotted)
    for (method, quantity), place in zip(quantities.items(), places, strict=True):
        style, x = styles[method], np.array(quantity["layers"], float) + place
        value, low, high = (np.array(quantity.get(end, quantity["value"]), float) for end in ("value", "low", "high"))
        if few:
            axes.vlines(x, low, high, color=style["color"], linewidth=1.4, alpha=0.7)
            axes.plot(x, value, color=style["color"], linewidth=0.8, alpha=0.35)
            axes.plot(x, value, color=style["color"], marker=style["marker"], linestyle="none", markersize=5)
        else:
            if len(quantities) <= _MOST_BANDS:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)
            axes.plot(x, value, color=style["color"], linestyle=style["linestyle"], linewidth=1.5)
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_xticks([layers[i] for i in _ticks(len(layers))], ticks or None)
    axes.set_xlabel(below)
    room = 0.04 * (limits[1] - limits[0])
    axes.set_ylim(limits[0] - room, limits[1] + room)
    axes.locator_params(axis="y", nbins=5)
    return Figure(caption, inline(figure, label))


def curve_plot(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Share of the gap that weights close, of selected and of all experts, against the effective sample they leave."""
    figure, axes = panel(WIDTH, 2.3, (0.125, 0.985, 0.2, 0.96), grid="both")
    sizes = [100 * point["effective_sample_size"] for point in curve]
    for name, words, colour in (("closed", "selected experts", SERIES[0]), ("closed_all", "all experts", SERIES[1])):
        closed = [100 * point[name] for point in curve]
        axes.plot(sizes, closed, color=colour, marker="o", **_THICK)
        end: Any = {"xy": (sizes[-1], closed[-1]), "xytext": (6, 5), "textcoords": "offset points"}
        axes.annotate(words, **end, color=colour, fontsize=9)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("effective sample, % of the retain tokens")
    caption = "Gap closed, %, against the effective sample"
    return Figure(caption, inline(figure, caption))


def drift_plot(ratio: Any, drift: Any, label: str) -> Figure:
    """Relative change of each expert's weights against how much more often forget text uses it than retain text."""
    figure, axes = panel(WIDTH, 2.6, (0.155, 0.985, 0.2, 0.96), grid="both")
    with np.errstate(divide="ignore"):
        x, y = np.clip(np.log2(np.array(ratio, float).ravel()), -4, 4), np.array(drift, float).ravel()
    axes.scatter(x, y, s=12, color=SERIES[0], alpha=0.7, linewidths=0, rasterized=len(y) > _MOST_SEGMENTS)
    axes.set_xticks(range(-4, 5, 2), ["≤ 1/16", "1/4", "1", "4", "≥ 16"])
    axes.set_xlabel("forget / retain frequency")
    axes.locator_params(axis="y", nbins=6)
    axes.set_ylim(bottom=0)
    return Figure("drift of each expert", inline(figure, label))


def heat_map(
    values: Any, scale: Scale, caption: str, what: str, *, selected: Any = None, layers: Sequence[int] = ()
) -> Figure:
    """One map of layers x experts, `values` [L, E]; what is not a number gets the colour of 0.

    `selected`: bool [L, E], experts to outline. `layers`: numbers of the rows; () counts from 0. Captions are unique.
    """
    values_LxE = np.array(values, float)
    count, experts = values_LxE.shape
    height = count * float(np.clip(240 / count, 4, 24)) / 72 + 0.5
    names = [layers[row] if len(layers) else row for row in _ticks(count)]
    left = 0.078 + 0.022 * max(len(str(name)) for name in names)
    figure, axes = panel(WIDTH, height, (left, _RIGHT, 0.42 / height, 1 - 0.06 / height))
    clipped = np.nan_to_num(np.clip(values_LxE, scale.low, scale.high), nan=0.0)
    colours = {"cmap": scale.colour_map(), "vmin": scale.low, "vmax": scale.high}
    axes.imshow(clipped, **colours, aspect="auto", interpolation="none", origin="lower")
    if selected is not None:
        cell_width = 72 * WIDTH * (_RIGHT - left) / experts
        _outline(axes, np.array(selected, bool), float(np.clip(0.12 * cell_width, 0.5, 1.6)))
    axes.set_xticks(_ticks(experts))
    axes.set_yticks(_ticks(count), names)
    axes.tick_params(length=0, labelsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    return Figure(caption, inline(figure, f"{caption}: {what} by layer and expert"))


def _ticks(count: int) -> list[int]:
    """At most nine of 0 to count - 1, from 0 in equal steps."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, count) if math.ceil(count / s) <= 9)
    return list(range(0, count, step))


def _outline(axes: Any, selected_LxE: np.ndarray, width: float) -> None:
    """Draws the border between selected experts and the rest: dark on a light halo, visible on every cell colour."""
    from matplotlib.collections import LineCollection

    around, segments = np.pad(selected_LxE, 1), []
    for layer, expert in np.argwhere(selected_LxE):
        for row, column in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if not around[layer + row + 1, expert + column + 1]:
                x, y = expert + column / 2, layer + row / 2
                segments.append([(x - abs(row) / 2, y - abs(column) / 2), (x + abs(row) / 2, y + abs(column) / 2)])
    axes.autoscale(False)
    for colour, factor in (("#ffffff", 2.2), ("#111111", 1.0)):
        lines = LineCollection(segments, colors=colour, linewidths=factor * width, capstyle="projecting")
        lines.set_rasterized(len(segments) > _MOST_SEGMENTS)
        axes.add_collection(lines)
