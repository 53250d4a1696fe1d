"""When a run ends before its last step, and which of its evaluated states is the result."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

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


class Stop(NamedTuple):
    """Why a run ends early. `failed`: by an error, so that the state it was found in is of no use."""

    reason: str
    failed: bool


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

    def check(self, step: int, evaluated: Evaluated) -> None:
        """Raises ValueError where a rule needs a number that an evaluation does not give."""
        for name, rule in (("forgetting", self.stop_forgetting), ("utility", self.stop_utility)):
            if (self.keeps_best or rule is not None) and getattr(evaluated, name) is None:
                raise ValueError(
                    f"the evaluation at step {step} gives no {name}, which stop_forgetting, stop_utility or keep "
                    "reads; let `evaluate` return an `Evaluated` with it, or remove the rule."
                )

    def stops(self, step: int, evaluated: Any) -> str:
        """Why the run ends at an `Evaluated` state, or nothing."""
        if self.stop_forgetting is not None and evaluated.forgetting <= self.stop_forgetting:
            reached = f"reached stop_forgetting {self.stop_forgetting:g}"
            return f"forgetting {evaluated.forgetting:.4g} {reached} at step {step}"
        if self.stop_utility is not None and evaluated.utility < self.stop_utility:
            return f"utility {evaluated.utility:.4g} fell below stop_utility {self.stop_utility:g} at step {step}"
        return ""

    def best(self, evaluations: Mapping[int, Any]) -> int:
        """The step whose state is the result, of those with an `Evaluated` each; of equals the first."""
        bound = self.keep.forgetting if isinstance(self.keep, KeepBest) else -np.inf
        reached = [step for step, evaluated in evaluations.items() if evaluated.forgetting <= bound]
        if reached:
            return max(reached, key=lambda step: evaluations[step].utility)
        return min(evaluations, key=lambda step: evaluations[step].forgetting)
