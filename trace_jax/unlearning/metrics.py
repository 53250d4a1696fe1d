"""What is written along a run: metrics.jsonl (docs/tracking.md), and items.npz, what each item of the evaluations gave:
"steps" i64 [T], "identity", and arrays [T, N] by name.

A line's "checksum" is the CRC of the line and of the one before it, so that a line that was changed or lost is noticed;
that of an evaluation covers its items, too.
"""

import collections
import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.io import files
from trace_jax.io.tracking import Tracker
from trace_jax.parallel.processes import is_main

_FILE, _ITEMS = "metrics.jsonl", "items.npz"
_HEAD, _SUM = ("kind", "step", "identity"), "checksum"  # of every line


class Metrics:
    """The lines and items of one run, `identity`, in `directory`. Process 0 alone reads and writes them, and shows the
    lines of one that was trimmed to the `tracker`.
    """

    def __init__(self, directory: Path, identity: str, tracker: Tracker | None = None):
        self._directory, self._path, self._identity = directory, directory / _FILE, identity
        self._tracker, self._sum, self._items = tracker, 0, {}

    def _intact(self) -> list[tuple[dict, dict[str, np.ndarray]]]:
        """(line, its items) of this run's lines up to the first that isn't as it was written."""
        steps, arrays = read_items(self._directory, self._identity)
        intact, before = [], 0
        for row in files.read_lines(self._path):
            if row.get("identity") == self._identity:
                evaluated = arrays if row["kind"] == "evaluation" else {}
                items = {name: values[steps == row["step"]] for name, values in evaluated.items()}
                if row.get(_SUM) != (before := _checksum(row, items, before)):
                    break
                intact.append((row, items))
        return intact

    def whole(self, done: int) -> bool:
        """Whether what was written until `done` steps were done is there as it was; process 0 alone knows."""
        with contextlib.suppress(ValueError):  # of what can't be read
            return not is_main() or any((row["kind"], row["step"]) == ("step", done) for row, _ in self._intact())
        return False

    def trim(self, done: int) -> list[dict]:
        """Drops what other runs wrote, and what belongs to steps after `done`, which comes again. Returns the lines."""
        if not is_main():
            return []
        if not done:
            files.remove(self._directory / _ITEMS)
        intact = self._intact() if done else []
        self.write_items(done + 1, {})
        ended = {row["step"] for row, _ in intact if row["kind"] == "evaluation"}  # others were cut short
        self._sum, own = 0, []
        with files.replacing(self._path) as temporary:
            temporary.touch()
            for row, items in intact:
                if row["step"] <= done and (row["kind"] != "measurement" or row["step"] in ended):
                    self._append(temporary, row, items)
                    own.append(row)
        if self._tracker is not None:
            self._tracker.begin(done, {(row["kind"], row["step"]) for row, _ in intact})
        return own

    def _append(self, path: Path, row: Mapping[str, Any], items: Mapping[str, np.ndarray]) -> None:
        self._sum = _checksum(row, items, self._sum)
        files.append_line(path, {**row, _SUM: self._sum})

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line."""
        if is_main():
            head = dict(zip(_HEAD, (kind, step, self._identity), strict=True))
            row = {**head, **values, **head}
            self._append(self._path, row, self._items if kind == "evaluation" else {})
            if self._tracker is not None:
                self._tracker.line(row)

    def write_items(self, step: int, items: Mapping[str, np.ndarray]) -> None:
        """Drops what is there of `step` and later ones, and adds what each item gave at `step`, if there is anything:
        arrays [N] of the same names and lengths every time.
        """
        if not is_main():
            return
        self._items = {name: np.asarray(value)[None] for name, value in items.items()}
        steps, before = read_items(self._directory, self._identity)
        arrays = {name: list(values[steps < step]) for name, values in {"steps": steps, **before}.items()}
        if items:
            more = {"steps": step, **items}
            arrays = {name: [*arrays.get(name, ()), np.asarray(value)] for name, value in more.items()}
        if not arrays["steps"]:
            files.remove(self._directory / _ITEMS)
            return
        stacked: dict[str, Any] = {name: np.stack(values) for name, values in arrays.items()}
        files.write_arrays(self._directory / _ITEMS, {"identity": np.array(self._identity), **stacked})


def _checksum(row: Mapping[str, Any], items: Mapping[str, np.ndarray], before: int) -> int:
    plain = {name: value for name, value in row.items() if name != _SUM}
    for part in (json.dumps(plain).encode(), *(items[name].tobytes() for name in sorted(items))):
        before = zlib.crc32(part, before)
    return before


def read_items(directory: str | os.PathLike, identity: str | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps i64 [T] of a run's evaluations, and what each item gave at them, [T, N] by name; nothing if that is not
    kept, or is of another run than `identity`.
    """
    path = files.as_path(directory) / _ITEMS
    items = files.read_arrays(path) if path.exists() else {}
    if not items or identity not in (None, str(items["identity"])):
        return np.zeros(0, np.int64), {}
    del items["identity"]
    return items.pop("steps"), items


def front_rows(directory: str | os.PathLike, identity: str | None = None) -> list[dict]:
    """Evaluations of a run in the order of its steps: [{"step", "evaluation": [{...}, ...]}]."""
    rows, measured = [], collections.defaultdict(list)
    for row in files.read_lines(files.as_path(directory) / _FILE):
        if identity not in (None, row.get("identity")):
            continue
        if (kind := row["kind"]) == "measurement":
            measured[row["step"]].append({name: value for name, value in row.items() if name not in (*_HEAD, _SUM)})
        elif kind == "evaluation":
            row.pop(_SUM, None)
            rows.append({"evaluation": measured.pop(row["step"], []), **row})
    return rows


def step_rows(directory: str | os.PathLike, identity: str | None = None) -> list[dict]:
    """What is written of each step of a run, {"step", "time", "loss", ...}, since it began."""
    rows = files.read_lines(files.as_path(directory) / _FILE)
    own = [row for row in rows if row["kind"] == "step" and identity in (None, row.get("identity"))]
    return [{name: value for name, value in row.items() if name not in ("kind", "identity", _SUM)} for row in own]
