"""Figures of the report: how methods look, and each kind of figure (`trace_jax.io.drawing` makes SVG of them)."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from trace_jax.io.drawing import INK, MOST_SEGMENTS, MUTED, SERIES, WIDTH, Figure, inline, panel, tick_places
from trace_jax.io.progress import plain_name

_NEUTRAL = 6  # the grey of the series: the baseline
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_FEW_LAYERS = 8  # up to here points have error bars, above lines have bands
MOST_BANDS = 4  # of more lines each is drawn alone, without its interval or its runs
_DASHED, _DOTTED = (0, (4, 3)), (0, (1, 2))
_THICK = {"linewidth": 1.8, "markersize": 4.5}

Style = Mapping[str, Any]  # how a method is drawn everywhere: color, marker and linestyle of matplotlib's `plot`
Number = Mapping[str, Any]  # an estimate as results.json has it: value, n, low and high; None where it isn't known
Front = Mapping[str, Any]  # as results.json has it: steps, forgetting, utilities by name


def method_styles(methods: Iterable[str], baseline: str, known: Sequence[str] = ()) -> dict[str, Style]:
    """A style per method: the baseline is grey, the others differ in colour and marker, then in dash.

    One of the `known` looks the same on every page, whatever the others are.
    """
    places = {name: place for place, name in enumerate(name for name in known if name != baseline)}
    names = list(dict.fromkeys(methods))
    taken = {places[name] for name in names if name in places}
    free, styles = (place for place in itertools.count() if place not in taken), {}
    for method in names:
        place = None if method == baseline else places.get(method)
        place = next(free) if place is None and method != baseline else place
        turn, index = (0, _NEUTRAL) if place is None else divmod(place, _NEUTRAL)
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


# --- kinds of figure


def front_figures(
    fronts: Mapping[str, Sequence[Front]], styles: Mapping[str, Style], *, forgetting: str, level: float
) -> list[Figure]:
    """Utility against forgetting, a panel per utility, on one range. A star is where runs of one seed start."""
    figures, measure = [], plain_name(forgetting)
    single = fronts and all(len(runs) == 1 for runs in fronts.values())
    start = next(iter(fronts.values()))[0] if single else None
    every = [x for runs in fronts.values() for front in runs for values in front["utilities"].values() for x in values]
    low, high = min(every, default=0.0), max(every, default=1.0)
    room = 0.04 * (high - low) or 0.01
    for name in dict.fromkeys(name for runs in fronts.values() for front in runs for name in front["utilities"]):
        figure, axes = panel(WIDTH, 3.0, (0.115, 0.98, 0.16, 0.94), grid="both")
        axes.axvline(level, color=MUTED, linewidth=1, linestyle=_DASHED)
        at = {"transform": axes.get_xaxis_transform(), "ha": "center"}
        axes.text(level, 1.02, f"level {level:g}", **at, color=MUTED, fontsize=9)
        if start is not None:
            axes.axhline(start["utilities"][name][0], color=MUTED, linewidth=1, linestyle=_DOTTED)
            point = [start["forgetting"][0]], [start["utilities"][name][0]]
            axes.plot(*point, color=INK, marker="*", markersize=11, zorder=5)
        for method, runs in fronts.items():
            thin = {**styles[method], "marker": "", "linewidth": 0.8, "alpha": 0.4}
            for run in runs if len(runs) > 1 and len(fronts) <= MOST_BANDS else ():
                axes.plot(run["forgetting"], run["utilities"][name], **thin)
            mean = mean_front(runs)
            axes.plot(mean["forgetting"], mean["utilities"][name], **styles[method], **_THICK, label=method)
        axes.set_ylim(low - room, high + room)
        axes.locator_params(nbins=6)
        axes.invert_xaxis()
        axes.set_xlabel(f"{measure} (right: more forgotten)")
        ends = (
            f"{m} ends at {measure} {runs[0]['forgetting'][-1]:.2f}, {runs[0]['utilities'][name][-1]:.2f}"
            for m, runs in fronts.items()
        )
        label = f"{plain_name(name)} against {measure}, one line per method: {'; '.join(ends)}"
        figures.append(Figure(plain_name(name), inline(figure, label), figure))
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
            axes.plot(np.array(values, float), **styles[method], **_THICK, label=method)
        count = max(len(values) for values in methods.values())
        axes.set_xticks(range(count), ["start", *map(str, range(1, count))])
        axes.set_xlabel("step")
        label = f"{plain_name(name)} after each step, one line per method"
        figures.append(Figure(plain_name(name), inline(figure, label), figure))
    return figures


def loss_figures(curves: Mapping[str, Mapping[str, Sequence]], styles: Mapping[str, Style]) -> list[Figure]:
    """What was written of every step of training, one line per method; `curves` have "step" and the quantities."""
    figures = []
    for name in dict.fromkeys(name for curve in curves.values() for name in curve if name != "step"):
        drawn = {m: curve for m, curve in curves.items() if any(x is not None for x in curve[name])}
        if drawn:
            figure, axes = panel(WIDTH, 2.3, (0.155, 0.985, 0.2, 0.96), grid="both")
            for method, curve in drawn.items():
                style = {**styles[method], "marker": "", "linewidth": 1.4}
                axes.plot(curve["step"], np.array(curve[name], float), **style, label=method)
            axes.set_xlabel("step")
            axes.locator_params(nbins=6)
            caption = plain_name(name).capitalize()
            figures.append(Figure(caption, inline(figure, f"{caption} at each step, one line per method"), figure))
    return figures


def row_plot(
    rows: Mapping[str, Mapping[Any, Number]], styles: Mapping[str, Style], caption: str, label: str, *,
    below: str = "", chance: float | None = None, share: bool = False,
) -> Figure:  # fmt: skip
    """Values side by side: one row per name, in it one marker per method with its 95 % interval, rows downwards.

    A value under "" (the model before unlearning) is a star, one under None (a control) a hollow circle.
    """
    height = 0.75 + 0.34 * len(rows)
    figure, axes = panel(WIDTH, height, (1.68 / WIDTH, 0.98, 0.55 / height, 0.98), grid="x")
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
    axes.set_xlabel(below, loc="right")
    axes.locator_params(axis="x", nbins=5)
    if share:
        axes.set_xlim(-0.01, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    return Figure(caption, inline(figure, label), figure)


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
            if len(quantities) <= MOST_BANDS:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)
            axes.plot(x, value, color=style["color"], linestyle=style["linestyle"], linewidth=1.5)
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_xticks([layers[i] for i in tick_places(len(layers))], ticks or None)
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
    figure, axes = panel(WIDTH, 2.3, (0.155, 0.985, 0.2, 0.96), grid="both")
    with np.errstate(divide="ignore"):
        x, y = np.clip(np.log2(np.array(ratio, float).ravel()), -4, 4), np.array(drift, float).ravel()
    axes.scatter(x, y, s=12, color=SERIES[0], alpha=0.7, linewidths=0, zorder=3, rasterized=len(y) > MOST_SEGMENTS)
    axes.set_xticks(range(-4, 5, 2), ["≤ 1/16", "1/4", "1", "4", "≥ 16"])
    axes.set_xlabel("forget / retain frequency")
    axes.locator_params(axis="y", nbins=6)
    axes.set_ylim(bottom=0)
    return Figure("drift of each expert", inline(figure, label))
