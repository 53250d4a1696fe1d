"""What every figure of the report is drawn with: panels as inline SVG.

The figures are drawn once and read in a light and in a dark page: matplotlib gets stand-in colours, and each stand-in
becomes a CSS variable of the page. Text stays text, so that it can be searched, copied and scaled.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from typing import Any

INK, MUTED, GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"}
SERIES = tuple(f"#0a0c{i:02x}" for i in range(7))
_VARIABLES |= {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}
WIDTH = 3.9  # inches of 72 units: about the width of a phone, where a panel fills the page


@dataclasses.dataclass(frozen=True)
class Figure:
    """One panel: its caption and its SVG."""

    caption: str
    svg: str


def panel(width: float, height: float, *, margins: tuple[float, float, float, float]) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches; margins are left, right, bottom and top of the axes, as shares."""
    from matplotlib.figure import Figure as Canvas  # here, because importing matplotlib takes a second

    left, right, bottom, top = margins
    figure = Canvas(figsize=(width, height))
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=10, width=0.8)
    axes.xaxis.label.set(color=INK, fontsize=10.5)
    axes.yaxis.label.set(color=INK, fontsize=10.5)
    return figure, axes


def inline(figure: Any, prefix: str, label: str) -> str:
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
    svg = re.sub(r'\bd="[^"]*"', _rounded, svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _rounded(path: re.Match[str]) -> str:
    """Path data in hundredths of a unit, without line breaks: half the length."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), path[0]).replace(
        "\n", ""
    )
