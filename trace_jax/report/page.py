"""A run, a study or a series as one HTML page that opens offline, drawn from its results."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from trace_jax.io import drawing
from trace_jax.io.drawing import TIMES_UNIFORM, Figure, Scale, times
from trace_jax.io.progress import flatten, format_interval, format_number, format_share, plain_name
from trace_jax.report import figures
from trace_jax.report.figures import Number, Style, layer_plot, row_plot, swatch

BASELINE = "uniform"  # the method that the verdict compares the others with
SPLIT = "test"
EXPERT_COLUMNS = ("layer", "expert", "forget", "retain", "target", "weighted")
_UNKNOWN = {"value": None, "n": None, "low": None, "high": None}
MOST_METHODS = 4  # that have heat maps; results.json has the arrays of all
MOST_OUTLINED = 64  # experts of a layer; in narrower cells outlines would hide the colours
SUBJECTS = ("forget", "retain")
_ENDS = ("value", "low", "high")
_ALIVE, _DEAD, _NEWLY_DEAD, _REVIVED = range(4)
STATES = Scale(
    -0.5, 3.5, ("#efeff1", "#8b929b", "#b35806", "#542788"),
    ((_ALIVE, "used"), (_DEAD, "dead before and after"), (_NEWLY_DEAD, "newly dead"), (_REVIVED, "used again")),
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


def render(results: Mapping[str, Any]) -> str:
    """The page, which needs nothing beside it and no network, of results.json, study.json or series.json.

    All but the title, benchmark, forgetting, chance and config may be missing; a section without data is left out.

      title, generated: heading; date and time in words.  verdict: the opening, else `conclusion`, what was found.
      benchmark, forgotten: its name, and what was unlearned in words.  forgetting, chance: name of the forgetting
        measure, and what a model without knowledge has of it (or None).
      rows: of the comparison, references first, each with method, kind ("reference", "method" or "control"),
        forgetting (a number: value, n, low, high; or None), utilities (numbers by name), reached (whether it came
        down to the level), step and seeds (or None), note, between (the two evaluations, step and forgetting, that its
        values are interpolated between; or none), gain (of mean utility over the baseline, a number or None), and in a
        study "run": its objective, method and setting.
      diagnosis: a `Diagnosis` as JSON, with its "sentence".  certificates: by method, a `Certificate` as JSON.
      frequency: forget, retain [L, E], and calibrated [L, E] and selected (bool [L, E]) by method; uniform, K/E, the
        frequency of an expert under uniform routing; layers, numbers of the rows, () counts from 0.
    """
    rows, methods = results.get("rows", ()), results.get("methods", {})
    scores, frequency = results.get("scores", {}), results.get("frequency")
    level, forgetting = results["config"].get("evaluation", {"levels": [None]})["levels"][0], results["forgetting"]
    fronts, attacks = _fronts(results), _attacks(results, forgetting)
    measured = {m: r["routing"] for m, r in methods.items() if frequency and "quantities" in r.get("routing", {})}
    styles = figures.method_styles([*fronts, *(m for values in scores.values() for m in values)], BASELINE)
    target = next((row for row in rows if row["kind"] == "reference"), None)
    certificates = {}
    for name, certificate in results.get("certificates", {}).items():  # the largest gap of forget and retain first
        experts = zip(*(certificate[column] for column in EXPERT_COLUMNS), strict=True)
        certificates[name] = {**certificate, "experts": sorted(experts, key=lambda e: -abs(e[2] - e[3]))}

    def legend(names: Iterable[str], place: str) -> list[tuple[str, Markup]]:
        return [(name, swatch(styles[name], f"{name} {place}")) for name in names]

    measure = plain_name(forgetting)
    page = {
        "verdict": "", "conclusion": "", "forgotten": "the forget corpus", "generated": "", "diagnosis": None,
        **results,
        "rows": rows, "columns": _columns(rows, forgetting), "target": target,
        "baseline": BASELINE, "level": level, "single": "runs" not in results and results["config"].get("seed"),
        "gains": any(row.get("gain") for row in rows),
        "fronts": figures.front_figures(fronts, styles, forgetting=forgetting, level=level, target=target),
        "steps": figures.step_figures(scores, styles),
        "runs": {method: len(runs) for method, runs in fronts.items()},
        "legend": legend(styles, "fronts"),
        "attacks": attacks,
        "maps": corpus_figures(frequency) if frequency else (),
        "map_scale": TIMES_UNIFORM.legend(),
        "mismatch": diagnosis_figures(results["diagnosis"]) if results.get("diagnosis") else (),
        "measured": list(measured.values()), "most_maps": MOST_METHODS,
        "routing": routing_groups(measured, frequency, styles) if measured and frequency else (),
        "routing_legend": legend(measured, "routing"),
        "damage": _damage({m: r["patching"] for m, r in methods.items() if "patching" in r}, styles),
        "certificates": certificates,
        "expert_columns": EXPERT_COLUMNS,
        "measurements": _measurements(results),
        "trained": {m: r["trained"] for m, r in methods.items() if "trained" in r},
        "settings": flatten(results["config"]), "versions": flatten(results.get("environment", {})),
    }  # fmt: skip
    if attacks:
        page["attack_legend"] = legend(attacks["methods"], "attacks")
        label = f"{measure} before and after unlearning and after each attack, one marker per method"
        below = f"{measure} (right: more is back)"
        page["attack_figure"] = row_plot(attacks["rows"], styles, "", label, below=below, chance=results["chance"])
    strict: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict)
    environment.filters |= {
        "number": format_number,
        "share": format_share,
        "plain": plain_name,
        "gain": lambda x: f"{100 * x:+.1f} %",
    }
    environment.globals |= {"interval": format_interval}
    source = resources.files("trace_jax.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(page)


def _fronts(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Test fronts by method: of a run one each, of a study those of all seeds with the method's chosen setting."""
    if "runs" not in results:
        return {label: [result["fronts"][SPLIT]] for label, result in results.get("methods", {}).items()}
    runs = [([run.get(key, "") for key in ("objective", "method", "setting")], run["test"]) for run in results["runs"]]
    return {row["method"]: [front for name, front in runs if name == list(row["run"])] for row in results["rows"]}


def _columns(rows: Sequence[Mapping[str, Any]], forgetting: str) -> dict[str, float]:
    """Columns of the comparison and the ends of their bars: 1 for shares, else a little above the largest; 0: none."""
    ends = {}
    for name in dict.fromkeys([forgetting, *(name for row in rows for name in row["utilities"])]):
        numbers = [row["forgetting"] if name == forgetting else row["utilities"].get(name) for row in rows]
        values = [x for number in numbers if number for x in (number["value"], number["high"]) if x is not None]
        top = max(values, default=0.0)
        ends[name] = 0.0 if not values or min(values) < 0 else 1.0 if top <= 1 else 1.05 * top
    return ends


def _attacks(results: Mapping[str, Any], measure: str) -> dict[str, Any] | None:
    """The forgetting measure before, after, and under attack; None without attacks.

    lines: before, after, and every attack at its strongest; forms: all its forms. Each is (name, form, a cell per
    method): a number with words, "at", its form, "back", how much of what unlearning took away, "retrained", what the
    attack teaches a model that never knew; or why it "failed".  rows: of the figure, numbers by method.
    """
    methods = {label: r for label, r in results.get("methods", {}).items() if r.get("attacks")}
    if not methods:
        return None
    before = _number(results["references"]["target"], measure)
    after = {label: _number(result["measurements"], measure) for label, result in methods.items()}

    def cell(label: str, point: Mapping[str, Any]) -> dict[str, Any]:
        value = _number(point["measurements"], measure)
        back = recovered(value["value"], after[label]["value"], before["value"])
        shown = {**value, "at": point["at"], "back": "" if back is None else f"{round(100 * back)} % back"}
        if "original" in point:  # asked in another way, so that before and after are not comparable
            shown["back"] = f"original: {format_number(_number(point['original'], measure)['value'])}"
        if "retrained" in point:
            shown["control"] = _number(point["retrained"], measure)
            shown["retrained"] = f"retrained: {format_number(shown['control']['value'])}"
        return shown

    lines = [("before unlearning", "", [before] * len(methods)), ("after unlearning", "", list(after.values()))]
    rows: dict[str, dict[str | None, Number]] = {"before unlearning": {"": before}, "after unlearning": {**after}}
    forms = []
    for name in next(iter(methods.values()))["attacks"]:
        attacks = {label: result["attacks"][name] for label, result in methods.items()}
        cells = {m: [cell(m, point) for point in attack["points"]] for m, attack in attacks.items()}
        strongest = {m: cells[m][a["strongest"]] for m, a in attacks.items() if a["strongest"] is not None}
        failed = {m: {**_UNKNOWN, "failed": attack["failed"] or "not measured"} for m, attack in attacks.items()}
        lines.append((plain_name(name), "", list((failed | strongest).values())))
        if strongest:
            controls = [c["control"] for c in strongest.values() if "control" in c]
            rows[plain_name(name)] = {**({None: controls[0]} if controls else {}), **strongest}
        for at in dict.fromkeys(c["at"] for each in cells.values() for c in each):
            of_form = [next((c for c in each if c["at"] == at), _UNKNOWN) for each in cells.values()]
            forms.append((plain_name(name), at, of_form))
    retrained = any("control" in c for _, _, cells in forms for c in cells)
    return {"methods": list(methods), "lines": lines, "forms": forms, "rows": rows, "retrained": retrained}


def _damage(patching: Mapping[str, Mapping[str, Any]], styles: Mapping[str, Style]) -> dict[str, Any] | None:
    """Figures of what `measure_patching` gave: curves and drift of the first methods, parts put back of all."""
    curves, methods = figures.method_styles(("critical", "random", "least"), "random"), []
    parts: dict[str, dict[str, dict[str | None, Number]]] = {}
    for method, result in patching.items():
        models, panels, names = result["models"], [], []
        for name in models[0]["values"] if models else ():
            by_kind: dict[str, list[Mapping[str, Any]]] = {}
            for model in models:
                by_kind.setdefault(model["kind"], []).append({"size": model["size"], **model["values"][name]})
                if model["kind"] not in curves:
                    row = parts.setdefault(name, {}).setdefault(model["name"], {})
                    row["" if model["kind"] == "original" else method] = model["values"][name]
            if "critical" in by_kind:
                names.append(name)
                panels.append(_curves(by_kind, curves, name, method))
        panels.append(figures.drift_plot(result["ratio"], result["drift"], f"drift of each expert, {method}"))
        methods.append({"name": method, "names": names, "panels": panels, **result})
    plots = [row_plot(rows, styles, plain_name(n), f"{plain_name(n)} with parts put back") for n, rows in parts.items()]
    legends = [[(n, swatch(s[n], f"{n} damage")) for n in names] for s, names in ((curves, curves), (styles, patching))]
    return {"methods": methods[:MOST_METHODS], "parts": plots, "legends": legends} if methods else None


def _curves(of: Mapping[str, list[Mapping[str, Any]]], styles: Mapping[str, Style], name: str, method: str) -> Figure:
    """A measure against how many experts of each layer are original again."""
    rows = {kind: [*of["unlearned"], *of[kind], *of["all"]] for kind in styles}
    ticks = ["none", *(str(n["size"]) for n in of["critical"]), "all"]
    lines = {k: {"layers": range(len(ticks)), **{e: [n[e] for n in r] for e in _ENDS}} for k, r in rows.items()}
    before = {"value": [of["original"][0]["value"]] * len(ticks)}
    values = [x for line in (*lines.values(), before) for e in _ENDS for x in line.get(e, ()) if x is not None]
    label = f"{plain_name(name)} of {method} with original experts put back"
    about: Any = {"limits": (min(values), max(values)), "below": "original experts in each layer", "ticks": ticks}
    return layer_plot(lines, styles, plain_name(name), label, original=before, **about)


def recovered(attacked: float | None, unlearned: float | None, original: float | None) -> float | None:
    """(attacked − unlearned) / (original − unlearned); None where unlearning took nothing away."""
    if attacked is None or unlearned is None or original is None or original <= unlearned:
        return None
    return (attacked - unlearned) / (original - unlearned)


def _number(measurements: Sequence[Mapping[str, Any]], name: str) -> Number:
    return next((m for m in measurements if m["name"] == name and m["split"] == SPLIT), _UNKNOWN)


def _measurements(results: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Every list of measurements in results.json or series.json, by what was measured."""
    lists, methods = {f"{n} model": ms for n, ms in results.get("references", {}).items()}, results.get("methods", {})
    lists |= {label: result["measurements"] for label, result in methods.items()}
    for label, result in methods.items():
        for name, attack in result.get("attacks", {}).items():
            for point in attack["points"]:
                lists[f"{label}, {name.replace('_', ' ')}, {point['at']}"] = point["measurements"]
    for step in results.get("steps", ()):
        lists |= {f"{label}, step {step['step']}": r["measurements"] for label, r in step["methods"].items()}
    return lists


# --- routing: where text is sent, and every quantity that `trace_jax.evaluation.routing` measures


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
    return [
        drawing.heat_map(values, scale, caption, what, selected=selected.get(method or ""), layers=layers)
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
        outlined = any(method in selected for method, _ in shown.values())
        if panels or drawn:
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
        if shown := values_of(name):
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
