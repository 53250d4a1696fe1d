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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.evaluation.fronts import crossings
from trace_jax.evaluation.intervals import t_interval
from trace_jax.io.environment import describe
from trace_jax.io.files import encode, read_json, write_json

PARTS = ("weightings", "objectives")
ALONG = ("tofu_forget_quality", "tofu_model_utility", "tofu_forget_probability", "tofu_retain_probability")
OF_MODELS = (*ALONG[1:], "tofu_forget_rougeL_recall", "tofu_retain_rougeL_recall", "tofu_forget_extraction_strength")
SHOWN = ("uniform", "trace", "trace_rows", "random_experts", "ngram")


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Their mean with Student's interval, as JSON."""
    interval = encode(t_interval(np.array(values, np.float64)), digits=4)
    return {name: interval[name] for name in ("value", "low", "high", "n")}


def claim(text: str, measure: str, values: Sequence[float], holds: str, bound: float) -> dict[str, Any]:
    """A claim on the mean over seeds; without any it has no number."""
    found = over_seeds(values) if len(values) else {"value": None, "low": None, "high": None, "n": 0}
    return {"claim": text, "measure": measure, **found, "over": f"{len(values)} seeds", "holds": holds, "bound": bound}


def utility_at(run: Mapping[str, Any], level: float) -> float:
    """The utility of a run where it first comes down to a level of forgetting; NaN: it doesn't."""
    front = run["test"]
    forgetting = np.array(front["forgetting"])[None]
    if forgetting.min() > level:
        return math.nan
    return float(crossings(forgetting, level)(np.array(front["utilities"]["mean_utility"])[None])[0])


def chosen(study: Mapping[str, Any], objective: str, level: float) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The runs of each method, by seed, in the setting that was chosen on validation where a level is first reached."""
    [compared] = [
        c for c in study["comparisons"]
        if c.get("objective", "") == objective and c["level"] == level and c["reading"] == "first"
    ]  # fmt: skip
    settings = {result["method"]: result["setting"] for result in compared["results"]}
    own = [r for r in study["runs"] if r.get("objective", "") == objective]
    return {m: {r["seed"]: r for r in own if (r["method"], r["setting"]) == (m, s)} for m, s in settings.items()}


def differences(runs: Mapping[str, Mapping[int, Any]], one: str, other: str, level: float) -> list[float]:
    """Utility of one method minus another's at a level, of the seeds where both come down to it."""
    pairs = [(utility_at(run, level), utility_at(runs[other][seed], level)) for seed, run in runs[one].items()]
    return [ours - theirs for ours, theirs in pairs if ours == ours and theirs == theirs]


def rows_of(runs: Mapping[str, Mapping[int, Any]], level: float) -> list[list[Any]]:
    """A row of a table for each method."""
    rows = []
    for method, by_seed in runs.items():
        utilities = [u for u in (utility_at(run, level) for run in by_seed.values()) if u == u]
        last = [by_seed[seed]["test"]["measured"] for seed in by_seed]
        rows.append([
            method,
            next(iter(by_seed.values()))["setting"],
            f"{len(utilities)}/{len(by_seed)}",
            over_seeds(utilities) if utilities else None,
            over_seeds(differences(runs, method, "uniform", level)) if utilities and method != "uniform" else None,
            *(over_seeds([measured[name][-1] for measured in last]) for name in ALONG),
        ])  # fmt: skip
    return rows


def summary(workdir: Path, studies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Claims, tables, figures and numbers of finished studies, by part."""
    weightings, level = studies["weightings"], studies["weightings"]["comparisons"][0]["level"]
    runs = {("gradient_difference" if not o else o): chosen(study, o, level)
            for study in studies.values() for o in dict.fromkeys(r.get("objective", "") for r in study["runs"])}  # fmt: skip
    own = runs["gradient_difference"]
    seeds = sorted({run["seed"] for run in weightings["runs"]})
    models, mismatch = {"target": [], "retrained": []}, []
    for seed in seeds:
        directory = workdir / f"seed-{seed}"
        for name, several in read_json(directory / "references.json")["measurements"].items():
            models[name].append({m["name"]: m["value"] for m in several if m["split"] == "test"})
        mismatch.append(read_json(directory / "statistics" / "diagnosis.json"))
    known = [t["tofu_forget_probability"] - r["tofu_forget_probability"] for t, r in zip(*models.values(), strict=True)]
    kept = [t["tofu_retain_probability"] for t in models["target"]]
    gained = f"relative model utility at a statistic of {level:g}, difference of the tuned"
    claims = [
        claim("The target knows the forget authors, and the retrained model does not.",
              "probability of a forget answer, target minus retrained", known, "above", 0.5),
        claim("The target knows the retain authors.", "probability of a retain answer", kept, "above", 0.5),
        claim("Routing tells forget authors from the others, pages of one form.",
              "use of the selected experts on forget over retain text, held-out rows (weak from 1.25)",
              [d["held_out"] for d in mismatch], "above", 1.25),
        *(claim(f"`{method}` keeps more model utility than tuned uniform.", f"{gained}",
                differences(own, method, "uniform", level), "above", 0.0)
          for method in ("trace", "trace_rows") if method in own),
        *(claim("Rows weighted by selected experts keep more than rows weighted by random experts.", gained,
                differences(own, "trace_rows", "random_experts", level), "above", 0.0)
          for _ in range({"trace_rows", "random_experts"} <= own.keys())),
    ]  # fmt: skip
    columns = ["method", "setting", "seeds at the level", "model utility", "minus uniform"]
    columns += [f"{name.removeprefix('tofu_').replace('_', ' ')}, end" for name in ALONG]
    tables = [
        {"title": "Models before unlearning, mean over seeds", "columns": ["", *models],
         "rows": [[name.removeprefix("tofu_").replace("_", " "), *(over_seeds([m[name] for m in several])
                  for several in models.values())] for name in OF_MODELS]},
        {"title": "Mismatch of routing, by seed", "columns": ["seed", "held-out ratio", "noise", "verdict"],
         "rows": [[str(seed), d["held_out"], d["noise"], d["verdict"]] for seed, d in zip(seeds, mismatch, strict=True)]},
        *({"title": f"`{objective}`, utility where the statistic of forget quality first comes down to {level:g}",
           "columns": columns, "rows": rows_of(of, level)} for objective, of in runs.items()),
    ]  # fmt: skip
    lines = [{"name": m, **_mean_front(own[m])} for m in SHOWN if m in own]
    reached = [(row[0], row[3]) for row in rows_of(own, level) if row[3] is not None]
    bars = {"name": "mean over seeds", "x": [name for name, _ in reached], "y": [u["value"] for _, u in reached]}
    ends = {end: [u["value"] if u[end] is None else u[end] for _, u in reached] for end in ("low", "high")}
    axes = {"x": "statistic of forget quality (0: as the retrained model)", "y": "model utility, relative"}
    figures = [
        {"name": "tofu_small_front", "title": "Forgetting and model utility along runs", "kind": "lines", **axes,
         "caption": "Gradient difference, tuned; each point an evaluation, mean over seeds.", "series": lines},
        {"name": "tofu_small_weightings", "title": f"Model utility at a statistic of {level:g}", "kind": "bars",
         "x": "model utility, relative", "y": "", "caption": "Mean and Student's interval over the seeds that reach it.",
         "series": [bars | ends]},
    ]  # fmt: skip
    return {
        "question": 8,
        "name": "tofu_small",
        "title": "TOFU on a small mixture",
        "seeds": seeds,
        "environment": describe(),
        "claims": claims,
        "tables": tables,
        "figures": figures,
        "raw": {"models": encode(models, digits=4), "runs": [_raw(run) for s in studies.values() for run in s["runs"]]},
    }


def _mean_front(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """x and y of a line: means over seeds at each evaluation that all have."""
    fronts = [run["test"] for run in runs.values()]
    count = min(len(front["steps"]) for front in fronts)
    x = np.mean([front["forgetting"][:count] for front in fronts], axis=0)
    y = np.mean([front["utilities"]["mean_utility"][:count] for front in fronts], axis=0)
    return {"x": x.round(4).tolist(), "y": y.round(4).tolist()}


def _raw(run: Mapping[str, Any]) -> dict[str, Any]:
    front = run["test"]
    numbers = {"forgetting": front["forgetting"], "utility": front["utilities"]["mean_utility"]}
    numbers |= {name: front["measured"][name] for name in ALONG}
    about = {name: run[name] for name in ("objective", "method", "setting", "seed") if name in run}
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
