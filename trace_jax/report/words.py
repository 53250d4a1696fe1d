"""Numbers, names and the verdict in words."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from trace_jax.report.data import Number, ReportData, SummaryRow, known

MISSING = "–"
_ABBREVIATIONS = frozenset({"nll", "auc", "tpr", "fpr", "kl", "js"})


def format_number(value: Any) -> str:
    """A number as people write it: counts with thousands separators, others to three significant places."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, numbers.Real) and not known(float(value))):
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


def format_setting(value: float | None) -> str:
    """A number that somebody chose, without trailing zeros."""
    return MISSING if value is None else f"{value:g}"


def format_share(value: Any) -> str:
    """A share between 0 and 1 as a percentage."""
    return f"{100 * value:.3g} %" if value is not None and known(value) else MISSING


def format_interval(low: Any, high: Any) -> str:
    """`[low, high]`, or nothing where either end is not known."""
    return f"[{format_number(low)}, {format_number(high)}]" if known(low) and known(high) else ""


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
            rows.append((name, ", ".join(str(v) for v in value)))
        else:
            rows.append((name, "not set" if value is None else str(value)))
    return rows


@dataclasses.dataclass(frozen=True)
class Price:
    """What one method paid: its name and the rest of the sentence."""

    method: str
    text: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The opening of the page: what was forgotten, then one sentence per method on its price."""

    opening: str
    prices: list[Price]


def write_verdict(data: ReportData) -> Verdict:
    """What was forgotten and at what price, from the rows alone; a difference comes with what its intervals say."""
    target = next((row for row in data.rows if row.kind == "reference" and row.forgetting), None)
    compared = [row for row in data.rows if row.kind == "method"]
    what = data.forgotten or "the forget corpus"
    if not compared:
        return Verdict(f"To unlearn: {what}. No method has been evaluated yet.", [])
    measure = plain_name(data.forgetting)
    opening = f"Unlearned: {what}."
    if data.level is not None:
        opening += f" Methods are compared where {measure} has come down to {format_setting(data.level)}"
        if target is not None and target.forgetting is not None and known(target.forgetting.value):
            opening += f", from {format_number(target.forgetting.value)} in the {target.method}"
        opening += f" (chance: {format_setting(data.chance)})." if data.chance is not None else "."
    baseline = next((row for row in compared if row.method == data.baseline), None)
    prices = [Price(row.method, _price(row, baseline if row is not baseline else None, measure)) for row in compared]
    return Verdict(opening, prices)


def _price(row: SummaryRow, baseline: SummaryRow | None, measure: str) -> str:
    kept = [
        f"{plain_name(name)} {format_number(number.value)}" + _against(name, number, baseline)
        for name, number in row.utilities.items()
        if known(number.value)
    ]
    prices = _join(kept) if kept else "no utility that was measured"
    if not row.reached:
        lowest = format_number(row.forgetting.value) if row.forgetting else MISSING
        return f"did not get there (lowest {measure}: {lowest}); at that point it has {prices}."
    return f"keeps {prices}."


def _against(name: str, number: Number, baseline: SummaryRow | None) -> str:
    other = baseline.utilities.get(name) if baseline is not None and baseline.reached else None
    if baseline is None or other is None or not known(other.value):
        return ""
    said = {True: ", intervals overlap", False: ", intervals apart", None: ""}[overlap(number, other)]
    return f" ({baseline.method}: {format_number(other.value)}{said})"


def overlap(one: Number, other: Number) -> bool | None:
    """Whether the intervals of two numbers overlap; None if one of them has no interval."""
    ends = (one.low, one.high, other.low, other.high)
    low, high, other_low, other_high = (x if x is not None and known(x) else None for x in ends)
    if low is None or high is None or other_low is None or other_high is None:
        return None
    return low <= other_high and other_low <= high


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
