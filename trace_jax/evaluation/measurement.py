"""One measured number together with what is needed to believe it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from trace_jax.evaluation.intervals import Interval
from trace_jax.io.codec import decode, encode

_OPTIONAL = {"note", "profile", "revision"}
_TOO_FEW = "too few items for an interval"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A value on one split, with its 95 % interval.

    Attributes:
      name: stable name, such as "forget_accuracy".
      value: the estimate.
      n: how many items (questions, rows or texts) it was measured on.
      low, high: ends of the 95 % interval over items; NaN when there are too few items to give one (JSON: null).
      split: "validation" or "test"; "train" where the rows that were unlearned with are looked at (routing).
      note: what a reader must know beside the number, in a few words; often empty.
      profile: whose protocol was followed to the letter, where there are several, such as "open_unlearning".
      revision: of the data set, where it is known.
    """

    name: str
    value: float
    n: int
    low: float
    high: float
    split: str
    note: str = ""
    profile: str = ""
    revision: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain dict that `json.dumps` takes; NaN becomes None, since JSON has no NaN."""
        return {key: value for key, value in encode(self).items() if key not in _OPTIONAL or value}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Measurement":
        """The inverse of `to_json`. Raises ValueError if a field is missing or unknown."""
        return decode(cls, plain)

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name} {self.split}: {self.value:.4f} [{self.low:.4f}, {self.high:.4f}] n={self.n}{note}"


def named(
    name: str, split: str, interval: Interval, note: str = "", profile: str = "", revision: str = ""
) -> Measurement:
    """The measurement of an estimate with its interval; where that has no ends, the note says so."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        note = f"{note}; {_TOO_FEW}" if note else _TOO_FEW
    numbers = (interval.value, interval.n, interval.low, interval.high)
    return Measurement(name, *numbers, split, note, profile, revision)


def find(measurements: Iterable[Measurement], name: str, split: str) -> Measurement | None:
    """The measurement of that name and split, or None."""
    return next((m for m in measurements if m.name == name and m.split == split), None)
