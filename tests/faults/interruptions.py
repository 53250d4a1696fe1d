"""Runs that are killed, asked to end, left by their terminal, or out of space, at any moment: they continue, and end in
the numbers of a run that nobody disturbed.
"""

import contextlib
import os
import pty
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.harness import TOLD, Ended, Place, leftovers, numbers, wait

STAGES = (
    ("report", "report:"),
    ("attacks", "relearning of", "quantization of", "router swap of"),
    ("patching", "drift and patching"),
    ("export", "export of", "checkpoints of"),
    ("evaluation", "evaluation of uniform", "evaluation of trace_rows", "trains", "frozen"),
    ("unlearning", "unlearning with", "study: unlearning", "study: tuning"),
    ("calibration", "calibration of", "  gap to", "  note"),
    ("references", "evaluation of the", "text:", "verbatim:", "memorization:", "membership:"),
    ("statistics", "mismatch", "routing"),
    ("target", "target model", "retrained model", "training the", "study: target", "study:"),
    ("data", "data:"),
)
SECONDS = {
    "run": 25.0,
    "short": 12.0,
    "study": 30.0,
    "series": 30.0,
}  # within which a process is interrupted after it began


class Tried(NamedTuple):
    """One fault."""

    fault: str
    stage: str
    problem: str  # what should not have been; "" if nothing


def stage(said: str) -> str:
    """Where a run was when it last said something."""
    for line in reversed(said.splitlines()):
        for name, *starts in STAGES:
            if any(start in line for start in starts):
                return name
    return "start"


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, dict[str, Any]]]:
    """(the master's descriptor, what a process gets so that the terminal is its own)."""
    master, slave = pty.openpty()
    own = {"stdin": slave, "stdout": slave, "first": "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"}
    try:
        yield master, own
    finally:
        for descriptor in (master, slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def interrupted(place: Place, kind: str, workdir: Path, fault: str, after: float) -> tuple[Ended, bool]:
    """(how the process ended, whether the fault came before that); `fault`: the name of a signal, or "terminal"."""
    with terminal() if fault == "terminal" else contextlib.nullcontext((-1, {})) as (master, own):
        process = place.start(kind, workdir, **own)
        began, hit = time.monotonic(), False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        if process.poll() is None:
            hit = True
            os.close(master) if fault == "terminal" else process.send_signal(getattr(signal, fault))
        ended = wait(process)
    assert time.monotonic() - began < 300
    return ended, hit


def problem_of(ended: Ended, fault: str, *, handled: bool) -> str:
    """What is wrong with how an interrupted process ended; "" if nothing. Without handlers a signal kills: before they
    stand, and when all is done.
    """
    if ended.problem or fault == "SIGKILL":
        return ended.problem
    number = signal.SIGHUP if fault == "terminal" else getattr(signal, fault)
    codes = (0, 128 + number, *([-number] * (not handled)))
    if ended.code not in codes:
        return f"exit code {ended.code}: {ended.said[-300:]}"
    return ""


def chains(place: Place, kind: str, faults: list[str], expected: Any, seed: int) -> list[Tried]:
    """Each fault at a random moment of a run, one after the other in one workdir until that is finished."""
    rng, left, tried = random.Random(seed), list(faults), []
    while left:
        workdir = place.folder / f"{kind}-{seed}-{len(left)}"
        since = len(tried)
        while left:
            ended, hit = interrupted(place, kind, workdir, left[0], rng.uniform(1.0, SECONDS[kind]))
            if not hit:
                break
            fault = left.pop(0)
            where = stage(ended.said)
            handled = where != "start" and not (workdir / TOLD[kind]).exists()
            tried.append(Tried(fault, where, problem_of(ended, fault, handled=handled)))
        last = place.run(kind, workdir)
        tried[since:] = [judged(one, last, kind, workdir, expected) for one in tried[since:]]
        shutil.rmtree(workdir)
    return tried


def judged(one: Tried, last: Ended, kind: str, workdir: Path, expected: Any) -> Tried:
    """With what the run that continued afterwards, `last`, ended in."""
    if one.problem:
        return one
    if last.code or last.problem:
        return one._replace(problem=f"could not continue: exit code {last.code}: {last.said[-600:]}")
    if numbers(kind, workdir) != expected:
        return one._replace(problem="other numbers")
    if left := leftovers(workdir):
        return one._replace(problem=f"left behind: {', '.join(left)}")
    return one
