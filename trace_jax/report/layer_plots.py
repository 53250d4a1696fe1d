"""Plots of quantities that a model has one of per layer, and of shares that a method has one of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.report.drawing import GRID, INK, MUTED, WIDTH, inline, panel
from trace_jax.report.figures import Style
from trace_jax.report.heat_maps import ticks

_FEW_LAYERS = 8  # up to here points have error bars, above lines have bands
_MOST_BANDS = 4
_HEIGHT = 2.3


def layer_plot(
    quantities: Mapping[str, tuple[Sequence[int], Mapping[str, Any]]],
    styles: Mapping[str, Style],
    prefix: str,
    label: str,
    *,
    original: Mapping[str, Any] | None,
    limits: tuple[float, float | None],
) -> str:
    """A quantity against the layer, one line per method, with 95 % intervals.

    Args:
      quantities: by method, numbers of the layers, and lists "value", "low" and "high".
      prefix: of ids; unique on the page.  label: what the figure shows, for who can't see it.
      original: the same lists of the original model, drawn dotted; None where there is nothing to draw.
      limits: ends of the axis.
    """
    figure, axes = panel(WIDTH, _HEIGHT, margins=(0.125, 0.985, 0.2, 0.96))
    axes.grid(color=GRID, linewidth=0.8)
    layers = list(next(iter(quantities.values()))[0])
    few = len(layers) <= _FEW_LAYERS
    places = np.linspace(-0.25, 0.25, len(quantities) + 2)[1:-1] if few else np.zeros(len(quantities))
    if original is not None:
        level = _array(original["value"])
        if few:
            axes.hlines(level, np.array(layers) - 0.4, np.array(layers) + 0.4, color=INK, linestyle=":", linewidth=1.6)
        else:
            axes.plot(layers, level, color=INK, linestyle=":", linewidth=1.6, zorder=4)
    for (method, (numbers, quantity)), place in zip(quantities.items(), places, strict=True):
        style, x = styles[method], np.array(numbers, float) + place
        value, low, high = (_array(quantity[end]) for end in ("value", "low", "high"))
        if few:
            axes.vlines(x, low, high, color=style.colour, linewidth=1.4, alpha=0.7)
        elif len(quantities) <= _MOST_BANDS:
            axes.fill_between(x, low, high, color=style.colour, alpha=0.16, linewidth=0)
        if few:
            axes.plot(x, value, color=style.colour, linewidth=0.8, alpha=0.35)
            axes.plot(x, value, color=style.colour, linestyle="none", marker=style.marker, markersize=5)
        else:
            axes.plot(x, value, color=style.colour, linestyle=style.dash, linewidth=1.5)
    _layer_axis(axes, layers)
    bottom, top = limits
    room = 0.04 * ((top or 1.0) - bottom)
    axes.set_ylim(bottom - room, None if top is None else top + room)
    axes.locator_params(axis="y", nbins=5)
    return inline(figure, prefix, label)


def before_after_plot(
    layers: Sequence[int], before: Sequence[float], after: Sequence[float], style: Style, prefix: str, label: str, *,
    top: float,
) -> str:  # fmt: skip
    """Two values per layer, before hollow and after filled, joined by a line; the axis goes from 0 to `top`."""
    figure, axes = panel(WIDTH, _HEIGHT, margins=(0.125, 0.985, 0.2, 0.96))
    axes.grid(color=GRID, linewidth=0.8)
    size = 5.5 if len(layers) <= 24 else 3.5
    axes.vlines(layers, before, after, color=style.colour, linewidth=1.4, alpha=0.5)
    axes.plot(layers, before, color=MUTED, marker="o", markersize=size, markerfacecolor="none", linestyle="none")
    axes.plot(layers, after, color=style.colour, marker=style.marker, markersize=size, linestyle="none")
    _layer_axis(axes, list(layers))
    axes.set_ylim(-0.04 * top, 1.06 * top)
    axes.locator_params(axis="y", nbins=5)
    return inline(figure, prefix, label)


def share_plot(shares: Mapping[str, float], styles: Mapping[str, Style], prefix: str, label: str) -> str:
    """A share between 0 and 1 per method: its name above a bar that ends in its marker."""
    height = 0.4 * len(shares) + 0.42
    figure, axes = panel(WIDTH, height, margins=(0.03, 0.96, 0.3 / height, 1 - 0.06 / height))
    axes.spines["left"].set_visible(False)
    for row, (method, share) in enumerate(shares.items()):
        style = styles[method]
        axes.plot([0, 1], [row, row], color=GRID, linewidth=0.8)
        axes.plot([0, share], [row, row], color=style.colour, linewidth=2.5, alpha=0.5)
        axes.plot([share], [row], color=style.colour, marker=style.marker, markersize=6)
        name = method if len(method) <= 40 else f"{method[:39]}…"
        axes.text(0, row - 0.28, f"{name}: {100 * share:.3g} %", color=INK, fontsize=10, va="bottom")
    axes.set_xlim(-0.01, 1.02)
    axes.set_ylim(len(shares) - 0.6, -0.95)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    return inline(figure, prefix, label)


def _layer_axis(axes: Any, layers: list[int]) -> None:
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_xticks([layers[i] for i in ticks(len(layers), 9)])
    axes.set_xlabel("layer")


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, float)
