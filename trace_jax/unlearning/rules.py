"""When a run ends before its last step, and which of its evaluated states is the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KEEP = ("last", "best_utility")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What an evaluation found: `rows` (JSON) for metrics.jsonl, and the two numbers that rules read.

    forgetting: lower means more forgotten. utility: higher is better. None: not measured.
    items: what each item gave, arrays [N] by name for items.npz.
    """

    rows: Any
    forgetting: float | None = None
    utility: float | None = None
    items: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Stop:
    """Why a run ends early. `failed`: by an error, so that the state it was found in is of no use."""

    reason: str
    failed: bool


@dataclasses.dataclass(frozen=True)
class Point:
    """The numbers of one evaluation."""

    step: int
    forgetting: float
    utility: float


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is asked of the evaluations of a run.

    Attributes:
      stop_forgetting: the run ends once forgetting is at or below this.
      stop_utility: the run ends once utility is below this.
      keep: "last", the state that the run ends with, or "best_utility", that of the evaluation with the highest utility
        among those whose forgetting is at or below `keep_forgetting`; where none is, that with the lowest forgetting.
    """

    stop_forgetting: float | None = None
    stop_utility: float | None = None
    keep: str = "last"
    keep_forgetting: float | None = None

    @property
    def asks(self) -> bool:
        """Whether anything depends on evaluations."""
        return self.keeps_best or self.stop_forgetting is not None or self.stop_utility is not None

    @property
    def keeps_best(self) -> bool:
        return self.keep == "best_utility"

    def point(self, step: int, found: Any) -> Point | None:
        """The point of an evaluation; None where no rule reads it.

        Raises:
          ValueError: a rule needs a number that the evaluation does not give.
        """
        if not self.asks:
            return None
        needed = {
            "forgetting": self.keeps_best or self.stop_forgetting is not None,
            "utility": self.keeps_best or self.stop_utility is not None,
        }
        for name, wanted in needed.items():
            if wanted and getattr(found, name, None) is None:
                raise ValueError(
                    f"the evaluation at step {step} gives no {name}, which stop_forgetting, stop_utility or keep "
                    "reads; let `evaluate` return an `Evaluated` with it, or remove the rule."
                )
        return Point(step, *(float("nan") if x is None else float(x) for x in (found.forgetting, found.utility)))

    def stops(self, point: Point) -> str:
        """Why the run ends at a point, or nothing."""
        at = f"at step {point.step}"
        if self.stop_forgetting is not None and point.forgetting <= self.stop_forgetting:
            return f"forgetting {point.forgetting:.4g} reached stop_forgetting {self.stop_forgetting:g} {at}"
        if self.stop_utility is not None and point.utility < self.stop_utility:
            return f"utility {point.utility:.4g} fell below stop_utility {self.stop_utility:g} {at}"
        return ""

    def best(self, points: Sequence[Point]) -> int:
        """Step of the point whose state is kept; of equals the first."""
        reached = [p for p in points if self.keep_forgetting is not None and p.forgetting <= self.keep_forgetting]
        if reached:
            return max(reached, key=lambda p: p.utility).step
        return min(points, key=lambda p: p.forgetting).step


NO_RULES = Rules()
