"""When a run ends before its last step, and which of its evaluated states is the result."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.config import Section, Variant, option


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What an evaluation gave: `rows` (JSON) for metrics.jsonl, and the two numbers that rules read.

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


class Keep(Variant):
    """Which state is the result."""


class KeepLast(Keep, name="last"):
    """That which the run ends with."""


class KeepBest(Keep, name="best_utility"):
    """That of the evaluation with the highest utility among those that forgot enough; where there is none, that with
    the lowest forgetting."""

    forgetting: float = option(help="forgetting on validation that a state must be at or below")


class Rules(Section):
    """What is asked of the evaluations of a run."""

    stop_forgetting: float | None = option(
        None, help="end the run once forgetting, measured on validation, is at or below this"
    )
    stop_utility: float | None = option(None, help="end the run once mean utility on validation is below this")
    keep: Keep = option("last", help="the state that is the result: the last, or the evaluated one of highest utility")

    @property
    def needs_evaluation(self) -> bool:
        return self.keeps_best or self.stop_forgetting is not None or self.stop_utility is not None

    @property
    def keeps_best(self) -> bool:
        return isinstance(self.keep, KeepBest)

    def point(self, step: int, evaluated: Any) -> Point | None:
        """The point of an evaluation; None where no rule reads it.

        Raises:
          ValueError: a rule needs a number that the evaluation does not give.
        """
        if not self.needs_evaluation:
            return None
        needed = {
            "forgetting": self.keeps_best or self.stop_forgetting is not None,
            "utility": self.keeps_best or self.stop_utility is not None,
        }
        for name, wanted in needed.items():
            if wanted and getattr(evaluated, name, None) is None:
                raise ValueError(
                    f"the evaluation at step {step} gives no {name}, which stop_forgetting, stop_utility or keep "
                    "reads; let `evaluate` return an `Evaluated` with it, or remove the rule."
                )
        numbers = (float("nan") if x is None else float(x) for x in (evaluated.forgetting, evaluated.utility))
        return Point(step, *numbers)

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
        reached = [p for p in points if isinstance(self.keep, KeepBest) and p.forgetting <= self.keep.forgetting]
        if reached:
            return max(reached, key=lambda p: p.utility).step
        return min(points, key=lambda p: p.forgetting).step


NO_RULES = Rules()
