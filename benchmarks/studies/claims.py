"""What a study claims: a number with its interval, and the side of a bound on which it is said to lie.

scripts/results.py computes the verdicts, and writes claims into docs/results.md: all of them into the study's section,
those of the place PAGE into the table at the top as well, those of README into the README besides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation.intervals import t_interval

PAGE, README = "page", "readme"
NUMBER = "value", "low", "high"


Values = Sequence[float] | np.ndarray | Mapping[str, Any]  # or their interval, with "n" of them


def interval(values: Values, digits: int = 4) -> dict[str, float | None]:
    """Mean and Student's interval; no ends of a single value, and nothing of none."""
    if not isinstance(values, Mapping):
        values = vars(t_interval(np.asarray(values, np.float64))) if len(values) else dict.fromkeys(NUMBER)
    found = {name: np.nan if values[name] is None else values[name] for name in NUMBER}
    return {name: round(x, digits) if np.isfinite(x) else None for name, x in found.items()}


def claim(
    text: str, measure: str, values: Values, over: str = "", *,
    holds: str = "above", bound: float = 0.0, place: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`over`: what the values are of, if not of seeds."""
    n = values["n"] if isinstance(values, Mapping) else len(values)
    about = {"claim": text, "measure": measure, **interval(values), "n": n}
    return about | {"over": over or f"{n} seed{'s' * (n != 1)}", "holds": holds, "bound": bound, "place": place}
