"""What unlearning did to routing, per layer, and what a calibration of the retain loss reached.

Every quantity is defined in docs/evaluation.md. Routing metrics hold an unlearned model next to the original, on forget
and on retain text. Their intervals are over rows: forget rows and retain rows are resampled separately, and both models
are counted on the same resample.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.evaluation.intervals import TAILS, Interval, Measurement, named, resample_counts
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.io.files import encode
from trace_jax.models.model import Model
from trace_jax.routing import statistics
from trace_jax.routing.statistics import Assignments, ExpertStatistics, expert_assignments
from trace_jax.routing.weights import RetainWeights

SUBJECTS = ("forget", "retain")
MODELS = ("original", "unlearned")
SPLIT = "train"  # routing is measured on the rows that were unlearned with

# What both models' routing of a corpus sums up to in each of its N rows that have tokens, or in each of R resamples of
# them: "tokens" [N]; "original" and "unlearned", activations [N, L, E]; "jaccard" and "unchanged", sums over tokens
# [N, L] (`overlap_by_row`).
CorpusRouting = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One quantity with its 95 % intervals: f64 [L + 1], of each layer and last of the mean over layers.

    The interval of the mean resamples all layers together.

    Attributes:
      low, high: NaN where there are too few rows to say.
      bias: how much of `value` is there because the sample is finite, as the bootstrap estimates it (the mean over
        resamples less `value`). It has not been taken off.
      n: rows, or layers where no text is drawn.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain dict for results.json."""
        arrays = {name: getattr(self, name) for name in ("value", "low", "high", "bias")}
        mean = {name: values[-1] for name, values in arrays.items()}
        return encode({name: values[:-1] for name, values in arrays.items()} | {"mean": mean}, digits=6)


@dataclasses.dataclass(frozen=True)
class RoutingMetrics:
    """Routing metrics. Keys of mappings by subject are "forget" and "retain", by model "original" and "unlearned".

    Attributes:
      layers: which layer of the network each row of an array is of, counted from 0.
      top_k, experts: chosen per token, and there are, in a layer.
      tokens, rows: that each corpus was measured on.
      frequency: by model and subject, f64 [L, E].
      expert_drift: f64 [L, E], relative change of each expert's router weights.
      quantities: by name. Those of both subjects end in "_forget" and "_retain"; what the original model gives on the
        same rows ends in "_original".
    """

    layers: Sequence[int]
    top_k: int
    experts: int
    tokens: Mapping[str, int]
    rows: Mapping[str, int]
    frequency: Mapping[str, Mapping[str, np.ndarray]]
    expert_drift: np.ndarray
    quantities: Mapping[str, Quantity]

    def to_json(self) -> dict[str, Any]:
        """Plain dict for results.json; numbers have 6 significant digits."""
        quantities = {name: quantity.to_json() for name, quantity in self.quantities.items()}
        return encode(self, digits=6) | {"quantities": quantities}

    def measurements(self) -> list[Measurement]:
        """Means over layers, named "routing_..." and "router_drift"; the original model's value is in the note."""
        measurements = []
        for name, quantity in self.quantities.items():
            if name.endswith("_original"):
                continue
            exact = name == "router_drift"
            subjects = [s for s in SUBJECTS if name.endswith(f"_{s}")] or SUBJECTS
            notes = [f"mean over {len(self.layers)} layers"]
            if not exact:
                notes.append(" + ".join(f"{self.tokens[s]:,} {s} tokens" for s in subjects))
            if (original := self.quantities.get(f"{name}_original")) is not None:
                notes.append(f"original model {original.value[-1]:.4g}")
            value, low, high = (float(x[-1]) for x in (quantity.value, quantity.low, quantity.high))
            if abs(bias := quantity.bias[-1]) > 0.05 * abs(value):
                notes.append(f"about {bias:+.2g} of it from the finite sample")
            mean = Interval(value, low, high, quantity.n)
            measurements.append(named(name if exact else f"routing_{name}", SPLIT, mean, "; ".join(notes)))
        return measurements


def measure_routing(
    original: Model,
    current: Model,
    *,
    forget: Rows,
    retain: Rows,
    max_rows: int = 512,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    mesh: Mesh | None = None,
    original_routing: Mapping[str, Assignments] | None = None,
) -> RoutingMetrics:
    """Routes the same forget and retain rows through both models and compares.

    Args:
      original, current: the model before and after unlearning.
      forget, retain: the text; more than `max_rows` rows are thinned evenly.
      batch_size, mesh: rows per batch, and the devices that share it (None: all).
      resamples, seed: of the bootstrap.
      original_routing: `expert_assignments` of these rows of each corpus under `original`, where they are known.

    Raises:
      DamagedRouting: NaN or infinite router scores.  ValueError: a corpus has no valid position.
    """
    experts, corpora = current.config.num_experts, {}
    for subject, rows in zip(SUBJECTS, (forget, retain), strict=True):
        rows = rows.take(spread_indices(len(rows), max_rows))
        before, after = (
            expert_assignments(model, sequential_batches(rows, batch_size), mesh=mesh)
            if model is current or original_routing is None
            else original_routing[subject]
            for model in (original, current)
        )
        corpora[subject] = corpus_routing(before, after, experts)
    totals = {s: summed(corpus) for s, corpus in corpora.items()}
    top_k = current.config.experts_per_token
    quantities = routing_quantities(corpora, top_k=top_k, resamples=resamples, seed=seed)
    router_drift, expert_drift = statistics.router_drift(original, current)
    return RoutingMetrics(
        layers=list(current.config.moe_layers),
        top_k=top_k,
        experts=experts,
        tokens={s: int(corpora[s]["tokens"].sum()) for s in SUBJECTS},
        rows={s: len(corpora[s]["tokens"]) for s in SUBJECTS},
        frequency={m: {s: expert_frequency(totals[s], m)[0] for s in SUBJECTS} for m in MODELS},
        expert_drift=expert_drift,
        quantities=quantities | {"router_drift": _exact(router_drift)},
    )


def corpus_routing(original: Assignments, current: Assignments, num_experts: int) -> CorpusRouting:
    """What `routing_quantities` needs of a corpus, per row, from both models' assignments of its tokens."""
    counts = [statistics.counts_by_row(x, num_experts).astype(np.float64) for x in (original, current)]
    return statistics.overlap_by_row(original, current) | dict(zip(MODELS, counts, strict=True))


def summed(corpus: CorpusRouting, draws: np.ndarray | None = None) -> CorpusRouting:
    """Sums over rows, each counted `draws` f64 [R, N] times; None: once, R = 1."""
    draws = np.ones((1, len(corpus["tokens"]))) if draws is None else draws
    return {
        name: (draws @ values.reshape(len(values), -1)).reshape(len(draws), *values.shape[1:])
        for name, values in corpus.items()
    }


def expert_frequency(sums: CorpusRouting, model: str) -> np.ndarray:
    """f64 [..., L, E], share of tokens that use the expert."""
    return sums[model] / sums["tokens"][..., None, None]


def routing_quantities(
    corpora: Mapping[str, CorpusRouting], *, top_k: int, resamples: int = 1000, seed: int = 0
) -> dict[str, Quantity]:
    """Every quantity of two corpora that comes from text, with intervals from a bootstrap over rows.

    Gaps, divergences, entropies and dead experts of a finite sample are biased: corpora look more different, loads less
    even and more experts dead than on endless text. A percentile interval would add the bias once more, so this is the
    basic bootstrap interval, 2 value - (resampled quantiles) (Davison & Hinkley 1997, 5.2), which takes it off; it is
    widened to hold the value itself, and `bias` says how large the bias is.
    """
    rows, counts = [len(corpora[s]["tokens"]) for s in SUBJECTS], corpora["forget"]["original"]
    value = {name: v[0] for name, v in _measured({s: summed(c) for s, c in corpora.items()}).items()}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in value}
    if min(rows) > 1:
        rngs = [np.random.default_rng((seed, side)) for side in range(len(rows))]
        draws = (
            resample_counts(n, resamples=resamples, rng=rng, size=max(*rows, counts[0].size))
            for n, rng in zip(rows, rngs, strict=True)
        )
        for drawn in zip(*draws, strict=True):
            sums = {s: summed(corpora[s], several) for s, several in zip(SUBJECTS, drawn, strict=True)}
            for name, resampled in _measured(sums).items():
                parts[name].append(resampled)
    experts = counts.shape[-1]
    largest = {"gap": 2.0 * top_k, "kl": math.inf, "js": math.log(2), "dead": experts, "newly": experts}
    quantities = {}
    for name, values in value.items():
        n = sum(rows[i] for i, s in enumerate(SUBJECTS) if f"_{s}" in name) or sum(rows)
        values = np.append(values, values.mean())  # [L + 1]
        low = high = bias = np.full(values.shape, np.nan)
        if parts[name]:
            resampled = np.concatenate(parts[name])
            resampled = np.concatenate([resampled, resampled.mean(axis=1, keepdims=True)], axis=1)
            bias = resampled.mean(axis=0) - values
            most = largest.get(name.split("_")[0], 1.0)
            low, high = np.clip(2 * values - np.quantile(resampled, TAILS, axis=0)[::-1], 0.0, most)
            low, high = np.minimum(low, values), np.maximum(high, values)
        quantities[name] = Quantity(values, low, high, bias, n)
    return quantities


def _measured(sums: Mapping[str, CorpusRouting]) -> dict[str, np.ndarray]:
    """Every quantity [R, L] from sums over rows."""
    quantities: dict[str, np.ndarray] = {}
    for s in SUBJECTS:
        tokens = sums[s]["tokens"][:, None]
        quantities |= {f"jaccard_{s}": sums[s]["jaccard"] / tokens, f"stability_{s}": sums[s]["unchanged"] / tokens}
    for model, end in zip(MODELS, ("_original", ""), strict=True):
        frequencies = [expert_frequency(sums[s], model) for s in SUBJECTS]
        counts = [sums[s][model] for s in SUBJECTS]
        quantities |= {
            f"gap{end}": statistics.frequency_gap(*frequencies),
            f"kl{end}": statistics.kl_divergence(*map(statistics.smoothed_shares, counts)),
            f"js{end}": statistics.js_divergence(*(f / f.sum(axis=-1, keepdims=True) for f in frequencies)),
        }
        for s, f in zip(SUBJECTS, frequencies, strict=True):
            quantities |= {f"load_entropy_{s}{end}": statistics.load_entropy(f)}
            quantities |= {f"dead_experts_{s}{end}": (f == 0).sum(axis=-1).astype(np.float64)}
    for s in SUBJECTS:
        before, after = (sums[s][model] for model in MODELS)
        quantities[f"newly_dead_{s}"] = ((before > 0) & (after == 0)).sum(axis=-1).astype(np.float64)
    return quantities


def _exact(value: np.ndarray) -> Quantity:
    """A quantity [L] that no text is drawn for."""
    both = np.append(value, value.mean())
    return Quantity(both, both, both, np.zeros(both.shape), len(value))


@dataclasses.dataclass(frozen=True)
class CalibrationMetrics:
    """What a calibration reached, per layer, with the weights that unlearning began with.

    Gaps are sums over experts of |f - f^F|, f the retain frequency before, and the weighted one after. Nothing is
    sampled, so intervals have no width. Weights that follow the model are described in metrics.jsonl as it trains.

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

    def measurements(self) -> list[Measurement]:
        """Effective sample size, and the gap of the selected experts summed over layers, as in the certificate."""
        values = [("effective_sample_size", self.effective_sample_size, "")]
        if self.selected is not None:
            note = f"{self.selected.sum():,} selected experts, sum over {len(self.layers)} layers"
            gaps = {name: getattr(self, name).sum() for name in ("gap_before", "gap_after")}
            values += [(name, float(gap), note) for name, gap in gaps.items()]
        return [Measurement(f"calibration_{name}", v, self.tokens, v, v, SPLIT, note) for name, v, note in values]


def measure_calibration(
    weights: RetainWeights, forget: ExpertStatistics, retain: ExpertStatistics
) -> CalibrationMetrics:
    """The metrics of weights that were made from these statistics of the original model."""
    gaps: dict[str, np.ndarray] = {}
    if weights.frequency is not None and weights.selected is not None:
        gaps["selected"] = weights.selected.sum(axis=1)
        for name, frequencies in (("before", retain.frequency), ("after", weights.frequency)):
            gap = np.abs(frequencies - forget.frequency)
            gaps[f"gap_{name}"] = np.where(weights.selected, gap, 0.0).sum(axis=1)
            gaps[f"gap_elsewhere_{name}"] = np.where(weights.selected, 0.0, gap).sum(axis=1)
    layers, ess = list(retain.layers or range(len(retain.counts))), weights.effective_sample_size
    return CalibrationMetrics(layers, retain.tokens, ess, float(weights.weights.max()), **gaps)
