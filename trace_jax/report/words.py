"""Numbers and names in words."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

MISSING = "–"
_ABBREVIATIONS = frozenset({"nll", "auc", "tpr", "fpr", "kl", "js"})

Number = Mapping[str, Any]  # an estimate as results.json has it: value, n, low and high; None where it isn't known


def format_number(value: Any) -> str:
    """A number as people write it: counts with thousands separators, others to three significant places."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, numbers.Real) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if not isinstance(value, numbers.Real):
        return str(value)
    size = abs(float(value))
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.2g}"
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{decimals}f}"


def format_share(value: float | None) -> str:
    """A share between 0 and 1 as a percentage."""
    return MISSING if value is None else f"{100 * value:.3g} %"


def format_interval(low: float | None, high: float | None) -> str:
    """`[low, high]`, or nothing where either end is not known."""
    return "" if low is None or high is None else f"[{format_number(low)}, {format_number(high)}]"


def plain_name(name: str) -> str:
    """`neighbour_accuracy` as `neighbour accuracy`, `forget_nll` as `forget NLL`."""
    return " ".join(word.upper() if word in _ABBREVIATIONS else word for word in name.split("_"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a nested mapping, as the command line spells them."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            rows += flatten(value, name)
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append((name, "not set" if value is None else str(value)))
    return rows


def overlap(one: Number, other: Number) -> bool | None:
    """Whether the intervals of two numbers overlap; None if one of them has no interval."""
    if None in (one["low"], one["high"], other["low"], other["high"]):
        return None
    return one["low"] <= other["high"] and other["low"] <= one["high"]
