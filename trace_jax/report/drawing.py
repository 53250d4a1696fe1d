"""What every figure of the report is drawn with: panels as inline SVG, how methods look, and scales of colour.

The figures are drawn once and read in a light and in a dark page: matplotlib gets stand-in colours, and each stand-in
becomes a CSS variable of the page. Text stays text, so that it can be searched, copied and scaled.
"""

import dataclasses
import html
import io
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

INK, MUTED, GRID = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(7))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}
WIDTH = 3.9  # inches of 72 units: about the width of a phone, where a panel fills the page
_NEUTRAL = 6  # the grey of the series: the baseline
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_STEPS = 33  # colours of a scale


class Figure(NamedTuple):
    """One panel: its caption and its SVG."""

    caption: str
    svg: Markup


def panel(width: float, height: float, *, margins: tuple[float, float, float, float]) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches; margins are left, right, bottom and top of the axes, as shares."""
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
    svg = re.sub(
        r'\bd="[^"]*"',
        lambda d: re.sub(r"-?\d+\.\d+", lambda x: f"{round(float(x[0]), 2):g}", d[0]).replace("\n", ""),
        svg,
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)


class Style(NamedTuple):
    """How one method is drawn everywhere, as matplotlib's `plot` takes it."""

    color: str
    marker: str
    linestyle: str = "-"


def method_styles(methods: Iterable[str], baseline: str) -> dict[str, Style]:
    """A style per method: the baseline is grey, the others differ in colour and marker, then in dash."""
    styles, number = {}, 0
    for method in dict.fromkeys(methods):
        turn, index = (0, _NEUTRAL) if method == baseline else divmod(number, _NEUTRAL)
        number += method != baseline
        styles[method] = Style(SERIES[index], _MARKERS[(index + turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)])
    return styles


def swatch(style: Style, name: str) -> Markup:
    """A short line with the method's marker, for a legend; `name` is unique on the page."""
    figure, axes = panel(0.45, 0.2, margins=(0.0, 1.0, 0.0, 1.0))
    axes.plot([0, 1, 2], [0, 0, 0], **style._asdict(), markevery=[1], markersize=6, linewidth=2)
    axes.set_axis_off()
    axes.set_ylim(-1, 1)
    return inline(figure, name, hidden=True)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Which colour a value gets. Colours change in steps, so that an image is small and a cell can be read off.

    `colours`: a colour map of matplotlib from `low` to `high`, or colours of the categories 0, 1, ...; `labels`: values
    that the legend names, with their text.
    """

    low: float
    high: float
    colours: str | tuple[str, ...]
    labels: Sequence[tuple[float, str]]

    def colour_map(self) -> Any:
        """As matplotlib takes it."""
        import matplotlib as mpl
        from matplotlib.colors import ListedColormap

        if isinstance(self.colours, str):
            return mpl.colormaps[self.colours].resampled(_STEPS)
        return ListedColormap(list(self.colours))

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
