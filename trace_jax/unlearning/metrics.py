"""What is written along a run: metrics.jsonl, a line for each step and each evaluation, and items.npz, what each item
of the evaluations gave: "steps" i64 [T], "identity", and arrays [T, N] by name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.io.files import append_line, as_path, local_copy, read_lines, remove, replacing
from trace_jax.parallel.processes import is_main

_FILE, _ITEMS = "metrics.jsonl", "items.npz"


class Metrics:
    """The lines and items of one run, `identity`, in `directory`. Process 0 alone reads and writes them."""

    def __init__(self, directory: Path, identity: str):
        self._directory, self._path, self._identity = directory, directory / _FILE, identity

    def trim(self, done: int) -> list[dict]:
        """Drops what other runs wrote, and what belongs to steps after `done`, which comes again. Returns the lines."""
        if not is_main():
            return []
        self.write_items(done + 1 if done else 0, {})
        own = [row for row in read_lines(self._path) if row.get("identity") == self._identity] if done else []
        rows = [row for row in own if row["step"] <= done]
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

    def write_items(self, step: int, items: Mapping[str, np.ndarray]) -> None:
        """Drops what is there of `step` and later ones, and adds what each item gave at `step`, if there is anything:
        arrays [N] of the same names and lengths every time.
        """
        if not is_main():
            return
        steps, before = read_items(self._directory, self._identity) or (np.zeros(0, np.int64), {})
        arrays = {name: list(values[steps < step]) for name, values in {"steps": steps, **before}.items()}
        if items:
            more = {"steps": step, **items}
            arrays = {name: [*arrays.get(name, ()), np.asarray(value)] for name, value in more.items()}
        if not arrays["steps"]:
            remove(self._directory / _ITEMS)
            return
        stacked: dict[str, Any] = {name: np.stack(values) for name, values in arrays.items()}
        with replacing(self._directory / _ITEMS) as temporary:
            np.savez_compressed(temporary, identity=np.array(self._identity), **stacked)


def read_items(
    directory: str | os.PathLike, identity: str | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """Steps i64 [T] of a run's evaluations, and what each item gave at them, [T, N] by name; None if that is not kept,
    or is of another run than `identity`.
    """
    path = as_path(directory) / _ITEMS
    if not path.exists():
        return None
    with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
        items = dict(file)
    steps, identity_of = items.pop("steps"), str(items.pop("identity"))
    return (steps, items) if identity in (None, identity_of) else None


def front_rows(directory: str | os.PathLike, identity: str | None = None) -> list[dict]:
    """Evaluations of a run in the order of its steps: [{"step", "evaluation": {...}}]."""
    rows = read_lines(as_path(directory) / _FILE)
    return [row for row in rows if "evaluation" in row and identity in (None, row.get("identity"))]
