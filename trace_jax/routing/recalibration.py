"""Selection and calibration solved anew, now and then, from the routing of the model that is being trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.data.batches import sequential_batches
from trace_jax.data.rows import Rows
from trace_jax.models.model import Model
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.diagnostics import frequency_change, overlap
from trace_jax.routing.retain_weights import RetainWeights, retain_weights
from trace_jax.routing.statistics import Assignments, ExpertStatistics, expert_routing
from trace_jax.routing.weights import weighted_frequency

CORPORA = ("forget", "retain")
Routing = Mapping[str, tuple[ExpertStatistics, Assignments]]  # of each corpus


@dataclasses.dataclass(frozen=True)
class Drift:
    """What a recalibration found. Mappings have the keys "forget" and "retain"; arrays are f64 [L].

    Attributes:
      layers: which layer of the network each entry is of, counted from 0.
      overlap: mean over tokens of the Jaccard overlap of a token's experts with those under the original model.
      frequency_change: sum over experts of |f - f_original|, 0 to 2K.
      selected: how many experts are matched now; 0 where there was nothing to match.
      selected_overlap: Jaccard overlap of the experts selected now with those selected before.
      gap: sum over the experts selected now of |f~ - f^F| under the current model's routing: "unweighted" (f~ = f^R),
        "before" with the weights in force until now, "after" with those from now on.
      effective_sample_size: of the weights from now on, (sum w)^2 / (T sum w^2).
      kept: nothing is selected under the current routing, so that the weights stay as they were.
    """

    layers: tuple[int, ...]
    overlap: Mapping[str, np.ndarray]
    frequency_change: Mapping[str, np.ndarray]
    selected: int
    selected_overlap: float
    gap: Mapping[str, float]
    effective_sample_size: float
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        plain = dataclasses.asdict(self)
        for name in ("overlap", "frequency_change"):
            plain[name] = {corpus: values.tolist() for corpus, values in plain[name].items()}
        return {**plain, "layers": list(self.layers)}

    def text(self) -> str:
        """One line for a terminal."""
        kept = {corpus: f"{values.mean():.1%}" for corpus, values in self.overlap.items()}
        moved = {corpus: f"{values.mean():.3f}" for corpus, values in self.frequency_change.items()}
        routing = (
            f"routing overlaps with the original by {kept['forget']} (forget) and {kept['retain']} (retain), "
            f"frequencies moved by {moved['forget']} and {moved['retain']} per layer"
        )
        if self.kept:
            return f"{routing}; no expert is selected any more, so the last weights are kept"
        return (
            f"{routing}; {self.selected} experts matched, gap {self.gap['before']:.4f} -> {self.gap['after']:.4f}, "
            f"effective sample size {self.effective_sample_size:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class Recalibration:
    """Solves weights anew for the model as it is after some steps.

    Attributes:
      config: what to solve; its `recalibrate_every` says after how many steps.
      original: the model before unlearning, whose routing drift is measured from.
      forget, retain: the two corpora. mesh, batch_size: for the passes over them; they change no result.
    """

    config: CalibrationConfig
    original: Model
    forget: Rows
    retain: Rows
    mesh: Mesh | None = None
    batch_size: int = 32

    @property
    def every(self) -> int:
        """Steps between recalibrations."""
        assert self.config.recalibrate_every is not None
        return self.config.recalibrate_every

    def __call__(self, current: Model, last: RetainWeights) -> tuple[RetainWeights, Drift]:
        """(the weights from now on, what was found) under `current`; `last` are the weights until now.

        Where nothing is selected any more, the weights from now on are `last`.

        Raises:
          DamagedRouting: the current model's router gives NaN or infinite scores.
        """
        now = self._routing(current)
        found = retain_weights(
            self.config,
            model=current,
            forget=self.forget,
            retain=self.retain,
            forget_statistics=now["forget"][0],
            retain_statistics=now["retain"][0],
            assignments=now["retain"][1],
            mesh=self.mesh,
            batch_size=self.batch_size,
        )
        kept = not found.selected.any()
        weights = last if kept else found
        gaps = {"unweighted": self.retain.valid.astype(np.float64), "before": last.weights, "after": weights.weights}
        return weights, Drift(
            layers=tuple(current.config.moe_layers),
            overlap={name: overlap(self._start[name][1], now[name][1]).jaccard for name in CORPORA},
            frequency_change={name: frequency_change(self._start[name][0], now[name][0]) for name in CORPORA},
            selected=int(found.selected.sum()),
            selected_overlap=_jaccard(last.selected, found.selected),
            gap={name: self._gap(now, found.selected, values) for name, values in gaps.items()},
            effective_sample_size=weights.effective_sample_size,
            kept=kept,
        )

    @functools.cached_property
    def _start(self) -> Routing:
        """Under the original model; measured when first needed, and again in a process that continues a run."""
        return self._routing(self.original)

    def _routing(self, model: Model) -> Routing:
        return {
            name: expert_routing(model, sequential_batches(rows, self.batch_size), mesh=self.mesh)
            for name, rows in (("forget", self.forget), ("retain", self.retain))
        }

    def _gap(self, now: Routing, selected: np.ndarray, weights: np.ndarray) -> float:
        of_token = weights[self.retain.valid].astype(np.float64)
        frequency = weighted_frequency(now["retain"][1].indices, of_token, selected.shape[1])
        return float(np.abs(frequency - now["forget"][0].frequency)[selected].sum())


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0
