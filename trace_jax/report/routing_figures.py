"""Figures of routing: where text is sent, and every quantity that `trace_jax.evaluation.routing` measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.report.data import Routing, known
from trace_jax.report.drawing import Figure
from trace_jax.report.figures import Style
from trace_jax.report.heat_maps import TIMES_UNIFORM, Scale, diverging, heat_map, sequential, times_uniform
from trace_jax.report.layer_plots import before_after_plot, layer_plot, share_plot
from trace_jax.report.words import plain_name

MOST_METHODS = 4  # that have heat maps; results.json has the arrays of all
MOST_OUTLINED = 64  # experts of a layer; in narrower cells outlines would hide the colours
SUBJECTS = ("forget", "retain")
_ALIVE, _DEAD, _NEWLY_DEAD, _REVIVED = range(4)
STATES = Scale(
    -0.5, 3.5, ("#efeff1", "#8b929b", "#b35806", "#542788"),
    ((_ALIVE, "used"), (_DEAD, "dead before and after"), (_NEWLY_DEAD, "newly dead"), (_REVIVED, "used again")),
)  # fmt: skip

HINTS = {
    "jaccard": "Mean over tokens of the Jaccard index of the experts chosen before and after: 1 means that nothing has "
    "moved. Where unlearning works through routing, it is low on forget text and stays high on retain text.",
    "stability": "Share of tokens with exactly the experts that the original model chooses; stricter than the overlap.",
    "use": "Share of the tokens that choose an expert, in multiples of uniform routing, before and after on the same "
    "rows.",
    "change": "Frequency after less frequency before, as a share of tokens: experts that gained (orange) and lost "
    "(purple) tokens.",
    "gap": "How differently the two corpora use the experts: the sum of frequency differences (0 to 2K), and "
    "Jensen-Shannon (0 to 0.693) and KL divergence, forget from retain, in nats. Few tokens raise all three, so "
    "compare with the original model. Maps: forget less retain frequency; a layer's absolute values sum to its gap.",
    "load_entropy": "Entropy of the experts' load over log E: 1 is an even load, 0 a single expert.",
    "dead": "Experts of a layer that no token of the text chooses; newly dead are those that the original model uses.",
    "drift": "Relative change of a layer's router weights and, in the maps, of each expert's own. It is 0 where "
    "routers are frozen; routing may move even then, because what routers read moves.",
    "calibration": "Gap between forget and retain frequency on the selected experts of a layer, before (hollow) and "
    "after (filled) the retain set was weighted. Effective sample size: the share of retain tokens that would say as "
    "much if all weighed the same; weights act on all layers, so it is one number.",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """One quantity: a heading, a sentence on how to read it, the legend of its colours, and its panels."""

    title: str
    hint: str
    panels: Sequence[Figure]
    maps: Sequence[Figure] = ()
    scale: Sequence[tuple[str, str]] = ()
    outlined: bool = False


def corpus_figures(routing: Routing) -> list[Figure]:
    """Heat maps layers x experts: forget, retain, and retain after each calibration, selected experts outlined."""
    panels = [("Forget set", routing.forget_frequency, None), ("Retain set, before", routing.retain_frequency, None)]
    for method in dict.fromkeys([*routing.calibrated_frequency, *routing.selected]):
        frequency = routing.calibrated_frequency.get(method)
        selected = routing.selected.get(method)
        if frequency is None:
            panels.append((f"Retain set, {method} (weights leave it as it is)", routing.retain_frequency, selected))
        else:
            panels.append((f"Retain set, calibrated by {method}", frequency, selected))
    return [
        Figure(name, _use_map(frequency, routing, f"heat{number}", name, selected))
        for number, (name, frequency, selected) in enumerate(panels)
    ]


def _use_map(frequency: Any, routing: Routing, prefix: str, name: str, selected: Any) -> str:
    values, label = times_uniform(frequency, routing.uniform), f"{name}: activation frequency by layer and expert"
    return heat_map(values, TIMES_UNIFORM, prefix, label, selected=selected, layers=routing.layers)


def routing_groups(routing: Routing, styles: Mapping[str, Style]) -> list[Group]:
    """Every quantity that was measured on unlearned models (`Routing.measured`), in the order of reading."""
    if not routing.measured:
        return []
    maps = _Maps(routing)
    outlined = bool(maps.selected)
    groups = [
        _lines(routing, styles, "Top-K overlap with the original model", _both("jaccard"), HINTS["jaccard"]),
        _lines(routing, styles, "Routing stability", _both("stability"), HINTS["stability"]),
        Group("Use of each expert", HINTS["use"], [], maps.use(), TIMES_UNIFORM.legend(), outlined),
        Group("Change of use", HINTS["change"], [], *maps.change(), outlined),
        _lines(
            routing, styles, "Forget against retain text", ("gap", "js", "kl"), HINTS["gap"],
            maps=maps.difference(), outlined=outlined,
        ),
        _lines(routing, styles, "Evenness of the load", _both("load_entropy"), HINTS["load_entropy"]),
        _dead_experts(routing, styles, maps),
        _lines(
            routing, styles, "Router drift", ("router_drift",), HINTS["drift"], maps=maps.drift(), outlined=outlined
        ),
        _calibration(routing, styles),
    ]  # fmt: skip
    return [group for group in groups if group.panels or group.maps]


def _lines(
    routing: Routing, styles: Mapping[str, Style], title: str, names: Sequence[str], hint: str, *,
    maps: tuple[Sequence[Figure], Sequence[tuple[str, str]]] = ((), ()), outlined: bool = False,
) -> Group:  # fmt: skip
    """A group with one plot by layer per quantity; plots of one quantity on both corpora share their axis."""
    kinds = {name: name.removesuffix("_forget").removesuffix("_retain") for name in names}
    panels = []
    for name in names:
        if found := _quantities(routing, name):
            alike = [other for other in names if kinds[other] == kinds[name]]
            drawn = [
                q for other in alike for q in (*_quantities(routing, other).values(), _original(routing, other)) if q
            ]
            svg = layer_plot(
                {method: (_layers(routing, method), quantity) for method, quantity in found.items()},
                styles,
                f"layers-{name}",
                f"{plain_name(name)} by layer, one line per method",
                original=_original(routing, name),
                limits=_limits(kinds[name], drawn),
            )
            panels.append(Figure(_caption(name), svg))
    return Group(title, hint, panels, *maps, outlined)


def _dead_experts(routing: Routing, styles: Mapping[str, Style], maps: _Maps) -> Group:
    names = _both("dead_experts")
    originals = [q for name in names if (q := _original(routing, name)) is not None]
    found = [*originals, *(q for name in names for q in _quantities(routing, name).values())]
    if not any(value for quantity in found for value in quantity["value"]):
        hint = f"{HINTS['dead']} Here there is none, before or after."
        return _lines(routing, styles, "Dead experts", names, hint)
    return _lines(routing, styles, "Dead experts", names, HINTS["dead"], maps=(maps.states(), STATES.legend()))


def _calibration(routing: Routing, styles: Mapping[str, Style]) -> Group:
    found = {m: r["calibration"] for m, r in routing.measured.items() if r.get("calibration")}
    gaps = {m: c for m, c in found.items() if c.get("gap_after") is not None}
    top = max((x for c in gaps.values() for x in (*c["gap_before"], *c["gap_after"])), default=0.0)
    panels = [
        Figure(
            f"Calibration gap, {method}",
            before_after_plot(
                c["layers"], c["gap_before"], c["gap_after"], styles[method], f"calibration-{number}",
                f"calibration gap of {method} by layer, before and after", top=top or 1.0,
            ),
        )
        for number, (method, c) in enumerate(list(gaps.items())[:MOST_METHODS])
    ]  # fmt: skip
    shares = {method: c["effective_sample_size"] for method, c in found.items() if known(c["effective_sample_size"])}
    if shares:
        label = "effective sample size of the retain weights, by method"
        panels.append(Figure("Effective sample size", share_plot(shares, styles, "calibration-ess", label)))
    return Group("Calibration", HINTS["calibration"], panels)


class _Maps:
    """Heat maps of the first `MOST_METHODS` methods, each kind on a scale of its own that all methods share."""

    def __init__(self, routing: Routing):
        self.routing, self.measured = routing, dict(list(routing.measured.items())[:MOST_METHODS])
        self.first = next(iter(self.measured.values()))["frequency"]["original"]
        few = len(self.first["forget"][0]) <= MOST_OUTLINED
        self.selected = {m: routing.selected[m] for m in self.measured if m in routing.selected} if few else {}

    def use(self) -> list[Figure]:
        """Frequency on forget and retain text: original model, then every method."""
        shown = {f"Use, original model, {s} text": (None, self.first[s]) for s in SUBJECTS}
        shown |= {f"Use, {m}, {s} text": (m, r["frequency"]["unlearned"][s]) for m, r, s in self._each()}
        scaled = {name: (m, times_uniform(f, self.routing.uniform)) for name, (m, f) in shown.items()}
        return self._draw("use", "activation frequency", TIMES_UNIFORM, scaled)

    def change(self) -> tuple[list[Figure], list[tuple[str, str]]]:
        """After less before."""
        pairs = ((m, s, r["frequency"]) for m, r, s in self._each())
        shown = {
            f"Change, {m}, {s} text": (m, _array(f["unlearned"][s]) - _array(f["original"][s])) for m, s, f in pairs
        }
        return self._scaled("change", "change of activation frequency", diverging, shown)

    def difference(self) -> tuple[list[Figure], list[tuple[str, str]]]:
        """Forget less retain: original model, then every method."""
        before = _array(self.first["forget"]) - _array(self.first["retain"])
        shown: dict[str, tuple[str | None, np.ndarray]] = {"Forget less retain, original model": (None, before)}
        for method, result in self.measured.items():
            after = result["frequency"]["unlearned"]
            shown[f"Forget less retain, {method}"] = (method, _array(after["forget"]) - _array(after["retain"]))
        return self._scaled("difference", "forget less retain frequency", diverging, shown)

    def states(self) -> list[Figure]:
        """Which experts are dead."""
        shown = {}
        for method, result, subject in self._each():
            before, after = (_array(result["frequency"][model][subject]) > 0 for model in ("original", "unlearned"))
            states = np.select([before & after, ~before & ~after, before], [_ALIVE, _DEAD, _NEWLY_DEAD], _REVIVED)
            shown[f"Dead experts, {method}, {subject} text"] = (None, states)
        return self._draw("states", "dead experts", STATES, shown)

    def drift(self) -> tuple[list[Figure], list[tuple[str, str]]]:
        """Relative change of each expert's router weights; no maps where no router moved."""
        shown = {f"Drift by expert, {m}": (m, _array(result["expert_drift"])) for m, result in self.measured.items()}
        if not any(values.any() for _, values in shown.values()):
            return [], []
        return self._scaled("drift", "relative change of router weights", sequential, shown)

    def _each(self):
        return [(method, result, subject) for method, result in self.measured.items() for subject in SUBJECTS]

    def _scaled(self, kind: str, what: str, make: Any, shown: Mapping[str, tuple[str | None, np.ndarray]]):
        scale = make([values for _, values in shown.values()])
        return self._draw(kind, what, scale, shown), scale.legend()

    def _draw(self, kind: str, what: str, scale: Scale, shown: Mapping[str, tuple[str | None, np.ndarray]]):
        figures = []
        for number, (name, (method, values)) in enumerate(shown.items()):
            selected = self.selected.get(method) if method else None
            label, layers = f"{name}: {what} by layer and expert", self.routing.layers
            svg = heat_map(values, scale, f"{kind}{number}", label, selected=selected, layers=layers)
            figures.append(Figure(name, svg))
        return figures


def _quantities(routing: Routing, name: str) -> dict[str, Mapping[str, Any]]:
    """A quantity by method, where it was measured."""
    found = {method: result["quantities"].get(name) for method, result in routing.measured.items()}
    return {method: quantity for method, quantity in found.items() if quantity}


def _original(routing: Routing, name: str) -> Mapping[str, Any] | None:
    """What the original model gives: the same beside every method, since all are measured on the same rows."""
    return next(iter(_quantities(routing, f"{name}_original").values()), None)


def _layers(routing: Routing, method: str) -> Sequence[int]:
    return routing.measured[method]["layers"]


def _limits(kind: str, quantities: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Ends of the axis: shares from 0 to 1; entropies from a little below the lowest to 1; others from 0."""
    if kind in ("jaccard", "stability"):
        return 0.0, 1.0
    if kind == "load_entropy":
        lowest = min(_array(quantity[end]).min() for quantity in quantities for end in ("value", "low"))
        return (max(0.0, np.floor(10 * lowest) / 10) if known(lowest) else 0.0), 1.0
    highest = [
        float(np.nanmax(_array(q[end]))) for q in quantities for end in ("value", "high") if any(map(known, q[end]))
    ]
    return 0.0, max(highest, default=1.0) or 1.0


def _caption(name: str) -> str:
    words = {"gap": "Frequency gap", "js": "Jensen-Shannon divergence", "kl": "KL divergence", "jaccard": "Overlap"}
    subject = next((s for s in SUBJECTS if name.endswith(f"_{s}")), None)
    kind = name.removesuffix(f"_{subject}")
    plain = words.get(kind) or plain_name(kind).capitalize()
    return f"{plain}, {subject} text" if subject else plain


def _both(kind: str) -> tuple[str, str]:
    return f"{kind}_forget", f"{kind}_retain"


def _array(values: Any) -> np.ndarray:
    return np.array(values, float)
