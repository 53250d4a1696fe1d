"""Scores on disk: what a model gave is computed once, and again only when the model or the task is another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.evaluation.task import TaskScores
from trace_jax.io.files import local_copy, replacing
from trace_jax.io.progress import say
from trace_jax.parallel.agreement import main_says
from trace_jax.parallel.processes import barrier

_IDENTITY = "identity"


@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """Scores of one model: NAME.npz per task, and NAME.PART.jsonl for whoever wants to check single items.

    `model` is the hash of what made the model.
    """

    directory: Path
    model: str

    def keep(self, name: str, task: str, make: Callable[[], TaskScores]) -> TaskScores:
        """What is kept of a task whose hash is `task`, else what `make` gives, which is kept from now on.

        Kept scores come back without their items; these stay in their files.
        """
        file, identity = self.directory / f"{name}.npz", f"{self.model}/{task}"
        kept = _read(file)
        if main_says(kept.get(_IDENTITY) == identity):
            say(f"{name}: its scores are kept from before")
            barrier(f"{name}: scores")
            return TaskScores({key: value for key, value in kept.items() if key != _IDENTITY})
        scores = make()
        for part, lines in scores.items.items():
            with replacing(self.directory / f"{name}.{part}.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        named: dict[str, Any] = {**scores.arrays, _IDENTITY: np.array(identity)}
        with replacing(file) as temporary:
            np.savez_compressed(temporary, **named)
        barrier(f"{name}: scores")  # all processes read them later
        return scores


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    with local_copy(file) as local, np.load(local, allow_pickle=False) as arrays:
        found = dict(arrays)
    return {**found, _IDENTITY: str(found.get(_IDENTITY, ""))}


def flat_arrays(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of nested mappings and dataclasses by path; None is left out. A key that is a tuple is a path."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        path = prefix + ("/".join(key) if isinstance(key, tuple) else key)
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            flat |= flat_arrays(value, f"{path}/")
        elif value is not None:
            flat[path] = np.asarray(value)
    return flat


def grouped_arrays(flat: Mapping[str, np.ndarray], prefix: str, depth: int) -> dict[tuple[str, ...], dict[str, Any]]:
    """The arrays below `prefix`, which is followed by `depth` keys and a field's name: per keys, per field."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, value in flat.items():
        top, *keys = path.split("/")
        if top == prefix:
            groups.setdefault(tuple(keys[:depth]), {})["/".join(keys[depth:])] = value
    return groups
