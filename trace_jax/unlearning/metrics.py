"""metrics.jsonl: a line for each step and each evaluation of a run."""

from __future__ import annotations

import os
from pathlib import Path

from trace_jax.files import append_line, as_path, read_lines, replacing
from trace_jax.parallel.hosts import is_main

_FILE = "metrics.jsonl"


class Metrics:
    """The lines of one run, `identity`, in `directory`. Process 0 alone reads and writes them."""

    def __init__(self, directory: Path, identity: str):
        self._path, self._identity = directory / _FILE, identity

    def trim(self, done: int) -> list[dict]:
        """Drops lines of other runs, and of steps after `done`, which are written again. Returns the rest."""
        if not is_main():
            return []
        rows = []
        if done:
            rows = [r for r in read_lines(self._path) if r.get("identity") == self._identity and r["step"] <= done]
        with replacing(self._path) as temporary:
            temporary.touch()
            for row in rows:
                append_line(temporary, row)
        return rows

    def has(self, step: int, name: str) -> bool:
        """Whether there is a line of `step` with a value of that name, of whichever run; process 0 alone knows."""
        return is_main() and any(row["step"] == step and name in row for row in read_lines(self._path))

    def write(self, step: int, **values) -> None:
        """Adds a line."""
        if is_main():
            append_line(self._path, {"step": step, "identity": self._identity, **values})


def front_rows(directory: str | os.PathLike, identity: str | None = None) -> list[dict]:
    """Evaluations of a run in the order of its steps: [{"step", "evaluation": {...}}]."""
    rows = read_lines(as_path(directory) / _FILE)
    return [row for row in rows if "evaluation" in row and identity in (None, row.get("identity"))]
