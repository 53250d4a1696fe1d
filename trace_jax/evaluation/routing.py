"""What unlearning did to routing, per layer, and what a calibration of the retain loss reached.

Every quantity is defined in docs/evaluation.md. Intervals are over rows: forget rows and retain rows are resampled
separately, and both models are counted on the same resample. Metrics are mappings of arrays, as in results.json.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.data.rows import Rows
from trace_jax.evaluation.intervals import TAILS, Interval, Measurement, named, resample_sides
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.models.model import Model
from trace_jax.routing import differences
from trace_jax.routing.statistics import Assignments, ExpertStatistics, expert_assignments
from trace_jax.routing.weights import RetainWeights

SUBJECTS = ("forget", "retain")
MODELS = ("original", "unlearned")
SPLIT = "train"  # routing is measured on the rows that were unlearned with

# What both models' routing of a corpus sums up to in each of its N rows that have tokens: "tokens" [N]; "original" and
# "unlearned", activations [N, L, E]; "jaccard" and "unchanged", sums over tokens [N, L] (`overlap_by_row`).
CorpusRouting = Mapping[str, np.ndarray]


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
) -> dict[str, Any]:
    """Routes the same forget and retain rows through the model before and after unlearning, and compares.

    More than `max_rows` rows are thinned evenly. `original_routing`: `expert_assignments` of these rows of each corpus
    under `original`, where they are at hand.

    Returns:
      layers: which layer of the network each row of an array is of, counted from 0.
      top_k, experts: chosen per token, and there are, in a layer.  tokens, rows: that each corpus was measured on.
      frequency: by model and corpus, f64 [L, E].  quantities: by name, as in `routing_quantities`.
      expert_drift: f64 [L, E], relative change of each expert's router weights.
    """
    experts, top_k, corpora = current.config.num_experts, current.config.experts_per_token, {}
    for subject, rows in zip(SUBJECTS, (forget, retain), strict=True):
        rows = rows.take(spread_indices(len(rows), max_rows))
        before, after = (
            expert_assignments(model, rows, batch_size=batch_size, mesh=mesh)
            if model is current or original_routing is None
            else original_routing[subject]
            for model in (original, current)
        )
        corpora[subject] = corpus_routing(before, after, experts)
    quantities = routing_quantities(corpora, top_k=top_k, resamples=resamples, seed=seed)
    router_drift, expert_drift = differences.router_drift(original, current)
    drift = np.append(router_drift, router_drift.mean())  # for which no text is drawn
    tokens = {s: corpora[s]["tokens"].sum() for s in SUBJECTS}
    return {
        "layers": list(current.config.moe_layers),
        "top_k": top_k,
        "experts": experts,
        "tokens": {s: int(count) for s, count in tokens.items()},
        "rows": {s: len(corpora[s]["tokens"]) for s in SUBJECTS},
        "frequency": {m: {s: corpora[s][m].sum(axis=0) / tokens[s] for s in SUBJECTS} for m in MODELS},
        "expert_drift": expert_drift,
        "quantities": quantities | {"router_drift": _quantity(drift, drift, drift, np.zeros(drift.shape))},
    }


def routing_measurements(routing: Mapping[str, Any]) -> list[Measurement]:
    """Means over layers, named "routing_..." and "router_drift"; the original model's value is in the note."""
    measurements, quantities, layers = [], routing["quantities"], len(routing["layers"])
    for name, mean in ((name, q["mean"]) for name, q in quantities.items() if not name.endswith("_original")):
        exact = name == "router_drift"
        subjects = [s for s in SUBJECTS if name.endswith(f"_{s}")] or SUBJECTS
        notes = [f"mean over {layers} layers"]
        if not exact:
            notes.append(" + ".join(f"{routing['tokens'][s]:,} {s} tokens" for s in subjects))
        if (original := quantities.get(f"{name}_original")) is not None:
            notes.append(f"original model {original['mean']['value']:.4g}")
        value, low, high = (float(mean[end]) for end in ("value", "low", "high"))
        if abs(mean["bias"]) > 0.05 * abs(value):
            notes.append(f"about {mean['bias']:+.2g} of it from the finite sample")
        interval = Interval(value, low, high, layers if exact else sum(routing["rows"][s] for s in subjects))
        measurements.append(named(name if exact else f"routing_{name}", SPLIT, interval, "; ".join(notes)))
    return measurements


def corpus_routing(original: Assignments, current: Assignments, num_experts: int) -> CorpusRouting:
    """What `routing_quantities` needs of a corpus, per row, from both models' assignments of its tokens."""
    counts = [differences.counts_by_row(x, num_experts).astype(np.float64) for x in (original, current)]
    return differences.overlap_by_row(original, current) | dict(zip(MODELS, counts, strict=True))


def routing_quantities(
    corpora: Mapping[str, CorpusRouting], *, top_k: int, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Every quantity of the two corpora that comes from text, by name, with 95 % intervals from a bootstrap over rows.

    Each has `value`, `low`, `high` and `bias`, f64 [L], and `mean`, the same of the mean over layers, resampled
    together; ends are NaN where there are too few rows to say. Names end in "_forget" and "_retain" where they are of
    one corpus, and in "_original" where they are of the original model.

    Gaps, divergences, entropies and dead experts of a finite sample are biased: corpora look more different, loads less
    even and more experts dead than on endless text. So this is the basic bootstrap interval, 2 value - (resampled
    quantiles) (Davison & Hinkley 1997, 5.2), which takes the bias off, where a percentile interval would add it once
    more; it is widened to hold the value itself. `bias`: the mean over resamples less the value.
    """
    rows, (_, experts) = [len(corpora[s]["tokens"]) for s in SUBJECTS], corpora["forget"]["original"].shape[1:]
    values_of = {name: v[0] for name, v in _measured(corpora, [np.ones((1, n)) for n in rows]).items()}
    size = corpora["forget"]["original"][0].size
    draws = resample_sides(rows, resamples=resamples, seed=seed, size=size) if min(rows) > 1 else ()
    parts = [_measured(corpora, drawn) for drawn in draws]
    largest = {"gap": 2.0 * top_k, "kl": math.inf, "js": math.log(2), "dead": experts, "newly": experts}
    quantities = {}
    for name, values in values_of.items():
        values = np.append(values, values.mean())  # [L + 1]
        low = high = bias = np.full(values.shape, np.nan)
        if parts:
            resampled = np.concatenate([part[name] for part in parts])
            resampled = np.concatenate([resampled, resampled.mean(axis=1, keepdims=True)], axis=1)
            bias = resampled.mean(axis=0) - values
            most = largest.get(name.split("_")[0], 1.0)
            low, high = np.clip(2 * values - np.quantile(resampled, TAILS, axis=0)[::-1], 0.0, most)
            low, high = np.minimum(low, values), np.maximum(high, values)
        quantities[name] = _quantity(values, low, high, bias)
    return quantities


def _quantity(*columns: np.ndarray) -> dict[str, Any]:
    """A quantity from its columns, f64 [L + 1], of each layer and last of the mean over layers."""
    arrays = dict(zip(("value", "low", "high", "bias"), columns, strict=True))
    return {name: x[:-1] for name, x in arrays.items()} | {"mean": {name: x[-1] for name, x in arrays.items()}}


def _measured(corpora: Mapping[str, CorpusRouting], draws: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every quantity [R, L], from the rows of each corpus counted `draws` f64 [R, N] times."""
    sums, quantities = {}, {}
    for s, drawn in zip(SUBJECTS, draws, strict=True):
        for name, values in corpora[s].items():
            sums[s, name] = (drawn @ values.reshape(len(values), -1)).reshape(len(drawn), *values.shape[1:])
        tokens = sums[s, "tokens"][:, None]
        quantities |= {f"jaccard_{s}": sums[s, "jaccard"] / tokens, f"stability_{s}": sums[s, "unchanged"] / tokens}
    for model, end in zip(MODELS, ("_original", ""), strict=True):
        counts = [sums[s, model] for s in SUBJECTS]
        frequencies = [sums[s, model] / sums[s, "tokens"][:, None, None] for s in SUBJECTS]
        quantities |= {
            f"gap{end}": differences.frequency_gap(*frequencies),
            f"kl{end}": differences.kl_divergence(*map(differences.smoothed_shares, counts)),
            f"js{end}": differences.js_divergence(*(f / f.sum(axis=-1, keepdims=True) for f in frequencies)),
        }
        for s, f in zip(SUBJECTS, frequencies, strict=True):
            quantities[f"load_entropy_{s}{end}"] = differences.load_entropy(f)
            quantities[f"dead_experts_{s}{end}"] = (f == 0).sum(axis=-1).astype(np.float64)
    for s in SUBJECTS:
        before, after = (sums[s, model] for model in MODELS)
        quantities[f"newly_dead_{s}"] = ((before > 0) & (after == 0)).sum(axis=-1).astype(np.float64)
    return quantities


def measure_calibration(weights: RetainWeights, forget: ExpertStatistics, retain: ExpertStatistics) -> dict[str, Any]:
    """What a calibration reached, with the weights that unlearning began with, made from statistics of the original.

    Gaps are sums over experts of |f - f^F|, f the retain frequency before, and the weighted one after.

    Returns:
      layers: which layer of the network each entry is of, counted from 0.  tokens: of the retain corpus.
      effective_sample_size: (sum w)^2 / (T sum w^2) of the token weights.  largest_weight: the mean is one.
      selected: i64 [L], experts that weights were made from; gap_before, gap_after: f64 [L], of these;
        gap_elsewhere_before, gap_elsewhere_after: of all other experts. None for weightings that look at no expert.
    """
    names = ("gap_before", "gap_after", "gap_elsewhere_before", "gap_elsewhere_after")
    gaps: dict[str, Any] = dict.fromkeys(("selected", *names))
    if weights.frequency is not None and weights.selected is not None:
        gaps["selected"] = weights.selected.sum(axis=1)
        for name, frequencies in (("before", retain.frequency), ("after", weights.frequency)):
            gap = np.abs(frequencies - forget.frequency)
            gaps[f"gap_{name}"] = np.where(weights.selected, gap, 0.0).sum(axis=1)
            gaps[f"gap_elsewhere_{name}"] = np.where(weights.selected, 0.0, gap).sum(axis=1)
    return {
        "layers": list(retain.layers or range(len(retain.counts))),
        "tokens": retain.tokens,
        "effective_sample_size": weights.effective_sample_size,
        "largest_weight": float(weights.weights.max()),
        **gaps,
    }


def calibration_measurements(calibration: Mapping[str, Any]) -> list[Measurement]:
    """Effective sample size, and the gap of the selected experts summed over layers, as in the certificate."""
    values = [("effective_sample_size", calibration["effective_sample_size"], "")]
    if (selected := calibration["selected"]) is not None:
        note = f"{selected.sum():,} selected experts, sum over {len(calibration['layers'])} layers"
        values += [(name, float(calibration[name].sum()), note) for name in ("gap_before", "gap_after")]
    n = calibration["tokens"]
    return [Measurement(v, v, v, n, f"calibration_{name}", SPLIT, note) for name, v, note in values]
