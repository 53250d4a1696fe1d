"""What a report shows: plain values that the caller takes from a run directory."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from trace_jax.evaluation.fronts import Front as EvaluatedFront

T = TypeVar("T")

KINDS = ("reference", "method", "control")


@dataclasses.dataclass(frozen=True)
class Number:
    """An estimate, how many items it stands on, and the ends of its 95 % interval. NaN or None: not known."""

    value: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One line of the comparison at equal forgetting.

    Attributes:
      method: its name; the same name is the key in `fronts`, `certificates`, `measurements` and in `Routing`.
      kind: "reference" (target and retrained models), "method", or "control" (permuted weights, oracle, ...).
      forgetting: the forgetting measure, lower is more forgotten.
      utilities: by name, higher is better.
      reached: False if the method never came to the level; its utilities are then those of its most forgetful step.
      step: the step that was read, a fraction where it was interpolated; None for references.
      seeds: runs behind the line.
      note: a few words beside the name.
    """

    method: str
    kind: str = "method"
    forgetting: Number | None = None
    utilities: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    reached: bool = True
    step: float | None = None
    seeds: int | None = None
    note: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind of {self.method!r} is {self.kind!r}; expected one of {', '.join(KINDS)}.")


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation along a run."""

    step: int
    forgetting: float | None
    utilities: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Front:
    """One run of a method: its evaluations in order of steps."""

    seed: int
    points: Sequence[Point]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Activation frequencies, nested lists or arrays [L, E], and what was selected per method, bool [L, E].

    `uniform` is K/E, the frequency of an expert under uniform routing. `layers` numbers the rows; () = from 0.
    `measured`: by method, what results.json has under "routing" (trace_jax.evaluation.routing).
    """

    forget_frequency: Any
    retain_frequency: Any
    uniform: float
    calibrated_frequency: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    selected: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[int] = ()
    measured: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AttackRow:
    """The forgetting measure in one form of an attack.

    Attributes:
      attack, at: its name and form ("quantization", "4 bits"); both empty for the model as it was unlearned.
      value: of the attacked model. original: of the model before unlearning, asked in the same way.
      recovered: share of what unlearning took away that is back; None where it took nothing, or was asked otherwise.
      strongest: whether this is the form of the attack at which most came back.
      note: why there is no value.
      asked_otherwise: whether the attack changes what is asked.
      retrained: of the model that never saw the forget set under the same attack, where the attack teaches.
    """

    attack: str
    at: str
    value: Number
    original: Number
    recovered: float | None = None
    strongest: bool = False
    note: str = ""
    asked_otherwise: bool = False
    retrained: Number | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything on the page. Every part but the title may be missing; its section then says so or is left out.

    Attributes:
      title: heading of the page. benchmark: name of the corpus.
      forgotten: what was unlearned, in words ("60 fictional substances of the handbook's forget topic").
      verdict: the opening paragraph; written from `rows` when empty.
      forgetting: name of the forgetting measure, lower is more forgotten.
      level: the forgetting level at which `rows` compares methods; chance: value of a model that knows nothing.
      rows: the comparison, references first.
      baseline: the method that the verdict compares the others with.
      fronts: runs by method.
      steps: of a series, values by measurement and method: before the first step, then after each; None: not known.
      bands: 95 % bands by method and utility, each a list of {"forgetting", "low", "high"}.
      attacks: by method, what came back under attack; first the model as it was unlearned.
      routing: frequencies for the heat maps.
      certificates: what the calibration says of itself, by method (the JSON of a calibration's certificate).
      measurements: by method, mappings with name, value, n, low, high, split, step (absent or None: at the end), note.
      trained: by method, text on what was trained ("102,400 of 330,112 parameters").
      config, environment: nested mappings.
      generated: date and time in words.
    """

    title: str
    benchmark: str = ""
    forgotten: str = ""
    verdict: str = ""
    forgetting: str = "forget_accuracy"
    level: float | None = None
    chance: float | None = None
    rows: Sequence[SummaryRow] = ()
    baseline: str = "uniform"
    fronts: Mapping[str, Sequence[Front]] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, Mapping[str, Sequence[float | None]]] = dataclasses.field(default_factory=dict)
    bands: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]] = dataclasses.field(default_factory=dict)
    attacks: Mapping[str, Sequence[AttackRow]] = dataclasses.field(default_factory=dict)
    routing: Routing | None = None
    certificates: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    measurements: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    trained: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generated: str = ""

    def utility_names(self) -> list[str]:
        """Names of the utilities in `rows` and `fronts`, in order of first appearance."""
        names = [name for row in self.rows for name in row.utilities]
        names += [name for fronts in self.fronts.values() for f in fronts for p in f.points for name in p.utilities]
        return list(dict.fromkeys(names))


def report_front(seed: int, front: EvaluatedFront) -> Front:
    """The front of one evaluated run (trace_jax.evaluation.fronts)."""
    points = [
        Point(int(step), float(forgetting), {name: float(values[i]) for name, values in front.utilities.items()})
        for i, (step, forgetting) in enumerate(zip(front.steps, front.forgetting, strict=True))
    ]
    return Front(seed, points)


def report_data(values: Mapping[str, Any]) -> ReportData:
    """`ReportData` from nested plain mappings and lists, as `json.load` gives them.

    Raises:
      ValueError: a key that the report does not know, or a missing one.
    """
    plain = dict(values)
    plain["rows"] = [_build(SummaryRow, row) for row in plain.get("rows") or ()]
    plain["fronts"] = {
        method: [_build(Front, front) for front in fronts] for method, fronts in (plain.get("fronts") or {}).items()
    }
    plain["attacks"] = {
        method: [_build(AttackRow, row) for row in rows] for method, rows in (plain.get("attacks") or {}).items()
    }
    if isinstance(plain.get("routing"), Mapping):
        plain["routing"] = _build(Routing, plain["routing"])
    return _build(ReportData, {k: v for k, v in plain.items() if v is not None})


def _build(cls: type[T], value: Any) -> T:
    if isinstance(value, cls):
        return value
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it knows {', '.join(fields)}.")
    arguments = dict(value)
    if cls is SummaryRow:
        if isinstance(arguments.get("forgetting"), Mapping):
            arguments["forgetting"] = _build(Number, arguments["forgetting"])
        arguments["utilities"] = {k: _build(Number, v) for k, v in (arguments.get("utilities") or {}).items()}
    if cls is AttackRow:
        numbers = ("value", "original", "retrained")
        arguments |= {name: _build(Number, arguments[name]) for name in numbers if arguments.get(name) is not None}
    if cls is Front:
        arguments["points"] = [_build(Point, point) for point in arguments.get("points", ())]
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def known(value: float | None) -> bool:
    """Whether a number is there: neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)
