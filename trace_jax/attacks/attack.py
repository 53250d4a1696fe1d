"""What an attack is given, and what it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from trace_jax.data.config import DataConfig
from trace_jax.data.corpora import Corpora
from trace_jax.data.tokenizer import Vocabulary
from trace_jax.evaluation.measurement import Measurement, find
from trace_jax.evaluation.task import SPLIT, Evaluator, ScoreStore
from trace_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Control:
    """A model that never saw the forget set. What an attack makes of it is the same for all methods of a run.

    Attributes:
      load: reads it.
      directory: of its files. identity: hash of everything that made it, and of the attack's settings.
    """

    load: Callable[[], Model]
    directory: Path
    identity: str


@dataclasses.dataclass(frozen=True)
class Case:
    """An unlearned model under attack, and what it is measured with.

    Attributes:
      original: the model before unlearning. unlearned: the model that is attacked; neither is changed.
      evaluator: measures relative to the original (and the retrained) model.
      directory: of this attack's files. identity: hash of everything that made the unlearned model and of the settings.
      control: the model that never saw the forget set, if there is one.
    """

    original: Model
    unlearned: Model
    corpora: Corpora
    data: DataConfig
    evaluator: Evaluator
    mesh: Mesh
    seed: int
    directory: Path
    identity: str
    control: Control | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """Of both models: they read text alike."""
        return Vocabulary(self.corpora.tokenizer, self.original.special, self.original.config.vocab_size)

    def measure(self, params: Any, name: str) -> list[Measurement]:
        """Everything that is measured on a model, with its scores kept under `name`."""
        model, store = self.unlearned.replace(params=params), ScoreStore(self.directory / name, self.identity)
        return self.evaluator.measure(self.evaluator.score(model, full=True, store=store))


@dataclasses.dataclass(frozen=True)
class Point:
    """What was measured in one form of an attack.

    Attributes:
      at: the form in words, such as "4 bits" or "50 steps".
      measurements: of the attacked model.
      original: of the original model in the same form, where the attack changes what is asked.
      retrained: of the model that never saw the forget set, where the attack teaches: what anyone learns from it.
    """

    at: str
    measurements: Sequence[Measurement]
    original: Sequence[Measurement] = ()
    retrained: Sequence[Measurement] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dict for NAME.json."""
        lists = {"measurements": self.measurements, "original": self.original, "retrained": self.retrained}
        return {"at": self.at, **{name: [m.to_json() for m in found] for name, found in lists.items() if found}}


class Attack(Protocol):
    """A function that attacks a model in one or several forms."""

    def __call__(self, settings: Any, case: Case) -> list[Point]: ...


def strongest(points: Sequence[Point], measure: str) -> int | None:
    """Place of the point at which most came back: the largest value of `measure` on test; the first of equal ones.

    None where no point has that measurement.
    """
    found = [find(point.measurements, measure, SPLIT) for point in points]
    places = [place for place, measurement in enumerate(found) if measurement is not None]
    return max(places, key=lambda place: found[place].value, default=None)  # pyright: ignore[reportOptionalMemberAccess]
