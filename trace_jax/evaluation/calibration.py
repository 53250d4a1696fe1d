"""What a calibration of the retain loss reached, per layer: the numbers that stand beside a method's results.

They describe the weights that unlearning began with, on the corpus that they were made for. Nothing is sampled, so
intervals have no width. Weights that follow the model are described in metrics.jsonl as it trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_jax.evaluation.measurement import Measurement
from trace_jax.evaluation.routing import SPLIT
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.routing.weights import RetainWeights


@dataclasses.dataclass(frozen=True)
class CalibrationMetrics:
    """Gaps are sums over experts of |f - f^F|, f the retain frequency before, and the weighted one after.

    Attributes:
      layers: which layer of the network each entry is of, counted from 0.
      tokens: of the retain corpus.
      selected: i64 [L], experts that weights were made from; of these are the gaps.
      gap_before, gap_after: f64 [L].  gap_elsewhere_before, gap_elsewhere_after: of all other experts.
      effective_sample_size: (sum w)^2 / (T sum w^2) of the token weights; they act on all layers, so it is one number.
      largest_weight: the mean is one.

    Weightings that look at no expert have an effective sample size only; what is per layer is None.
    """

    layers: Sequence[int]
    tokens: int
    effective_sample_size: float
    largest_weight: float
    selected: np.ndarray | None = None
    gap_before: np.ndarray | None = None
    gap_after: np.ndarray | None = None
    gap_elsewhere_before: np.ndarray | None = None
    gap_elsewhere_after: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dict for results.json."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}

    def measurements(self) -> list[Measurement]:
        """Effective sample size, and the gap of the selected experts summed over layers, as in the certificate."""
        found = [self._exact("calibration_effective_sample_size", self.effective_sample_size)]
        if self.selected is not None:
            note = f"{self.selected.sum():,} selected experts, sum over {len(self.layers)} layers"
            for name in ("gap_before", "gap_after"):
                found.append(self._exact(f"calibration_{name}", float(getattr(self, name).sum()), note))
        return found

    def _exact(self, name: str, value: float, note: str = "") -> Measurement:
        return Measurement(name, value, self.tokens, value, value, SPLIT, note)


def measure_calibration(
    weights: RetainWeights, forget: ExpertStatistics, retain: ExpertStatistics
) -> CalibrationMetrics:
    """The metrics of weights that were made from these statistics of the original model."""
    layers = list(retain.layers or range(len(retain.counts)))
    ess, largest = weights.effective_sample_size, float(weights.weights.max())
    plain = CalibrationMetrics(layers, retain.tokens, ess, largest)
    if weights.frequency is None or weights.selected is None:
        return plain
    selected = weights.selected
    before, after = (np.abs(f - forget.frequency) for f in (retain.frequency, weights.frequency))
    return dataclasses.replace(
        plain,
        selected=selected.sum(axis=1),
        gap_before=np.where(selected, before, 0.0).sum(axis=1),
        gap_after=np.where(selected, after, 0.0).sum(axis=1),
        gap_elsewhere_before=np.where(selected, 0.0, before).sum(axis=1),
        gap_elsewhere_after=np.where(selected, 0.0, after).sum(axis=1),
    )
