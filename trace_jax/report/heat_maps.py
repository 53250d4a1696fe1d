"""Heat maps of layers by experts, each quantity on one colour scale that its legend states.

Colours change in steps, so that an image takes little room in the page and a cell can be read off the legend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_jax.report.drawing import WIDTH, inline, panel

_STEPS = 33  # colours of a scale
_MOST_SEGMENTS = 400  # outlines beyond this become pixels, which take less room in the file
_RIGHT = 0.99


@dataclasses.dataclass(frozen=True)
class Scale:
    """Which colour a value gets.

    Attributes:
      low, high: ends; what lies beyond gets the colour of the end.
      colours: a colour map of matplotlib, or the colours of the categories 0, 1, ...
      labels: values that the legend names, with their text.
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

        colours = self.colour_map()
        span = self.high - self.low
        return [(to_hex(colours((value - self.low) / span)), text) for value, text in self.labels]


# log2(f / uniform), from a quarter and less to four times and more. Purple and orange differ for every kind of eye.
TIMES_UNIFORM = Scale(
    -2.0, 2.0, "PuOr_r", ((-2, "¼ and less"), (-1, "½"), (0, "uniform (K/E)"), (1, "2"), (2, "4 and more"))
)


def times_uniform(frequency: Any, uniform: float) -> np.ndarray:
    """Frequencies [L, E] on `TIMES_UNIFORM`."""
    with np.errstate(divide="ignore"):
        return np.log2(np.atleast_2d(np.array(frequency, float)) / uniform)


def diverging(arrays: Sequence[np.ndarray]) -> Scale:
    """A scale around 0 for all of these; its ends hold 99 of 100 values."""
    end = _nice(arrays)
    texts = (f"−{end:g} and less", f"−{end / 2:g}", "0", f"+{end / 2:g}", f"+{end:g} and more")
    return Scale(-end, end, "PuOr_r", tuple(zip((-end, -end / 2, 0.0, end / 2, end), texts, strict=True)))


def sequential(arrays: Sequence[np.ndarray]) -> Scale:
    """A scale from 0 for all of these; its end holds 99 of 100 values."""
    end = _nice(arrays)
    return Scale(0.0, end, "Oranges", ((0.0, "0"), (end / 2, f"{end / 2:g}"), (end, f"{end:g} and more")))


def _nice(arrays: Sequence[np.ndarray]) -> float:
    """A round number that is at least the 99th percentile of the absolute values."""
    values = np.concatenate([np.abs(array[np.isfinite(array)]).ravel() for array in arrays] or [np.zeros(0)])
    largest = float(np.quantile(values, 0.99)) if len(values) else 0.0
    largest = largest or float(values.max(initial=0.0)) or 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest * (1 - 1e-9))


def heat_map(
    values: Any, scale: Scale, prefix: str, label: str, *, selected: Any = None, layers: Sequence[int] = ()
) -> str:
    """One map as SVG.

    Args:
      values: [L, E]; what is not a number gets the colour of 0.
      prefix: of ids; unique on the page.  label: what the figure shows, for who can't see it.
      selected: bool [L, E], experts to outline, or None.
      layers: numbers of the rows; () counts from 0.
    """
    values_LxE = np.atleast_2d(np.array(values, float))
    count, experts = values_LxE.shape
    cell = float(np.clip(240 / count, 4, 24)) / 72
    height = count * cell + 0.5
    names = [layers[row] if layers else row for row in ticks(count, 9)]
    left = 0.078 + 0.022 * max(len(str(name)) for name in names)
    figure, axes = panel(WIDTH, height, margins=(left, _RIGHT, 0.42 / height, 1 - 0.06 / height))
    clipped = np.nan_to_num(np.clip(values_LxE, scale.low, scale.high), nan=0.0)
    axes.imshow(
        clipped, cmap=scale.colour_map(), vmin=scale.low, vmax=scale.high, aspect="auto", interpolation="none",
        origin="lower",
    )  # fmt: skip
    if selected is not None:
        cell_width = 72 * WIDTH * (_RIGHT - left) / experts
        _outline(axes, np.atleast_2d(np.array(selected, bool)), float(np.clip(0.12 * cell_width, 0.5, 1.6)))
    axes.set_xticks(ticks(experts, 9))
    axes.set_yticks(ticks(count, 9), names)
    axes.tick_params(length=0, labelsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return inline(figure, prefix, label)


def ticks(count: int, most: int) -> list[int]:
    """At most `most` of 0 to count - 1, from 0 in equal steps."""
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
