"""Figures of routing: where text is sent, and every quantity that `trace_jax.evaluation.routing` measures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.io import drawing
from trace_jax.io.drawing import TIMES_UNIFORM, Figure, Scale, times
from trace_jax.io.progress import format_share, plain_name
from trace_jax.report import figures
from trace_jax.report.figures import Style, layer_plot, row_plot

BASELINE = "uniform"  # the method that others are compared with
MOST_METHODS = 4  # that have heat maps; results.json has the arrays of all
MOST_OUTLINED = 64  # experts of a layer; in narrower cells outlines would hide the colours
SUBJECTS = ("forget", "retain")
_ALIVE, _DEAD, _NEWLY_DEAD, _REVIVED = range(4)
STATES = Scale(
    -0.5, 3.5, ("#efeff1", "#8b929b", "#b35806", "#542788"),
    ((_ALIVE, "used"), (_DEAD, "dead before and after"), (_NEWLY_DEAD, "newly dead"), (_REVIVED, "used again")),
    steps=4,
)  # fmt: skip
_CAPTIONS = {"gap": "Frequency gap", "js": "Jensen-Shannon divergence", "kl": "KL divergence", "jaccard": "Overlap"}
# By title, the quantities that have one value per layer; the page says how to read each.
GROUPS = {
    "Top-K overlap with the original model": ("jaccard_forget", "jaccard_retain"),
    "Routing stability": ("stability_forget", "stability_retain"),
    "Use of each expert": (),
    "Change of use": (),
    "Forget against retain text": ("gap", "js", "kl"),
    "Evenness of the load": ("load_entropy_forget", "load_entropy_retain"),
    "Dead experts": ("dead_experts_forget", "dead_experts_retain"),
    "Router drift": ("router_drift",),
    "Calibration": (),
}

Measured = Mapping[str, Mapping[str, Any]]  # by method, what results.json has under "routing"
Maps = dict[str, tuple[str | None, np.ndarray]]  # by caption: whose selected experts to outline, and values [L, E]


def corpus_figures(frequency: Mapping[str, Any]) -> list[Figure]:
    """Heat maps of the forget set, of the retain set, and of it after each calibration, selected experts outlined."""
    maps: Maps = {"Forget set": (None, frequency["forget"]), "Retain set, before": (None, frequency["retain"])}
    maps |= {f"Retain set, calibrated by {m}": (m, values) for m, values in frequency["calibrated"].items()}
    scaled = {caption: (m, times(values, frequency["uniform"])) for caption, (m, values) in maps.items()}
    return _draw(scaled, TIMES_UNIFORM, "activation frequency", frequency["selected"], frequency["layers"])


def diagnosis_figures(diagnosis: Mapping[str, Any]) -> list[Figure]:
    """By layer how differently two texts are routed, with the noise dotted; and what weights can do about it."""
    styles, plots = figures.method_styles([BASELINE, "texts"], BASELINE), []
    for name, of in diagnosis["quantities"].items():
        drawn = {"texts": {"layers": diagnosis["layers"], "value": of["value"]}}
        noise, caption = {"value": of["noise"]}, f"{plain_name(name).capitalize()} by layer"
        label, limits = f"{caption}, forget against retain text", _limits(name, [drawn["texts"], noise])
        plots.append(layer_plot(drawn, styles, caption, label, original=noise, limits=limits))
    return [*plots, figures.curve_plot(diagnosis["curve"])] if diagnosis["curve"] else plots


def _draw(maps: Maps, scale: Scale, what: str, selected: Mapping[str, Any], layers: Sequence[int]) -> list[Figure]:
    """Maps of a model without selected experts of its own have those of the first method that selected any."""
    first = next(iter(selected.values()), None)
    return [
        drawing.heat_map(values, scale, caption, what, selected=selected.get(method or "", first), layers=layers)
        for caption, (method, values) in maps.items()
    ]


def routing_groups(
    measured: Measured, frequency: Mapping[str, Any], styles: Mapping[str, Style]
) -> list[dict[str, Any]]:
    """Every quantity that was measured on unlearned models: title, panels, and maps with the legend of their scale."""
    maps, groups = _maps(measured, frequency["uniform"]), []
    selected = frequency["selected"] if len(frequency["forget"][0]) <= MOST_OUTLINED else {}
    for title, names in GROUPS.items():
        panels = _calibration(measured, styles) if title == "Calibration" else _by_layer(measured, names, styles)
        what, shown, scale = maps.get(title, ("", {}, TIMES_UNIFORM))
        drawn = _draw(shown, scale, what, selected, frequency["layers"])
        outlined = bool(selected) and bool(drawn)
        if panels or drawn or any(name in of["quantities"] for of in measured.values() for name in names):
            legend = {"scale": scale.legend(), "outlined": outlined}
            groups.append({"title": title, "panels": panels, "maps": drawn, **legend})
    return groups


def _maps(measured: Measured, uniform: float) -> dict[str, tuple[str, Maps, Scale]]:
    """By title: what the maps of the first methods show, the maps, and the scale that they share."""
    first = dict(list(measured.items())[:MOST_METHODS])
    original = next(iter(first.values()))["frequency"]["original"]
    use: Maps = {f"Use, original model, {s} text": (None, times(original[s], uniform)) for s in SUBJECTS}
    gap: Maps = {"Forget − retain, original model": (None, np.subtract(original["forget"], original["retain"]))}
    change: Maps = {}
    states: Maps = {}
    for method, result in first.items():
        old, new = ({s: np.array(result["frequency"][m][s]) for s in SUBJECTS} for m in ("original", "unlearned"))
        gap[f"Forget − retain, {method}"] = method, new["forget"] - new["retain"]
        for s in SUBJECTS:
            use[f"Use, {method}, {s} text"] = method, times(new[s], uniform)
            change[f"Change, {method}, {s} text"] = method, new[s] - old[s]
            was, is_used = old[s] > 0, new[s] > 0
            state = np.select([was & is_used, ~was & ~is_used, was], [_ALIVE, _DEAD, _NEWLY_DEAD], _REVIVED)
            states[f"Dead experts, {method}, {s} text"] = None, state
    drift: Maps = {f"Drift by expert, {m}": (m, np.array(r["expert_drift"])) for m, r in first.items()}

    def scale(maps: Maps, *, diverging: bool = True) -> Scale:
        return drawing.scale_of([values for _, values in maps.values()], diverging=diverging)

    maps = {
        "Use of each expert": ("activation frequency", use, TIMES_UNIFORM),
        "Change of use": ("change of activation frequency", change, scale(change)),
        "Forget against retain text": ("forget − retain frequency", gap, scale(gap)),
    }
    if any(values.any() for _, values in states.values()):
        maps["Dead experts"] = "dead experts", states, STATES
    if any(values.any() for _, values in drift.values()):
        maps["Router drift"] = "relative change of router weights", drift, scale(drift, diverging=False)
    return maps


def _by_layer(measured: Measured, names: Sequence[str], styles: Mapping[str, Style]) -> list[Figure]:
    """One plot by layer per quantity; plots of one quantity on both corpora share their axis."""

    def values_of(name: str) -> dict[str, Mapping[str, Any]]:
        return {m: {"layers": r["layers"], **q} for m, r in measured.items() if (q := r["quantities"].get(name))}

    plots = []
    for name in names:
        kind, _, subject = name.rpartition("_") if name.endswith(SUBJECTS) else (name, "", "")
        alike = [n for other in names if other.startswith(kind) for n in (other, f"{other}_original")]
        drawn = [quantity for n in alike for quantity in values_of(n).values()]
        if (shown := values_of(name)) and any(any(quantity["value"]) for quantity in drawn):
            caption = _CAPTIONS.get(kind) or plain_name(kind).capitalize()
            caption += f", {subject} text" if subject else ""
            original = next(iter(values_of(f"{name}_original").values()), None)
            label, limits = f"{plain_name(name)} by layer, one line per method", _limits(kind, drawn)
            plots.append(layer_plot(shown, styles, caption, label, original=original, limits=limits))
    return plots


def _limits(kind: str, quantities: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Ends of the axis: shares from 0 to 1; entropies from a little below the lowest to 1; others from 0."""
    if kind in ("jaccard", "stability"):
        return 0.0, 1.0
    values = [x for q in quantities for end in ("value", "low", "high") for x in q.get(end, ()) if x is not None]
    if kind == "load_entropy":
        return max(0.0, np.floor(10 * min(values, default=0.0)) / 10), 1.0
    return 0.0, max(values, default=1.0) or 1.0


def _calibration(measured: Measured, styles: Mapping[str, Style]) -> list[Figure]:
    """The gap by layer of each method, and the effective sample size of all."""
    calibrated = {m: r["calibration"] for m, r in measured.items() if r.get("calibration")}
    gaps = {m: c for m, c in calibrated.items() if c.get("gap_after") is not None}
    top = max((x for c in gaps.values() for x in (*c["gap_before"], *c["gap_after"])), default=0.0) or 1.0
    plots = [
        layer_plot(
            {method: {"layers": c["layers"], "value": c["gap_after"]}}, styles, f"Calibration gap, {method}",
            f"calibration gap of {method} by layer, before and after", original={"value": c["gap_before"]},
            limits=(0.0, top),
        )
        for method, c in list(gaps.items())[:MOST_METHODS]
    ]  # fmt: skip
    shares = {m: c["effective_sample_size"] for m, c in calibrated.items() if c["effective_sample_size"] is not None}
    if shares:
        rows = {f"{m}: {format_share(x)}": {m: {"value": x, "low": None, "high": None}} for m, x in shares.items()}
        label = "effective sample size of the retain weights, by method"
        plots.append(row_plot(rows, styles, "Effective sample size", label, share=True))
    return plots
