"""What a little training brings back of what each method of the main tables unlearned: the leaderboard's last column.

    python benchmarks/studies/documents.py                        # texts of one of the benchmarks
    python benchmarks/studies/robustness.py --workdir runs/studies/robustness

Every method runs again for three of the main tables' seeds in the setting that these chose, and the state of its best
utility at or below the level on validation is kept, so that all have forgotten as much. It is trained on 2 % of the
forget rows, for 50 and 100 steps, and so is a model that never knew. Each is read where most came back. What is done is
kept in the workdir and found again.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
from claims import PAGE, claim, interval
from summary import RESULTS, figure, seconds

import trace_jax as tj
from trace_jax.io.environment import describe
from trace_jax.io.files import write_json
from trace_jax.io.progress import progress
from trace_jax.parallel.processes import usable_cores, worker_pool
from trace_jax.run.directory import needed, on_test
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.methods import run_method
from trace_jax.run.prepare import prepare

BENCHMARKS = {"handbook": "main", "presidents": "presidents", "documents": "documents"}  # and its main table
SEEDS = 10, 11, 12
LEVEL = 0.5  # of the main tables
RELEARNING = {"steps": (50, 100), "learning_rate": 1e-3, "share": 0.02}
CONTROL = "a model that never knew"
WHEN = "before", "after relearning"
Numbers = Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]]  # benchmark, method, seed: before and after


def experiment(benchmark: str, seed: int) -> ExperimentConfig:
    """The main table's, with the attack and its control, keeping a state of equal forgetting."""
    keep = {"name": "best_utility", "forgetting": LEVEL}
    changes = {"seed": seed, "data.seed": seed, "target.retrained": True, "unlearning.keep": keep}
    return tj.load_config(f"{benchmark}_study", changes | {"attacks": {"relearning": RELEARNING}})


def settings(benchmark: str) -> dict[str, dict[str, float]]:
    """What the main table chose, by method."""
    names = {"alpha": "alpha", "lr": "learning_rate"}
    board = needed(RESULTS / f"{BENCHMARKS[benchmark]}.json")["leaderboard"]
    chosen = {row["method"].strip("`"): row["setting"].split(",") for row in board if row["benchmark"] == benchmark}
    return {m: {names[k]: float(v) for k, v in (part.split("=") for part in s)} for m, s in chosen.items()}


def unlearn_and_attack(workdir: Path, benchmark: str, seed: int) -> None:
    """All methods on one target."""
    config = experiment(benchmark, seed)
    prepared = prepare(config, workdir / benchmark / f"seed-{seed}")
    for method, chosen in settings(benchmark).items():
        run_method(prepared, config.method(method, unlearning=chosen), label=method, full=False)


def measured(workdir: Path, benchmark: str, seeds: Sequence[int]) -> dict[str, dict[int, tuple[float, float]]]:
    """(before, after) of every method and of the control, by seed."""
    found: dict[str, dict[int, tuple[float, float]]] = {method: {} for method in (*settings(benchmark), CONTROL)}
    for seed in seeds:
        place = workdir / benchmark / f"seed-{seed}"
        never = on_test(needed(place / "references.json")["measurements"]["retrained"])
        for method in settings(benchmark):
            attack = needed(place / "methods" / method / "attacks" / "relearning.json")
            before = on_test(needed(place / "methods" / method / "results.json")["measurements"])[attack["measure"]]
            point = attack["points"][attack["strongest"]]
            found[method][seed] = before.value, on_test(point["measurements"])[attack["measure"]].value
        # The control is attacked alike under every method, and read at its own strongest.
        after = max(on_test(point["retrained"])[attack["measure"]].value for point in attack["points"])
        found[CONTROL][seed] = never[attack["measure"]].value, after
    return found


def summary(found: Numbers) -> dict[str, Any]:
    """Claims, tables and figures, and of every method what the leaderboard shows."""
    made: dict[str, Any] = {"claims": [], "tables": [], "figures": [], "robustness": {}}

    for benchmark, methods in found.items():
        on, after = f"On {benchmark},", "difference in the forgetting score after relearning"
        scores = {m: np.array([of[seed] for seed in methods["uniform"]]).T for m, of in methods.items()}  # [2, seeds]
        for method, place in (("trace_rows", PAGE), ("trace", None)):
            less_before, less_after = scores[method] - scores["uniform"]
            text = f"{on} less is known after relearning with `{method}` than with uniform"
            made["claims"].append(claim(text, after, less_after, holds="below", place=place))
            text, adds = f"{on} relearning brings back less with `{method}` than with uniform", less_after - less_before
            made["claims"].append(claim(text, "difference in what it adds to the score", adds, holds="below"))
        for method in ("uniform", "trace_rows"):
            text = f"{on} after relearning a model unlearned with `{method}` knows more than one that never knew"
            made["claims"].append(claim(text, after, (scores[method] - scores[CONTROL])[1]))
        rows = [[m if m == CONTROL else f"`{m}`", *map(interval, both)] for m, both in scores.items()]
        title = f"{benchmark.capitalize()}: forgetting score of the model that is kept, before and after relearning"
        made["tables"].append({"title": title, "columns": ["method", *WHEN], "rows": rows})
        made["robustness"][benchmark] = {f"`{m}`": interval(both[1]) for m, both in scores.items() if m != CONTROL}
        series = [(when, list(scores), [both[i] for both in scores.values()]) for i, when in enumerate(WHEN)]
        caption = "Forgetting score before and after relearning at its strongest; 95 % intervals over seeds."
        about = f"What relearning brings back, {benchmark}", caption, "bars", "forgetting score", ""
        made["figures"].append(figure(f"robustness_{benchmark}", *about, series))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "robustness.json")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes side by side")
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    jobs = [(benchmark, seed) for seed in SEEDS for benchmark in BENCHMARKS]
    with worker_pool(options.workers) as pool, progress("robustness", len(jobs), unit="model") as advance:
        futures = [pool.submit(unlearn_and_attack, workdir, *job) for job in jobs]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            advance(done, "")
    found = {benchmark: measured(workdir, benchmark, SEEDS) for benchmark in BENCHMARKS}
    environment = describe()
    environment.pop("command", None)
    about = {"question": 7, "name": "robustness", "title": "What relearning brings back after each method"}
    about |= {"command": "python benchmarks/studies/robustness.py", "seconds": round(seconds(workdir)), "seeds": SEEDS}
    write_json(options.output, about | {"environment": environment, **summary(found), "raw": found})
    print(options.output)


if __name__ == "__main__":
    main()
