"""A run, a study or a series as one HTML page that opens offline, drawn from its results."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from trace_jax.io.drawing import TIMES_UNIFORM, WIDE, Figure, as_files
from trace_jax.io.progress import flatten, format_interval, format_number, format_share, plain_name
from trace_jax.report import figures
from trace_jax.report.figures import Number, Style, layer_plot, row_plot, swatch
from trace_jax.report.routing import BASELINE, MOST_METHODS, corpus_figures, diagnosis_figures, routing_groups

SPLIT = "test"
EXPERT_COLUMNS = ("layer", "expert", "forget", "retain", "target", "weighted")
_UNKNOWN = {"value": None, "n": None, "low": None, "high": None}
_ENDS = ("value", "low", "high")
_FILES = ("style.css", "template.html")
_SPLITS = ("test", "validation", "train")
MOST_ROWS = 400  # of a table of measurements; the run directory has all
SECTIONS = {
    "comparison": "At equal forgetting", "fronts": "Utility against forgetting", "steps": "Step by step",
    "examples": "What the models say", "attacks": "Under attack", "mismatch": "Is there anything to calibrate?",
    "maps": "Expert activation", "routing": "Routing after unlearning", "damage": "Which experts carry the damage",
    "certificates": "Certificate of the calibration", "losses": "Losses while unlearning",
    "measurements": "All measurements", "made": "How it was made", "terms": "Terms",
}  # fmt: skip
TERMS = {
    "forget accuracy": "share of questions on the forget set that the model answers right",
    "neighbour accuracy": "share of questions right on text that resembles the forget set and is to be kept",
    "forget probability ratio": "probability per token of the forget text, relative to the target model",
    "neighbour utility": "probability per token of neighbouring text relative to the target model, at most 1",
    "general utility": "probability per token of general text relative to the target model, at most 1",
    "mean utility": "mean of the utilities, each over that of the target model",
    "level": "the value of the forgetting measure at which methods are compared (evaluation.levels)",
    "uniform": "the baseline: every retain token counts the same",
    "gain": "mean utility over the baseline's, minus 1, on the same items",
    "effective sample size": "share of the retain tokens that would say as much if all weighed the same",
    "target model": "the model before unlearning",
    "retrained model": "a model that was trained without the forget set",
    "95 % interval": "where the number would lie on other test items, 95 times of 100; it says nothing of other seeds",
    "≈": "interpolated on a straight line between two evaluations",
}


def render(results: Mapping[str, Any]) -> str:
    """The page, which needs nothing beside it and no network, of results.json, study.json or series.json.

    All but the title, benchmark, forgetting, chance and config may be missing; a section without data is left out.

      title, generated: heading; date and time in words.  verdict: the opening, else `conclusion`, what was found.
      benchmark, forgotten: its name, and what was unlearned in words.  forgetting, chance: name of the forgetting
        measure, and what a model without knowledge has of it (or None).
      methods_known: methods in the order of their colours.  examples, losses, changed: of `trace_jax.run.page`.
      rows: of the comparison, references first, each with method, kind ("reference", "method" or "control"),
        forgetting (a number: value, n, low, high; or None), utilities (numbers by name), reached (whether it came
        down to the level), step and seeds (or None), note, between (the two evaluations, step and forgetting, that its
        values are interpolated between; or none), gain (of mean utility over the baseline, a number or None), and in a
        study "run": its variant, method and setting.
      diagnosis: a `Diagnosis` as JSON, with its "sentence".  certificates: by method, a `Certificate` as JSON.
      frequency: forget, retain [L, E], and calibrated [L, E] and selected (bool [L, E]) by method; uniform, K/E, the
        frequency of an expert under uniform routing; layers, numbers of the rows, () counts from 0.
    """
    rows, methods = [{"between": (), "gain": None, **r} for r in results.get("rows", ())], results.get("methods", {})
    frequency, forgetting, settings = results.get("frequency"), results["forgetting"], flatten(results["config"])
    (styles, drawn), attacks = _lines_of_methods(results), _attacks(results, forgetting)
    measured = {m: r["routing"] for m, r in methods.items() if frequency and "quantities" in r.get("routing", {})}
    target = next((row for row in rows if row["kind"] == "reference"), None)
    certificates = {}
    for name, certificate in results.get("certificates", {}).items():  # the largest gap of forget and retain first
        experts = zip(*(certificate[column] for column in EXPERT_COLUMNS), strict=True)
        certificates[name] = {**certificate, "experts": sorted(experts, key=lambda e: -abs(e[2] - e[3]))}

    def legend(names: Iterable[str], place: str) -> list[tuple[str, Markup]]:
        return [(name, swatch(styles[name], f"{name} {place}")) for name in names]

    measure = plain_name(forgetting)
    page = {
        "changed_title": "Settings that differ from the defaults",
        "verdict": "", "conclusion": "", "forgotten": "the forget corpus", "generated": "", "diagnosis": None,
        **results,
        "rows": rows, "columns": _columns(rows, forgetting), "target": target,
        "baseline": BASELINE, "level": _level(results),
        "single": None if "runs" in results else results["config"].get("seed"),
        "gains": any(row.get("gain") for row in rows),
        **drawn,
        "thin": len(styles) <= figures.MOST_BANDS,
        "legend": legend(styles, "fronts"),
        "attacks": attacks,
        "maps": corpus_figures(frequency) if frequency else (),
        "wide_maps": bool(frequency) and len(frequency["forget"][0]) > WIDE,
        "map_scale": TIMES_UNIFORM.legend(),
        "mismatch": diagnosis_figures(results["diagnosis"]) if results.get("diagnosis") else (),
        "measured": list(measured.values()), "most_maps": MOST_METHODS,
        "routing": routing_groups(measured, frequency, styles) if measured and frequency else (),
        "routing_legend": legend(measured, "routing"),
        "damage": _damage({m: r["patching"] for m, r in methods.items() if "patching" in r}, styles),
        "certificates": certificates,
        "expert_columns": EXPERT_COLUMNS, "loss_legend": legend(results.get("losses", {}), "losses"),
        "measurements": _measurements(results), "most_rows": MOST_ROWS,
        "facts": _facts(results), "terms": TERMS,
        "examples": results.get("examples", ()),
        "trained": {m: r["trained"] for m, r in methods.items() if "trained" in r},
        "settings": settings, "versions": flatten(results.get("environment", {})),
    }  # fmt: skip
    changed = results.get("changed")
    page["changed"] = [(n, v) for n, v in settings if changed and any(n == c or n.startswith(f"{c}.") for c in changed)]
    there = {**page, "comparison": rows, "made": True}
    page["sections"] = {name: title for name, title in SECTIONS.items() if there[name]}
    if attacks:
        page["attack_legend"] = legend(attacks["methods"], "attacks")
        label = f"{measure} before and after unlearning and after each attack, one marker per method"
        below = f"{measure} (right: more is back)"
        page["attack_figure"] = row_plot(attacks["rows"], styles, "", label, below=below, chance=results["chance"])
    strict: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict)
    environment.filters |= {"number": format_number, "share": format_share, "plain": plain_name}
    environment.filters["gain"] = lambda x: f"{100 * x:+.1f} %"
    environment.globals |= {"interval": format_interval}
    page["style"], source = (resources.files("trace_jax.report").joinpath(n).read_text("utf-8") for n in _FILES)
    return environment.from_string(source).render(page)


def figure_files(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The fronts, steps and losses of `render` as files for a paper, by name."""
    groups = zip(("front", "step", "training"), _lines_of_methods(results)[1].values(), strict=True)
    drawn = {f"{group}-{f.caption.replace(' ', '_')}": f for group, several in groups for f in several}
    return {f"{name}.{suffix}": content for name, f in drawn.items() for suffix, content in as_files(f).items()}


def _lines_of_methods(results: Mapping[str, Any]) -> tuple[dict[str, Style], dict[str, list[Figure]]]:
    """How methods look, and the figures of their fronts, steps and losses."""
    fronts, scores = _fronts(results), results.get("scores", {})
    names = [*fronts, *(m for values in scores.values() for m in values)]
    styles = figures.method_styles(names, BASELINE, results.get("methods_known", ()))
    drawn = {"fronts": figures.front_figures(fronts, styles, forgetting=results["forgetting"], level=_level(results))}
    drawn |= {"steps": figures.step_figures(scores, styles)}
    return styles, drawn | {"losses": figures.loss_figures(results.get("losses", {}), styles)}


def _level(results: Mapping[str, Any]) -> Any:
    return results["config"].get("evaluation", {"levels": [None]})["levels"][0]


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers cost and are of, in words."""
    facts, methods, environment = {}, results.get("methods", {}), results.get("environment", {})
    frequency, config = results.get("frequency"), results["config"]
    arrays = [result["trained"] for result in methods.values() if result.get("trained")]
    if len(sizes := {sum(one["parameters"] for one in each) for each in arrays}) == 1:  # of one model
        facts["model"] = f"{format_number(sizes.pop())} parameters"
        if frequency:
            layers, experts = len(frequency["forget"]), len(frequency["forget"][0])
            facts["model"] += f", {layers} MoE layers of {experts} experts, top {round(frequency['uniform'] * experts)}"
        if path := config.get("model", {}).get("path"):
            facts["model"] += f" ({path})"
    timed = {m: r for m, r in methods.items() if r.get("seconds_per_step")}
    if timed:
        each = (f"{m} {format_number(r['seconds_per_step'] * r['step'])} s" for m, r in timed.items())
        steps = ", ".join(dict.fromkeys(format_number(r["step"]) for r in timed.values()))
        facts["unlearning"] = f"{steps} steps: {', '.join(each)}, without compilation and evaluation"
    if devices := environment.get("devices"):
        kinds = ", ".join(f"{devices.count(kind)} × {kind.split(':')[-1]}" for kind in dict.fromkeys(devices))
        facts["device"] = f"{kinds}; {environment['cores']} CPU cores" if environment.get("cores") else kinds
    if "runs" in results:
        facts["runs"] = f"{len(results['runs'])}, of {len({run['method'] for run in results['runs']})} methods"
    if "seed" in config:
        seeds = config.get("study", {}).get("seeds", ()) if "runs" in results else [config["seed"]]
        facts["seeds" if len(seeds) > 1 else "seed"] = ", ".join(map(str, seeds))
    if environment.get("command"):
        facts["command"] = environment["command"]
    return facts


def _fronts(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Test fronts by method: of a run one each, of a study those of all seeds with the method's chosen setting."""
    if "runs" not in results:
        return {label: [result["fronts"][SPLIT]] for label, result in results.get("methods", {}).items()}
    names = ("variant", "method", "setting")
    runs = [([run.get(name, "") for name in names], run["test"]) for run in results["runs"]]
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
                numbers = (m["values"][name] for r in patching.values() for m in r["models"] if name in m["values"])
                ends = [x for number in numbers for end in _ENDS if (x := number.get(end)) is not None]
                panels.append(_curves(by_kind, curves, name, method, (min(ends), max(ends))))
        panels.append(figures.drift_plot(result["ratio"], result["drift"], f"drift of each expert, {method}"))
        methods.append({"name": method, "names": names, "panels": panels, **result})
    plots = [row_plot(rows, styles, plain_name(n), f"{plain_name(n)} with parts put back") for n, rows in parts.items()]
    legends = [[(n, swatch(s[n], f"{n} damage")) for n in names] for s, names in ((curves, curves), (styles, patching))]
    return {"methods": methods[:MOST_METHODS], "parts": plots, "legends": legends} if methods else None


def _curves(
    of: Mapping[str, list[Mapping[str, Any]]], styles: Mapping[str, Style], name: str, method: str,
    limits: tuple[float, float],
) -> Figure:  # fmt: skip
    """A measure against how many experts of each layer are original again; `limits` are those of all methods."""
    rows = {kind: [*of["unlearned"], *of[kind], *of["all"]] for kind in styles}
    ticks = ["none", *(str(n["size"]) for n in of["critical"]), "all"]
    lines = {k: {"layers": range(len(ticks)), **{e: [n[e] for n in r] for e in _ENDS}} for k, r in rows.items()}
    before = {"value": [of["original"][0]["value"]] * len(ticks)}
    label = f"{plain_name(name)} of {method} with original experts put back"
    about: Any = {"limits": limits, "below": "original experts in each layer", "ticks": ticks}
    return layer_plot(lines, styles, plain_name(name), label, original=before, **about)


def recovered(attacked: float | None, unlearned: float | None, original: float | None) -> float | None:
    """(attacked − unlearned) / (original − unlearned); None where unlearning took nothing away."""
    if attacked is None or unlearned is None or original is None or original <= unlearned:
        return None
    return (attacked - unlearned) / (original - unlearned)


def _number(measurements: Sequence[Mapping[str, Any]], name: str) -> Number:
    return next((m for m in measurements if m["name"] == name and m["split"] == SPLIT), _UNKNOWN)


def _measurements(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of everything that was measured, a line a measure and a column a model: of the references and methods,
    then of each attack and of each step of a series.
    """
    methods = results.get("methods", {})
    models = {f"{name} model": measured for name, measured in results.get("references", {}).items()}
    models |= {label: result["measurements"] for label, result in methods.items()}
    groups = {"": models}
    for label, result in methods.items():
        for name, attack in result.get("attacks", {}).items():
            of_attack = groups.setdefault(f"after {plain_name(name)}, ", {})
            of_attack |= {f"{label}, {point['at']}": point["measurements"] for point in attack["points"]}
    for step in results.get("steps", ()):
        groups[f"step {step['step']}, "] = {label: r["measurements"] for label, r in step["methods"].items()}
    return [
        {"title": f"{title}{split} split", "attacked": title.startswith("after"), "columns": list(of), "rows": rows}
        for title, of in groups.items()
        for split in _SPLITS
        if (rows := _lines(of, split))
    ]


def _lines(columns: Mapping[str, Sequence[Mapping[str, Any]]], split: str) -> list[dict[str, Any]]:
    """Name, n (of all, else None and of each), notes, and a number or None for each column."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for column, measured in columns.items():
        for one in measured:
            if one["split"] == split:
                lines.setdefault((one["name"], one.get("profile", "")), {})[column] = one
    rows = []
    for (name, profile), cells in lines.items():
        counts = {cell["n"] for cell in cells.values()}
        notes = dict.fromkeys(cell["note"] for cell in cells.values() if cell.get("note"))
        about = {"profile": profile, "n": counts.pop() if len(counts) == 1 else None, "notes": "; ".join(notes)}
        rows.append({"name": name, **about, "cells": [cells.get(column) for column in columns]})
    return rows
