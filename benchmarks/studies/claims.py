"""What a study claims: a number with its interval, and the side of a bound on which it is said to lie.

scripts/results.py computes the verdicts, and writes claims into docs/results.md: all of them into the study's section,
those of the place PAGE into the table at the top as well, those of README into the README besides.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation.intervals import t_interval

PAGE, README = "page", "readme"
NUMBER = "value", "low", "high"


def interval(values: Sequence[float] | np.ndarray, digits: int = 4) -> dict[str, float | None]:
    """Mean and Student's interval; no ends of a single value, and nothing of none."""
    if not len(values):
        return dict.fromkeys(NUMBER)
    found = t_interval(np.asarray(values, np.float64))
    return {name: round(x, digits) if np.isfinite(x := getattr(found, name)) else None for name in NUMBER}


def claim(
    text: str, measure: str, values: Sequence[float] | np.ndarray, over: str = "", *,
    holds: str = "above", bound: float = 0.0, place: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`over`: what the values are of, if not of seeds."""
    about = {"claim": text, "measure": measure, **interval(values), "n": len(values)}
    return about | {"over": over or f"{len(values)} seeds", "holds": holds, "bound": bound, "place": place}
