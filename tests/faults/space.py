"""A full disk, a quota, a directory that can't be written: one sentence, nothing half-written, and it goes on."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.harness import Ended, Place, wait
from tests.faults.interruptions import Tried, judged, stage

DISK = 1100 << 20  # bytes; a run asks for a gibibyte before it begins


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own in memory. PermissionError where this user can't mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("only root can mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(place: Place, kind: str, expected: Any, *, after: float) -> Tried | None:
    """The disk fills up so many seconds after the run began, but for a few kilobytes."""
    with small_disk(place.folder / f"disk-{kind}-{after:.3f}") as disk:
        workdir, filler = disk / "run", disk / "filler"
        process = place.start(kind, workdir)
        time.sleep(after)
        if process.poll() is not None:
            return None  # it came too late
        with filler.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - 4096, 1))
        ended = wait(process)
        filler.unlink()
        reasons = "No space left on device", "GB free", "are free there"  # it may be noticed before anything is written
        one = Tried("full disk", stage(ended.said), told(ended, *reasons))
        return judged(one, place.run(kind, workdir), kind, workdir, expected)


def quota(place: Place, kind: str, expected: Any, *, largest: int) -> Tried:
    """No file may be larger than so many bytes."""
    workdir = place.folder / f"quota-{kind}-{largest}"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest}))"
    ended = place.run(kind, workdir, first=limit)
    one = Tried("quota", stage(ended.said), told(ended, "File too large"))
    return judged(one, place.run(kind, workdir), kind, workdir, expected)


def read_only(place: Place, kind: str, expected: Any, *, after: float) -> Tried | None:
    """Nothing can be written any more so many seconds after the run began; 0: from its start."""
    with small_disk(place.folder / f"read-only-{kind}-{after:.3f}") as disk:
        workdir = disk / "run"
        if not after:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        process = place.start(kind, workdir)
        time.sleep(after)
        if process.poll() is not None:
            return None
        # Files that are open for writing keep a disk from being remounted.
        while after and subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
            time.sleep(0.01)
        ended = wait(process)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        one = Tried("read-only", stage(ended.said), told(ended, "Read-only file system"))
        return judged(one, place.run(kind, workdir), kind, workdir, expected)


def told(ended: Ended, *reasons: str) -> str:
    """What is wrong with how a run ended that could not write; "" if it said so in a sentence, or needed no space."""
    if ended.problem:
        return ended.problem
    if ended.code != 0 and (ended.code != 2 or not any(why in ended.sentence for why in reasons)):
        return f"exit code {ended.code}, said: {ended.said[-600:]}"
    return ""
