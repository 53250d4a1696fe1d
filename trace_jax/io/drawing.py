"""Drawings as inline SVG that a page or a notebook shows in light and in dark: panels, scales of colour, heat maps.

A figure is drawn once: matplotlib gets stand-in colours, and each stand-in becomes a CSS variable. Text stays text, so
that it can be searched, copied and scaled.
"""

import functools
import html
import io
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

INK, MUTED, GRID = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(1, 8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}
WIDTH = 3.9  # inches of 72 units: about the width of a phone, where a panel fills the page
_LIGHT = dict(zip(
    (INK, MUTED, GRID, *SERIES),
    ("#16191d", "#5b6470", "#dfe3e8", "#0072b2", "#d55e00", "#008a65", "#b2558f", "#2f9bd8", "#b87a00", "#6c737c"),
    strict=True,
))  # the colours of a page in light, for files  # fmt: skip
WIDE = 32  # experts beyond which a map is wider
_ENLARGED = 1.3  # most CSS pixels of a unit, so that text has one size on the whole page
MOST_SEGMENTS = 400  # outlines beyond this become pixels, which take less room in the file
_RIGHT = 0.99


class Figure(NamedTuple):
    """One panel: its caption, its SVG, and what `as_files` takes."""

    caption: str
    svg: Markup
    canvas: Any = None


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
    style = f'style="max-width:{_ENLARGED * width / 16:.1f}rem"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg viewBox="0 0 {width:g} {height:g}" {style} {name}>', svg, count=1)
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


def as_files(figure: Figure) -> dict[str, bytes]:
    """A figure for a paper, by suffix "svg" and "pdf", in the colours of a light page, with a legend if it has none."""
    import matplotlib as mpl

    axes = figure.canvas.axes[0]
    if axes.get_legend_handles_labels()[1] and axes.get_legend() is None:
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(figure.caption, fontsize=10, color=INK, loc="left")
    files: dict[str, bytes] = {}
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "x", "text.parse_math": False, "pdf.compression": 0}
    for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        with mpl.rc_context(settings):
            figure.canvas.savefig(buffer, format=suffix, bbox_inches="tight", metadata=metadata)
        content = buffer.getvalue()
        for stand_in, colour in _LIGHT.items():
            old, new = map(_pdf_colour, (stand_in, colour))
            content = content.replace(stand_in.encode(), colour.encode())
            content = re.sub(rb"(\s)".join(old), rb"%b\g<1>%b\g<2>%b" % new, content)
        files[suffix] = content
    return files


def _pdf_colour(colour: str) -> tuple[bytes, ...]:
    """As matplotlib writes it; always as long, so that places in the file stay."""
    return tuple(b"%.10f" % (int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))


class Scale(NamedTuple):
    """Which colour a value gets. Colours change in steps, so that an image is small and a cell can be read off."""

    low: float
    high: float
    colours: tuple[str, ...]  # from low to high, blended; those of categories 0, 1, ... where there are as many steps
    labels: Sequence[tuple[float, str]]  # values that the legend names, with their text
    steps: int = 33

    def colour_map(self) -> Any:
        """As matplotlib takes it."""
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list("scale", list(self.colours), self.steps)

    def legend(self) -> list[tuple[str, str]]:
        """(colour, text) of the values that are named."""
        from matplotlib.colors import to_hex

        colours, span = self.colour_map(), self.high - self.low
        return [(to_hex(colours((value - self.low) / span)), text) for value, text in self.labels]


# The darker the more, so that a print in grey says the same; hues differ for every kind of eye.
_SIGNED = "#f6f2fe", "#cdbdf0", "#a5a1a8", "#c8621a", "#551d00"  # purple, grey in the middle, orange
_FROM_ZERO = "#fff5eb", "#fd8d3c", "#7f2704"
TIMES_UNIFORM = Scale(  # log2(f / uniform), from a quarter and less to four times and more
    -2.0, 2.0, _SIGNED, ((-2, "¼ and less"), (-1, "½"), (0, "uniform (K/E)"), (1, "2"), (2, "4 and more"))
)


def scale_of(arrays: Sequence[np.ndarray], *, diverging: bool) -> Scale:
    """A scale for all of these, around 0 or from 0; its ends are round numbers that hold 99 of 100 values."""
    values = np.concatenate([np.abs(array[np.isfinite(array)]).ravel() for array in arrays] or [np.zeros(0)])
    largest = (float(np.quantile(values, 0.99)) or float(values.max()) if len(values) else 0.0) or 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    end = next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest * (1 - 1e-9))
    if not diverging:
        return Scale(0.0, end, _FROM_ZERO, ((0.0, "0"), (end / 2, f"{end / 2:g}"), (end, f"{end:g} and more")))
    texts = (f"−{end:g} and less", f"−{end / 2:g}", "0", f"+{end / 2:g}", f"+{end:g} and more")
    return Scale(-end, end, _SIGNED, tuple(zip((-end, -end / 2, 0.0, end / 2, end), texts, strict=True)))


def times(values: Any, base: Any) -> np.ndarray:
    """How many times `base` the values are, on `TIMES_UNIFORM`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(np.array(values) / base)


def card(title: str, maps: Sequence[Figure], scale: Scale) -> str:
    """A line of text above heat maps and the legend of their scale: HTML for a notebook."""
    square = '<i style="display:inline-block;width:.8em;height:.8em;border:1px solid #888;background:{}"></i> {}'
    legend = "&emsp;".join(square.format(*entry) for entry in scale.legend())
    figures = "".join(f'<figure style="flex:0 1 26em;margin:.5em 0">{m.caption}{m.svg}</figure>' for m in maps)
    colours = "--ink:currentColor;--muted:currentColor;--line:#8888"
    row = f'<div style="display:flex;flex-wrap:wrap;gap:0 2em">{figures}</div>'
    return f'<div style="{colours}"><code>{html.escape(title)}</code>{row}<small>{legend}</small></div>'


def heat_map(
    values: Any, scale: Scale, caption: str, what: str, *, selected: Any = None, layers: Sequence[int] = ()
) -> Figure:
    """One map of layers x experts, `values` [L, E]; what is not a number gets the colour of 0.

    `selected`: bool [L, E], experts to outline. `layers`: numbers of the rows; () counts from 0. Captions are unique.
    """
    values_LxE = np.array(values, float)
    count, experts = values_LxE.shape
    height = count * float(np.clip(240 / count, 4, 24)) / 72 + 0.5
    names = [layers[row] if len(layers) else row for row in tick_places(count)]
    left = 0.078 + 0.022 * max(len(str(name)) for name in names)
    width = WIDTH if experts <= WIDE else 1.4 * WIDTH
    figure, axes = panel(width, height, (left, _RIGHT, 0.42 / height, 1 - 0.06 / height))
    clipped = np.nan_to_num(np.clip(values_LxE, scale.low, scale.high), nan=0.0)
    colours = {"cmap": scale.colour_map(), "vmin": scale.low, "vmax": scale.high}
    axes.imshow(clipped, **colours, aspect="auto", interpolation="none", origin="lower")
    if selected is not None:
        cell_width = 72 * width * (_RIGHT - left) / experts
        _outline(axes, np.array(selected, bool), float(np.clip(0.12 * cell_width, 0.5, 1.6)))
    axes.set_xticks(tick_places(experts))
    axes.set_yticks(tick_places(count), names)
    axes.tick_params(length=0, labelsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    return Figure(caption, inline(figure, f"{caption}: {what} by layer and expert"), figure)


def tick_places(count: int) -> list[int]:
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
        lines.set_rasterized(len(segments) > MOST_SEGMENTS)
        axes.add_collection(lines)
