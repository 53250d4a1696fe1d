"""What unlearning a tenth of TOFU's authors does to small mixtures that know all of them (configs/tofu_small.py).

python benchmarks/studies/tofu_small.py --workdir runs/studies/tofu_small --output FILE [--config.NAME=VALUE ...]

First every weighting under gradient difference, then uniform and TRACE weights under the other objectives, on the same
models. Runs that are there are kept. docs/evaluation.md says where the data is from.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from claims import PAGE, claim, interval

from trace_jax.evaluation.fronts import crossings
from trace_jax.io.environment import describe
from trace_jax.io.files import encode, read_json, write_json
from trace_jax.run.directory import needed
from trace_jax.run.result import trial_label

PARTS = ("weightings", "objectives")
ALONG = ("tofu_forget_quality", "tofu_model_utility", "tofu_forget_probability", "tofu_retain_probability")
OF_MODELS = (
    "tofu_forget_ks",
    *ALONG,
    "tofu_forget_rougeL_recall",
    "tofu_retain_rougeL_recall",
    "tofu_forget_extraction_strength",
)
HALVED = "half of the forget probability"  # the other place where a run is read, whatever the test says
SHOWN = ("uniform", "trace", "trace_rows", "random_experts", "ngram")


def utility_at(run: Mapping[str, Any], level: float | str) -> float:
    """The utility of a run where it first comes down to a level of forgetting, or to `HALVED`; NaN: it doesn't."""
    front = run["test"]
    forgetting = np.array(front["forgetting"])[None]
    if isinstance(level, str):
        probability = np.array(front["measured"]["tofu_forget_probability"])[None]
        forgetting, level = probability / probability[0, 0], 0.5
    if forgetting.min() > level:
        return math.nan
    return float(crossings(forgetting, level)(np.array(front["utilities"]["mean_utility"])[None])[0])


def chosen(study: Mapping[str, Any], objective: str, level: float) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The runs of each method, by seed, in the setting that was chosen on validation where a level is first reached."""
    [compared] = [
        c for c in study["comparisons"]
        if c.get("variant", "") == objective and c["level"] == level and c["reading"] == "first"
    ]  # fmt: skip
    settings = {result["method"]: result["setting"] for result in compared["results"]}
    own = [r for r in study["runs"] if r.get("variant", "") == objective]
    return {m: {r["seed"]: r for r in own if (r["method"], r["setting"]) == (m, s)} for m, s in settings.items()}


def utilities_at(runs: Mapping[int, Any], level: float | str) -> list[float]:
    """Those of the seeds that come down to it."""
    return [u for u in (utility_at(run, level) for run in runs.values()) if u == u]


def differences(runs: Mapping[str, Mapping[int, Any]], one: str, other: str, level: float | str) -> list[float]:
    """Utility of one method minus another's at a level, of the seeds where both come down to it."""
    pairs = [(utility_at(run, level), utility_at(runs[other][seed], level)) for seed, run in runs[one].items()]
    return [ours - theirs for ours, theirs in pairs if ours == ours and theirs == theirs]


def rows_of(runs: Mapping[str, Mapping[int, Any]], level: float) -> list[list[Any]]:
    """A row of a table for each method."""
    rows = []
    for method, by_seed in runs.items():
        there = [sum(min(run["test"]["forgetting"]) <= level for run in by_seed.values()), len(by_seed)]
        last = [by_seed[seed]["test"]["measured"] for seed in by_seed]
        rows.append([
            method,
            next(iter(by_seed.values()))["setting"],
            interval(utilities_at(by_seed, HALVED)),
            _difference(runs, method),
            *(interval([measured[name][-1] for measured in last]) for name in ALONG),
            "/".join(map(str, there)),
        ])  # fmt: skip
    return rows


def _difference(runs: Mapping[str, Mapping[int, Any]], method: str) -> dict[str, Any] | None:
    """To uniform, at `HALVED`; None for uniform itself, and where no seed has both."""
    found = differences(runs, method, "uniform", HALVED) if method != "uniform" else []
    return interval(found) if found else None


def weights_of(workdir: Path, runs: Mapping[str, Mapping[int, Any]]) -> list[list[Any]]:
    """A row for each weighting: the effective sample of its weights, and the gap of its experts before and after."""
    rows = []
    for method, by_seed in runs.items():
        found: dict[str, list[float]] = {}
        for seed, run in by_seed.items():
            results = read_json(
                workdir / f"seed-{seed}" / "methods" / trial_label(method, run["setting"]) / "results.json"
            )
            for one in results["measurements"]:
                found.setdefault(one["name"], []).append(one["value"])
        columns = (f"calibration_{name}" for name in ("effective_sample_size", "gap_before", "gap_after"))
        rows.append([method, *(interval(found[name]) if name in found else None for name in columns)])
    return rows


def summary(workdir: Path, studies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Claims, tables, figures and numbers of finished studies, by part."""
    level, runs = studies["weightings"]["comparisons"][0]["level"], {}
    for study in studies.values():
        for objective in dict.fromkeys(run.get("variant", "") for run in study["runs"]):
            runs[objective or "gradient_difference"] = chosen(study, objective, level)
    own = runs["gradient_difference"]
    seeds = sorted({run["seed"] for run in studies["weightings"]["runs"]})
    models: dict[str, list[dict[str, float]]] = {"target": [], "retrained": []}
    for seed in seeds:
        for name, several in needed(workdir / f"seed-{seed}" / "references.json")["measurements"].items():
            models[name].append({m["name"]: m["value"] for m in several if m["split"] == "test"})
    mismatch = {seed: needed(workdir / f"seed-{seed}" / "statistics" / "diagnosis.json") for seed in seeds}
    every = [_raw(run) for study in studies.values() for run in study["runs"]]
    return {
        "question": 8,
        "name": "tofu_small",
        "title": "TOFU on a small mixture",
        "seeds": seeds,
        "environment": describe(),
        "claims": claims_of(models, mismatch, runs, level),
        "tables": tables_of(models, mismatch, weights_of(workdir, own), runs, level),
        "figures": figures_of(own),
        "raw": {"models": encode(models, digits=4), "runs": every},
    }


def claims_of(models: Mapping, mismatch: Mapping, objectives: Mapping, level: float) -> list[dict[str, Any]]:
    """Whether the models are what they should be, whether there is a mismatch, and what weights gain."""
    name, runs = "tofu_forget_probability", objectives["gradient_difference"]
    known = [target[name] - retrained[name] for target, retrained in zip(*models.values(), strict=True)]
    apart = [target["tofu_forget_ks"] for target in models["target"]]
    kept = [target["tofu_retain_probability"] for target in models["target"]]
    ratio = "use of the selected experts on forget over retain text, on held-out rows (weak from 1.25)"
    told = [diagnosis["held_out"] for diagnosis in mismatch.values()]
    claims = [
        claim(
            "The target knows forget answers that the retrained model does not.", "probability, less", known, bound=0.5
        ),
        claim("Truth ratios tell the target from the retrained model.", "statistic", apart, bound=level),
        claim("The target knows retain answers.", "probability", kept, bound=0.5),
        claim("Routing tells forget authors from the others, pages of one form.", ratio, told, bound=1.25, place=PAGE),
    ]
    came = [run["test"]["forgetting"][0] - run["test"]["forgetting"][-1] for run in runs["uniform"].values()]
    claims.append(
        claim(
            "Unlearning with `uniform` brings truth ratios nearer to the retrained model's.",
            "fall of the statistic",
            came,
        )
    )
    for where, place in ((f"where the statistic is {level:g}", level), (f"at {HALVED}", HALVED)):
        for one, other in (("trace", "uniform"), ("trace_rows", "uniform"), ("trace_rows", "random_experts")):
            text = f"`{one}` keeps more model utility than `{other}` {where}."
            gains, on_page = differences(runs, one, other, place), PAGE if other == "uniform" else None
            if gains:
                claims.append(claim(text, "difference of relative model utility", gains, place=on_page))
    by_objective = [differences(of, "trace_rows", "uniform", HALVED) for of in objectives.values()]
    if len({len(of) for of in by_objective}) == 1:  # all of all seeds
        text = f"Over all objectives, `trace_rows` keeps more model utility than `uniform` at {HALVED}."
        measure = "mean difference of relative model utility"
        claims.append(claim(text, measure, np.mean(by_objective, axis=0), place=PAGE))
    return claims


def tables_of(models: Mapping, mismatch: Mapping, weights: list, runs: Mapping, level: float) -> list[dict[str, Any]]:
    """Models before unlearning, the mismatch, the weights, and a table for each objective."""
    told = [[_words(name), *(interval([m[name] for m in of]) for of in models.values())] for name in OF_MODELS]
    columns = ["method", "setting", f"relative model utility at {HALVED}", "minus uniform"]
    columns += [*(f"{_words(name)}, end" for name in ALONG), f"seeds with a statistic of {level:g}"]
    found = [[str(seed), d["held_out"], d["noise"], d["verdict"]] for seed, d in mismatch.items()]
    gaps = ["weighting", "effective sample", "gap of its experts before", "gap after"]
    tables = [
        ("Models before unlearning", ["", *models], told),
        ("Mismatch of routing", ["seed", "held-out ratio", "noise", "verdict"], found),
        ("Weights of the retain tokens", gaps, weights),
    ]
    for objective, of in runs.items():
        title = f"`{objective}`, at {HALVED} and at the end"
        tables.append((title, columns, rows_of(of, level)))
    return [dict(zip(("title", "columns", "rows"), table, strict=True)) for table in tables]


def figures_of(runs: Mapping[str, Mapping[int, Any]]) -> list[dict[str, Any]]:
    """Utility against the forget probability along runs, and utility where half of that is left."""
    lines = {
        "name": "tofu_small_front",
        "title": "Forget probability and model utility along runs",
        "caption": "Gradient difference; each point an evaluation, mean over seeds.",
        "kind": "lines",
        "x": "probability of forget answers",
        "y": "model utility, relative",
        "series": [{"name": method, **_mean_front(runs[method])} for method in SHOWN if method in runs],
    }
    reached = [(method, interval(found)) for method, of in runs.items() if (found := utilities_at(of, HALVED))]
    series = {"name": "mean over seeds", "x": [name for name, _ in reached], "y": [u["value"] for _, u in reached]}
    series |= {end: [u["value"] if u[end] is None else u[end] for _, u in reached] for end in ("low", "high")}
    bars = {
        "name": "tofu_small_weightings",
        "title": f"Model utility at {HALVED}",
        "caption": "Gradient difference; mean over seeds, with Student's interval.",
        "kind": "bars",
        "x": "model utility, relative",
        "y": "",
        "series": [series],
    }
    return [lines, *[bars] * bool(reached)]


def _words(name: str) -> str:
    return name.removeprefix("tofu_").replace("_", " ")


def _mean_front(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """x and y of a line: means over seeds at each evaluation that all have."""
    fronts = [run["test"] for run in runs.values()]
    count = min(len(front["steps"]) for front in fronts)
    x = np.mean([front["measured"]["tofu_forget_probability"][:count] for front in fronts], axis=0)
    y = np.mean([front["utilities"]["mean_utility"][:count] for front in fronts], axis=0)
    return {"x": x.round(4).tolist(), "y": y.round(4).tolist()}


def _raw(run: Mapping[str, Any]) -> dict[str, Any]:
    front = run["test"]
    numbers = {"forgetting": front["forgetting"], "utility": front["utilities"]["mean_utility"]}
    numbers |= {name: front["measured"][name] for name in ALONG}
    about = {name: run[name] for name in ("variant", "method", "setting", "seed") if name in run}
    return about | {"steps": front["steps"]} | encode(numbers, digits=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options, overrides = parser.parse_known_args()
    start, studies, clock = time.perf_counter(), {}, options.workdir / "seconds.json"
    before = read_json(clock) or 0.0
    for part in PARTS:
        config = ["--config", f"configs/tofu_small.py:{part}", "--workdir", str(options.workdir), *overrides]
        subprocess.run([sys.executable, "-m", "trace_jax.main", "study", *config], check=True)
        studies[part] = read_json(options.workdir / "study.json")
        write_json(clock, before + time.perf_counter() - start)
    command = f"python benchmarks/studies/tofu_small.py --workdir {options.workdir}"
    found = {"command": command, "seconds": read_json(clock), **summary(options.workdir, studies)}
    output = options.output or options.workdir / "tofu_small.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for one in found["claims"]:
        print(f"{one['claim']} {one['measure']}: {one['value']} [{one['low']}, {one['high']}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
