"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trace_jax.parallel.processes import is_main

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 15.0


def say(text: str) -> None:
    """One line for the person at the keyboard (stderr, so that results on stdout stay clean), from process 0."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(title: str, total: int, *, start: int = 0, unit: str = "step") -> Iterator[Callable[[int, str], None]]:
    """Yields `advance(done, note)`. `start` is what an earlier, interrupted run had done already."""
    if not (sys.stderr.isatty() and is_main()):
        yield _plain(title, total, start, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + ("es" if unit == "batch" else "s") + "  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=start, rate="", note="")
        began = time.monotonic()

        def advance(done: int, note: str = "") -> None:
            rate = (done - start) / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:.1f}/s", note=note)

        yield advance


def tracked(batches: Sequence[T] | Iterator[T], title: str, total: int) -> Iterator[T]:
    """Hands `batches` on with progress, for passes over a corpus."""
    with progress(title, total, unit="batch") as advance:
        for done, batch in enumerate(batches):
            advance(done, "")
            yield batch


def _plain(title: str, total: int, start: int, unit: str) -> Callable[[int, str], None]:
    """Lines at most every few seconds: logs of pods and notebooks stay readable."""
    began = last = time.monotonic()

    def advance(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = (done - start) / max(now - began, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        plural = unit + ("es" if unit == "batch" else "s")
        say(f"{title}: {done}/{total} {plural}, {rate:.1f}/s, {left:.0f} s left {note}".rstrip())

    return advance
