"""What a person sees of a run: progress (a bar on a terminal, else plain lines), tables, numbers and names as text."""

import contextlib
import contextvars
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from trace_jax.parallel.processes import is_main

MISSING = "–"
_SECONDS_BETWEEN_LINES = 15.0
_WORTH_SAYING = 3.0  # seconds
_ABBREVIATIONS = frozenset({"nll", "auc", "tpr", "fpr", "kl", "js"})


_quiet = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Within it nothing is said and no bar is shown, if `wanted`."""
    before = _quiet.set(wanted or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(before)


def say(text: str) -> None:
    """One line for the person at the keyboard (stderr, so that results on stdout stay clean), from process 0."""
    if is_main() and not _quiet.get():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(title: str) -> Iterator[None]:
    """Says how long what is done within it took, where that is more than a moment."""
    began = time.monotonic()
    yield
    if (seconds := time.monotonic() - began) >= _WORTH_SAYING:
        say(f"{title}: done in {duration(seconds)}")


@contextlib.contextmanager
def progress(
    title: str, total: int, *, start: int = 0, unit: str = "step", first: str = ""
) -> Iterator[Callable[[int, str], None]]:
    """Yields `advance(done, note)`. `start` is what an earlier, interrupted run had done already; `first` is what goes
    on until the first is done, whose time is none of the others'.
    """
    began, base, spoken = time.monotonic(), start, time.monotonic()
    units = unit + ("es" if unit == "batch" else "s")
    columns: list[Any] = ["{task.description}", BarColumn(), MofNCompleteColumn(), units]
    columns += [TimeElapsedColumn(), "{task.fields[note]}"]
    silent = _quiet.get() or not (sys.stderr.isatty() and is_main())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task(title, total=total, completed=start, note=first)
        if bar.disable and first:
            say(f"{title}: {first}")

        def advance(done: int, note: str = "") -> None:
            nonlocal began, base, spoken
            now, about = time.monotonic(), [note] * bool(note)
            if first and base == start < done:
                began, base = now, done
            if done > base and now - began >= 1.0:  # steps are dispatched ahead: earlier it would be that rate
                each = (now - began) / (done - base)
                rate = f"{1 / each:.1f}/s" if each < 1 else f"{duration(each)} each"
                left = [f"{duration(max(1, round((total - done) * each)))} left"] * (done < total)
                about = [rate, *left, *about]
            bar.update(task, completed=done, note=", ".join(about))
            if bar.disable and now - spoken >= _SECONDS_BETWEEN_LINES:  # logs of pods and notebooks stay readable
                spoken = now
                say(", ".join([f"{title}: {done}/{total} {units}", *about]))

        yield advance


def tracked(batches: Iterable[Any], title: str, total: int) -> Iterator[Any]:
    """Hands `batches` on with progress, for passes over a corpus."""
    with progress(title, total, unit="batch") as advance:
        for done, batch in enumerate(batches):
            advance(done, "")
            yield batch


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table: the first `left` columns to the left, the others to the right; a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths))
    first, *lines = (line.format(*row) for row in rows)
    return [first.rstrip(), "-" * len(first), *(line.rstrip() for line in lines)]


def duration(seconds: float | None) -> str:
    """Seconds in a unit that suits them."""
    if seconds is None:
        return "-"
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
    scale, unit = (1, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{seconds / scale:.3g} {unit}"


def byte_size(count: float | None) -> str:
    """Bytes in a unit that suits them; a dash where there is no number."""
    for unit, scale in {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}.items():
        if count is not None and count >= scale:
            return f"{count / scale:.2f} {unit}"
    return "-" if count is None else f"{count:.0f} B"


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
        if isinstance(value, (list, tuple)):  # of sections: each by its place
            sections = bool(value) and isinstance(value[0], Mapping)
            value = dict(enumerate(value)) if sections else ", ".join(map(str, value)) or "none"
        row = f"{prefix}{key}", "not set" if value is None else str(value)
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [row]
    return rows
