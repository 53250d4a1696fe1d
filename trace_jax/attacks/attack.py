"""What an attack is, what it is given, and what it gives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from trace_jax.config import Section, as_dict
from trace_jax.data.corpora import Corpora, DataConfig
from trace_jax.data.sources import revision_of
from trace_jax.evaluation.intervals import Measurement, find
from trace_jax.evaluation.likelihood import NonFiniteScore
from trace_jax.evaluation.task import SPLIT, Evaluator, ScoreStore
from trace_jax.models.model import Model, TextCodec
from trace_jax.routing.statistics import Assignments


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
        return {"at": self.at} | {name: [m.to_json() for m in measured] for name, measured in lists.items() if measured}


class Attack(Section):
    """Settings of an attack, and what it does. `trace_jax.attacks` names them all."""

    @property
    def source(self) -> str | None:
        """A text of the user's own that the attack reads (`trace_jax.data.sources.read_records`), if any."""
        return None

    @property
    def revisions(self) -> list[str]:
        """Of that text: another one makes the attack anew."""
        return [revision_of(self.source)] if self.source else []

    def check_source(self) -> None:
        """Reads the text, long before the attack does. Raises DataError: it isn't there, or has another form."""

    def prepare(self, context: "Context") -> Any:
        """What the attack makes once for all methods of a run (`Context.prepared`), before anything is unlearned.

        Raises:
          ConfigError: the attack asks for more than the model reads at once, or than there is.
        """

    def points(self, case: "Case") -> list[Point]:
        """Attacks an unlearned model in one or several forms."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Context:
    """What an attack has, whichever method of a run made the unlearned model.

    Attributes:
      original: the model before unlearning.
      evaluator: measures relative to the original (and the retrained) model.
      directory: of files that all methods share. identity: hash of everything that they depend on.
      original_routing: where the original model sends the forget rows, thinned to `evaluation.max_rows`.
      load_retrained: reads the model that never saw the forget set, if there is one.
    """

    attack: Attack
    original: Model
    corpora: Corpora
    data: DataConfig
    evaluator: Evaluator
    mesh: Mesh
    seed: int
    directory: Path
    identity: str
    original_routing: Callable[[], Assignments]
    load_retrained: Callable[[], Model] | None = None

    @functools.cached_property
    def prepared(self) -> Any:
        """What `attack.prepare` gives."""
        return self.attack.prepare(self)

    @property
    def codec(self) -> TextCodec:
        """Of all models: they read text alike."""
        return TextCodec.of(self.original.replace(tokenizer=self.corpora.tokenizer))


@dataclasses.dataclass(frozen=True)
class Case:
    """An unlearned model under attack; it is not changed.

    `directory` is of this attack's files, `identity` the hash of everything that made the model and of the settings.
    """

    context: Context
    unlearned: Model
    directory: Path
    identity: str

    def measure(self, params: Any, name: str) -> list[Measurement]:
        """Everything that is measured on a model, with its scores kept under `name`."""
        model, store = self.unlearned.replace(params=params), ScoreStore(self.directory / name, self.identity)
        return self.context.evaluator.measure(self.context.evaluator.score(model, full=True, store=store))

    def attack(self) -> dict[str, Any]:
        """Attacks the model. Returns the content of NAME.json.

        Its "points" are the forms of the attack; "strongest" is the place of the one at which `measure`, the forgetting
        measure, is largest on test (the first of equal ones), or None. An attack that breaks the model has no points,
        and "failed" says why.
        """
        points, failed, measure = [], "", self.context.data.board.forgetting
        try:
            points = self.context.attack.points(self)
        except NonFiniteScore as error:
            failed = str(error)
        ends = [find(point.measurements, measure, SPLIT) for point in points]
        values = {place: end.value for place, end in enumerate(ends) if end}
        return {
            "settings": as_dict(self.context.attack),
            "points": [point.to_json() for point in points],
            "measure": measure,
            "strongest": max(values, key=lambda place: values[place], default=None),
            "failed": failed,
        }
