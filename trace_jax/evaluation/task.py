"""What an external benchmark is to an evaluator: something that scores a model, and measures its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from trace_jax.evaluation.measurement import Measurement
from trace_jax.models.model import Model

SPLIT = "test"  # published benchmarks have one split, and it is for reporting


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What one model gave on one task.

    Attributes:
      arrays: per-item results by name, everything that `Task.measure` reads.
      items: lines of JSON per part of the task, for whoever wants to check a number. Never hazardous text.
    """

    arrays: Mapping[str, np.ndarray]
    items: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """A benchmark. Scoring runs the model; measuring is arithmetic on scores, and may compare models."""

    @property
    def name(self) -> str:
        """Prefix of its measurements' names, and name of its files."""
        ...

    @property
    def quick(self) -> bool:
        """Whether it is cheap enough to be scored at every evaluation while unlearning."""
        ...

    @property
    def identity(self) -> str:
        """Hash of its data and settings: scores of a model hold as long as it stays the same."""
        ...

    def score(self, model: Model, *, batch_size: int, mesh: Mesh | None) -> TaskScores:
        """Runs the model over the task."""
        ...

    def measure(
        self,
        scores: TaskScores,
        *,
        original: TaskScores | None,
        retrained: TaskScores | None,
        resamples: int,
        seed: int,
    ) -> list[Measurement]:
        """Measurements of scores, relative to the original and the retrained model's where these are given."""
        ...
