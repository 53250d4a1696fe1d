"""Predictions as text."""

from __future__ import annotations

from collections.abc import Sequence

from trace_jax.plan.chips import GIB
from trace_jax.plan.prediction import Prediction

_BOUNDS = {"compute": "matmul rate", "memory": "memory bandwidth", "interconnect": "interconnect"}


def program_table(predictions: Sequence[Prediction], *, chips: int, price: float | None) -> str:
    """One column per program, one row per quantity, all of one chip."""
    rows = [("per chip", *(p.program for p in predictions))]

    def row(name: str, text) -> None:
        rows.append((name, *(text(p) for p in predictions)))

    row("parameters", lambda p: size(p.parameters))
    row("optimizer, its weights", lambda p: size(p.optimizer))
    row("batch, cache, padding", lambda p: size(p.inputs))
    row("activations, temporaries", lambda p: size(p.temporaries))
    row("peak memory", lambda p: size(p.peak))
    row("of capacity", lambda p: f"{p.peak / p.capacity:.1%}" + ("" if p.fits else " DOESN'T FIT"))
    row("matmul operations", lambda p: operations(p.flops))
    row("memory traffic", lambda p: size(p.memory_bytes))
    for kind in dict.fromkeys(e.kind for p in predictions for e in p.exchanges):
        row(kind, lambda p, kind=kind: _exchange(p, kind))
    for name, words in _BOUNDS.items():
        row(f"time at {words}", lambda p, name=name: duration(p.seconds.get(name)))
    row("time, all overlapping", lambda p: duration(p.least if p.seconds else None))
    row("time, nothing overlapping", lambda p: duration(p.most if p.seconds else None))
    row("bound by", lambda p: _BOUNDS[p.bound] if p.seconds else "-")
    row("tokens/s, all chips", lambda p: f"{p.tokens / p.least:,.0f} at most" if p.seconds else "-")
    if price is not None:
        row("cost of 1,000 times", lambda p: cost(p, chips, price))
    row("compiled in", lambda p: duration(p.compile_seconds))
    return aligned(rows)


def search_table(found: Sequence[tuple[str, Prediction]], *, chips: int, price: float | None) -> str:
    """One row per layout, as they come."""
    rows: list[tuple[str, ...]] = [
        (
            "mesh, microbatches",
            "peak memory",
            "of capacity",
            "least time",
            "bound by",
            "no overlap",
            "cost of 1,000 steps",
        )
    ]
    for name, p in found:
        share = f"{p.peak / p.capacity:.1%}" + ("" if p.fits else " DOESN'T FIT")
        times = (duration(p.least), _BOUNDS[p.bound], duration(p.most)) if p.seconds else ("-", "-", "-")
        rows.append((name, size(p.peak), share, *times, "-" if price is None else cost(p, chips, price)))
    return aligned(rows)


def cost(p: Prediction, chips: int, price: float) -> str:
    """Of 1,000 runs, from perfect overlap to none, in the unit of `price` per chip and hour."""
    if not p.seconds:
        return "-"
    least, most = (1000 * chips * price * seconds / 3600 for seconds in (p.least, p.most))
    return f"{least:.2f} to {most:.2f}"


def size(count: float | None) -> str:
    """Bytes in a unit that suits them."""
    if count is None:
        return "-"
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def operations(count: float) -> str:
    """Floating-point operations in a unit that suits them."""
    unit, scale = ("TFLOP", 1e12) if count >= 1e12 else ("GFLOP", 1e9)
    return f"{count / scale:.4g} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds in a unit that suits them."""
    if seconds is None:
        return "-"
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _exchange(p: Prediction, kind: str) -> str:
    exchange = next((e for e in p.exchanges if e.kind == kind), None)
    return "-" if exchange is None else f"{exchange.count:,} x, {size(exchange.bytes)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first flush left, the others flush right; a line below the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
