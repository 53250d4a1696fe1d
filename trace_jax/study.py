"""Many runs under one budget: methods x settings x seeds, side by side on idle cores, resumable, read off as fronts.

Every run is a method directory of its seed's run directory (`seed-0/methods/trace_rows@alpha=16`), so a study that was
interrupted continues with the runs that are missing.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.config import as_dict, resolve
from trace_jax.environment import describe
from trace_jax.evaluation.benchmarks import scoreboard
from trace_jax.evaluation.comparison import READINGS, Comparison, Run, check_equal_budgets, compare
from trace_jax.evaluation.fronts import Front
from trace_jax.evaluation.tables import comparison_markdown, comparison_text
from trace_jax.experiment import METHODS, ExperimentConfig, Method
from trace_jax.files import read_json, replacing, shown, write_json
from trace_jax.parallel.memory import keep_freed_memory
from trace_jax.progress import progress, say
from trace_jax.report import Number, ReportData, SummaryRow, report_front, write_report
from trace_jax.stages import check_workdir, open_workdir
from trace_jax.summary import CONTROLS, FORGOTTEN, now


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a study."""

    method: str
    seed: int
    setting: str
    unlearning: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.method}@{self.setting}"


def trials(config: ExperimentConfig) -> Iterator[Trial]:
    """Every run of the study, cheapest information first: all methods of a seed and setting before the next."""
    study = config.study
    for seed in study.seeds:
        for rate in study.learning_rates:
            for alpha in study.alphas:
                setting = f"alpha={alpha:g}" + (f",lr={rate:g}" if len(study.learning_rates) > 1 else "")
                for method in study.methods:
                    yield Trial(method, seed, setting, {"alpha": alpha, "learning_rate": rate})


def run_study(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Runs what is missing of a study and compares. Returns the comparison as text.

    Writes study.json (fronts of every run, comparisons with intervals), tables.md and report.html into `workdir`.
    """
    check_workdir(config, workdir, overwrite=overwrite)
    if config.data.benchmark == "text":
        from trace_jax.pipeline import read_corpora

        read_corpora(config)  # before anything is written: the user's files may be refused
    path = open_workdir(config, workdir, overwrite=overwrite)
    jobs = list(trials(config))
    workers = config.study.workers or _cores()
    say(
        f"study: {len(jobs)} runs ({len(config.study.methods)} methods, {len(config.study.seeds)} seeds), "
        f"{min(workers, len(jobs))} side by side"
    )
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(multiprocessing.get_context("spawn").Value("i", 0), workers),
    ) as pool:
        try:
            _wait(
                "study: target models",
                [pool.submit(_prepare, config, path, seed) for seed in config.study.seeds],
                "model",
            )
            _wait("study: unlearning", [pool.submit(_run_trial, config, path, trial) for trial in jobs], "run")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return write_study(config, path, jobs)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(title: str, futures: Sequence[Future], unit: str) -> None:
    with progress(title, len(futures), unit=unit) as advance:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            advance(done, "")


# --- in a worker process


def _start_worker(counter, workers: int) -> None:
    """Pins the process to its share of the cores before JAX starts its threads: side by side beats interleaved.

    A worker ends with its parent, however that ends; left alone it would wait for work for ever.
    """
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[number % workers :: workers]) or set(cores))


def seed_config(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The experiment of one seed: data, base model and batch order all drawn anew."""
    values = as_dict(config)
    values["seed"], values["data"]["seed"] = seed, seed
    return resolve(ExperimentConfig, values)


def _prepare(config: ExperimentConfig, path: Path, seed: int) -> None:
    _prepared(config, path, seed)


_READY: dict[tuple[Path, int], Any] = {}


def _prepared(config: ExperimentConfig, path: Path, seed: int):
    """The seed's target model, statistics and evaluator; kept for the next run of the seed in this process."""
    from trace_jax.pipeline import prepare

    key = (path, seed)
    if key not in _READY:
        _READY.clear()  # one seed at a time: memory stays bounded
        _READY[key] = prepare(seed_config(config, seed), path / f"seed-{seed}")
    return _READY[key]


def _run_trial(config: ExperimentConfig, path: Path, trial: Trial) -> None:
    from trace_jax.pipeline import run_method

    prepared = _prepared(config, path, trial.seed)
    run_method(prepared, trial_method(config, trial), label=trial.label)


def trial_method(config: ExperimentConfig, trial: Trial) -> Method:
    """The full settings of a trial."""
    return config.method(trial.method, **trial.unlearning)


# --- reading the runs


def load_runs(path: Path, jobs: Sequence[Trial]) -> list[Run]:
    """The fronts of finished runs, in the order of `jobs`."""
    runs = []
    for trial in jobs:
        result = read_json(path / f"seed-{trial.seed}" / "methods" / trial.label / "results.json")
        if result is not None:
            validation, test = (Front.from_json(result["fronts"][split]) for split in ("validation", "test"))
            runs.append(Run(trial.method, trial.setting, trial.seed, validation, test))
    return runs


def write_study(config: ExperimentConfig, path: Path, jobs: Sequence[Trial]) -> str:
    """Compares finished runs at every level; writes study.json and returns the tables as text."""
    runs = load_runs(path, jobs)
    exempt = [method for method in config.study.methods if METHODS[method].steps != 1]
    check_equal_budgets(runs, exempt=exempt)
    levels = config.evaluation.levels
    comparisons = [compare(runs, level=x, exempt=exempt, reading=r) for x in levels for r in READINGS]
    write_json(
        path / "study.json",
        {
            "name": config.name,
            "benchmark": config.data.benchmark,
            "comparisons": [comparison.to_json() for comparison in comparisons],
            "seconds_per_step": _seconds(path, jobs),
            "runs": [
                {"method": r.method, "setting": r.setting, "seed": r.seed, "test": r.test.to_json()} for r in runs
            ],
        },
    )
    with replacing(path / "tables.md") as temporary:
        temporary.write_text("\n\n".join(map(comparison_markdown, comparisons)) + "\n", encoding="utf-8")
    report = write_report(_report_data(config, path, runs, comparisons), path / "report.html")
    text = "\n\n".join(comparison_text(comparison) for comparison in comparisons)
    return f"{text}\n\nstudy: {shown(path / 'study.json')}\nreport: {shown(report)}"


def _seconds(path: Path, jobs: Sequence[Trial]) -> dict[str, float]:
    """Median seconds per unlearning step of each method."""
    found = collections.defaultdict(list)
    for trial in jobs:
        result = read_json(path / f"seed-{trial.seed}" / "methods" / trial.label / "results.json")
        if result is not None and result["seconds_per_step"] is not None:
            found[trial.method].append(result["seconds_per_step"])
    return {method: float(np.median(values)) for method, values in found.items()}


def _report_data(
    config: ExperimentConfig, path: Path, runs: Sequence[Run], comparisons: Sequence[Comparison]
) -> ReportData:
    """The page of a study: every method with its chosen setting at the first level, all seeds."""
    comparison, board = comparisons[0], scoreboard(config.data.benchmark)
    chosen = {result.method: result for result in comparison.results}
    rows = []
    for method, result in chosen.items():
        utilities = {n: Number(i.value, i.n, i.low, i.high) for n, i in result.utilities.items()}
        note = f"{METHODS[method].summary}; {result.setting} chosen of {result.settings}"
        missed = f"; seeds {', '.join(map(str, result.missed))} never got there" if result.missed else ""
        rows.append(
            SummaryRow(
                method,
                "control" if method in CONTROLS else "method",
                Number(comparison.level if result.seeds else None),
                utilities,
                reached=bool(result.seeds),
                seeds=len(result.seeds),
                note=note + missed,
            )
        )
    fronts = {
        method: [report_front(r.seed, r.test) for r in runs if (r.method, r.setting) == (method, result.setting)]
        for method, result in chosen.items()
    }
    return ReportData(
        title=f"Study: unlearning {FORGOTTEN[config.data.benchmark]}",
        benchmark=config.data.benchmark,
        forgotten=FORGOTTEN[config.data.benchmark],
        forgetting=board.forgetting,
        level=comparison.level,
        chance=board.chance,
        rows=rows,
        fronts=fronts,
        config=as_dict(config),
        environment=describe(),
        generated=now(),
    )
