"""Routing of an unlearned model next to the original's: per layer, on forget and on retain text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.data.batches import sequential_batches
from trace_jax.data.rows import Rows
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.models.model import Model
from trace_jax.routing.diagnostics import load, mismatch, overlap, router_drift
from trace_jax.routing.statistics import expert_routing

SUBJECTS = ("forget", "retain")


@dataclasses.dataclass(frozen=True)
class RoutingMetrics:
    """Routing metrics; every array is f64 [L]. Keys of mappings are "forget" and "retain".

    Attributes:
      layers: which layer of the network each row is of, counted from 0.
      tokens: positions that each corpus was measured on.
      frequency: f64 [L, E], expert frequencies under the unlearned model.
      jaccard: mean overlap of a token's chosen experts with those under the original model, 0 to 1.
      unchanged: share of tokens with the very same experts (routing stability).
      load_entropy: entropy of the experts' load over log E; 1 is even.
      dead: experts that were never used, per layer.
      gap, kl, js: how differently the unlearned model routes forget and retain text (`routing.diagnostics.mismatch`);
        `original_gap`, `original_kl`, `original_js`: the same under the original model.
      drift: relative change of the router weights.
    """

    layers: Sequence[int]
    tokens: Mapping[str, int]
    frequency: Mapping[str, np.ndarray]
    jaccard: Mapping[str, np.ndarray]
    unchanged: Mapping[str, np.ndarray]
    load_entropy: Mapping[str, np.ndarray]
    dead: Mapping[str, np.ndarray]
    gap: np.ndarray
    kl: np.ndarray
    js: np.ndarray
    original_gap: np.ndarray
    original_kl: np.ndarray
    original_js: np.ndarray
    drift: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Plain dict for results.json; an infinite divergence becomes None."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def measure_routing(
    original: Model,
    current: Model,
    *,
    forget: Rows,
    retain: Rows,
    max_rows: int = 512,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> RoutingMetrics:
    """Routes the same forget and retain rows through both models and compares.

    Args:
      original, current: the model before and after unlearning.
      forget, retain: the text; more than `max_rows` rows are thinned evenly.
      batch_size, mesh: rows per batch, and the devices that share it (None: all).
    """
    before, after, old, new = {}, {}, {}, {}
    for subject, rows in zip(SUBJECTS, (forget, retain), strict=True):
        rows = rows.take(spread_indices(len(rows), max_rows))
        for model, counted, found in ((original, old, before), (current, new, after)):
            batches = sequential_batches(rows, batch_size)
            counted[subject], found[subject] = expert_routing(model, batches, mesh=mesh)
    kept = {s: overlap(before[s], after[s]) for s in SUBJECTS}
    loads = {s: load(new[s]) for s in SUBJECTS}
    apart, originally = mismatch(new["forget"], new["retain"]), mismatch(old["forget"], old["retain"])
    return RoutingMetrics(
        layers=list(current.config.moe_layers),
        tokens={s: new[s].tokens for s in SUBJECTS},
        frequency={s: new[s].frequency for s in SUBJECTS},
        jaccard={s: kept[s].jaccard for s in SUBJECTS},
        unchanged={s: kept[s].unchanged for s in SUBJECTS},
        load_entropy={s: loads[s].entropy for s in SUBJECTS},
        dead={s: (new[s].counts == 0).sum(axis=1).astype(np.float64) for s in SUBJECTS},
        gap=apart.gap,
        kl=apart.kl,
        js=apart.js,
        original_gap=originally.gap,
        original_kl=originally.kl,
        original_js=originally.js,
        drift=router_drift(original, current),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
