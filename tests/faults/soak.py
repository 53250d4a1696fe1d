"""A long run takes no more memory, files or memory maps at its end than when it had warmed up."""

import os
import time
from pathlib import Path

from tests.faults.harness import Place, wait
from tests.faults.interruptions import Tried
from trace_jax.io.files import read_lines

STEPS, EVERY = 2000, 5
GROWTH = 0.05  # of memory, from the second quarter to the last


def sizes(pid: int) -> tuple[int, int, int]:
    """Bytes in memory, open files, memory maps of a process."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir(process / "fd")),
        len((process / "maps").read_text().splitlines()),
    )


def soak(place: Place) -> list[Tried]:
    """2,000 steps of a small run with an evaluation every 5."""
    workdir, samples = place.folder / "soak", []
    settings = {"unlearning.steps": STEPS, "unlearning.evaluate_every": EVERY, "unlearning.checkpoint_every": 100}
    settings |= {"methods": "('trace_rows',)", "attacks": None, "evaluation.patching": False}
    process = place.start("run", workdir, *(f"--config.{name}={value}" for name, value in settings.items()))
    method = workdir / "methods" / "trace_rows"
    lines, finished = method / "metrics.jsonl", method / "unlearning.stage.json"
    while process.poll() is None:
        if lines.exists() and not finished.exists():
            try:
                samples.append(sizes(process.pid))
            except (FileNotFoundError, IndexError, ProcessLookupError):
                break
        time.sleep(0.1)
    ended = wait(process)
    evaluations = sum(row["kind"] == "evaluation" for row in read_lines(lines))
    problem = ended.said[-500:] if ended.code else ""
    if evaluations < STEPS // EVERY:
        problem = problem or f"{evaluations} evaluations"
    quarter, tried = len(samples) // 4, []
    # What a save opens is closed again: files and maps are counted at their fewest, where only what is kept is left.
    kinds = {"memory": max, "open files": min, "memory maps": min}
    for (name, of), values in zip(kinds.items(), zip(*samples, strict=True), strict=True):
        before, after = of(values[quarter : 2 * quarter]), of(values[-quarter:])
        grown = f"from {before:,} to {after:,}" if after > before * (1 + GROWTH) else ""
        tried.append(Tried(f"{STEPS:,} steps, {STEPS // EVERY} evaluations: {name}", "a long run", problem or grown))
    return tried
