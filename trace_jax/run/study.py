"""Many runs under one budget: methods x settings x seeds, side by side on idle cores, resumable, read off as fronts.

Every run is a method directory of its seed's run directory (`seed-0/methods/trace_rows@alpha=16`), so a study that was
interrupted continues with the runs that are missing. With tuning seeds the whole grid runs on these, and the seeds that
are reported run the settings that were chosen there.
"""

import argparse
import collections
import dataclasses
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trace_jax.config import ConfigError, resolve
from trace_jax.evaluation import comparison, comparison_text, fronts
from trace_jax.evaluation.comparison import READINGS, Comparison, Run
from trace_jax.io.environment import describe
from trace_jax.io.files import decode, encode, link, read_json, replacing, shown, write_json
from trace_jax.io.progress import progress, say
from trace_jax.parallel.processes import keep_freed_memory
from trace_jax.run.directory import check_workdir, comparison_row, needed, open_workdir, scoreboard, write_report
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.run.methods import calibrated, run_method
from trace_jax.run.prepare import Prepared, prepare, read_corpora
from trace_jax.run.result import trial_label
from trace_jax.unlearning.objectives import Objective


class Trial(NamedTuple):
    """One run of a study."""

    method: str
    seed: int
    setting: str
    unlearning: Mapping[str, Any]
    objective: str = ""  # where the study compares several

    @property
    def label(self) -> str:
        return trial_label(self.method, self.setting, self.objective)


def check_study(config: ExperimentConfig) -> list[Trial]:
    """Every run of the study. Raises ConfigError: one has a setting that it can't have, or the study has attacks."""
    if config.attacks is not None and config.attacks.chosen:
        raise ConfigError(
            "attacks would have no effect: a study compares fronts, and attacks none of its runs. Run the method with "
            "the setting that the study chose, and attack that; here --config.attacks=None."
        )
    jobs = list(trials(config))
    for trial in jobs:
        config.method(trial.method, **trial.unlearning)
    return jobs


def trials(config: ExperimentConfig) -> Iterator[Trial]:
    """Every run that settings are chosen by, cheapest information first: all methods of a seed and setting (a point of
    the grid over everything that its objective is tuned over) before the next.
    """
    study = config.study
    for seed, (objective, given) in itertools.product(
        study.tuning_seeds or study.seeds, (study.objectives or {"": {}}).items()
    ):
        kind = Objective.kinds[objective] if objective else type(config.unlearning.objective)
        own = {field.name for field in dataclasses.fields(kind)} if objective else set()
        several = {name: value for name, value in given.items() if isinstance(value, (tuple, list))}
        lists = {name: values for name, values in several.items() if all(isinstance(x, (int, float)) for x in values)}
        tuned: dict[str, Sequence[Any]] = {"learning_rate": study.learning_rates or (config.unlearning.learning_rate,)}
        if kind.retains and given.get("retain_loss") != "none":
            tuned["alpha"] = study.alphas
        tuned = {name: values for name, values in (tuned | lists).items() if name in lists or name not in given}
        for values in itertools.product(*tuned.values()):
            point = dict(zip(tuned, values, strict=True))
            short = {"learning_rate": "lr"}
            names = [f"{short.get(n, n)}={v:g}" for n, v in point.items() if len(tuned[n]) > 1 or n == "alpha"]
            settings = {**given, **point}
            unlearning = {name: value for name, value in settings.items() if name not in own}
            if objective:
                unlearning["objective"] = {"name": objective, **{n: settings[n] for n in sorted(own & settings.keys())}}
            for method in study.methods:
                yield Trial(method, seed, ",".join(reversed(names)) or "only", unlearning, objective)


def final_trials(config: ExperimentConfig, path: Path, tuning: Sequence[Trial]) -> list[Trial]:
    """The runs of `study.seeds` in the settings that the finished runs of the tuning seeds choose, for any level and
    reading; none without tuning seeds.
    """
    chosen, kinds = set(), list(itertools.product(config.evaluation.levels, READINGS))
    for objective, group in _runs(config, path, tuning).items() if config.study.tuning_seeds else ():
        for method, (level, reading) in itertools.product(config.study.methods, kinds):
            own = [run for run in group if run.method == method]
            tried = comparison.try_settings(own, level=level, reading=reading)
            chosen.add((objective, method, comparison.choose_setting(tried)))
    of_one = [t for t in tuning if t.seed == tuning[0].seed and (t.objective, t.method, t.setting) in chosen]
    return [trial._replace(seed=seed) for seed in config.study.seeds for trial in of_one]


def run_study(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Runs what is missing of a study and compares. Returns the comparison as text.

    Writes study.json (fronts of every run, comparisons with intervals), tables.md and report.html into `workdir`.
    """
    jobs = check_study(config)
    check_workdir(config, workdir, overwrite=overwrite)
    if config.data.name == "text":
        read_corpora(config.data, config.model)  # before anything is written: the user's files may be refused
    path = open_workdir(config, workdir, overwrite=overwrite)
    study, cores = config.study, getattr(os, "sched_getaffinity", None)
    workers = study.workers or (len(cores(0)) if cores else os.cpu_count() or 1)
    counts = f"{len(study.objectives) or 1} objectives, {len(study.methods)} methods, {len(study.seeds)} seeds"
    say(f"study: {len(jobs)} runs ({counts}), {min(workers, len(jobs))} side by side")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (context.Value("i", 0), workers)) as pool:

        def each(title: str, unit: str, work: Callable, items: Sequence[Any]) -> None:
            with progress(f"study: {title}", len(items), unit=unit) as advance:
                futures = [pool.submit(work, path, item) for item in items]
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    advance(done, "")

        try:
            each("target models", "model", prepare_seed, study.tuning_seeds + study.seeds)
            each("tuning" if study.tuning_seeds else "unlearning", "run", run_trial, jobs)
            if final := final_trials(config, path, jobs):
                each("unlearning", "run", run_trial, final)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return write_study(config, path, jobs, final)


def _start_worker(counter, workers: int) -> None:
    """Pins the process to its share of the cores before JAX starts its threads: side by side beats interleaved. It ends
    with its parent, however that ends; left alone it would wait for work for ever.
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


_PREPARED: dict[tuple[Path, int], Prepared] = {}


def prepared_seed(path: Path, seed: int) -> Prepared:
    """What the runs of a seed share. Data, base model and batch order are all drawn anew for it."""
    if (path, seed) not in _PREPARED:
        _PREPARED.clear()  # first, so that a process never holds two models
        values = needed(path / "config.json")["config"]
        values["seed"], values["data"]["seed"] = seed, seed
        values["evaluation"]["patching"] = False  # a study reads fronts
        _PREPARED[path, seed] = prepare(resolve(ExperimentConfig, values), path / f"seed-{seed}")
    return _PREPARED[path, seed]


def prepare_seed(path: Path, seed: int) -> None:
    """Makes what the runs of a seed share: target model, statistics, references, and the weights of every method."""
    prepared = prepared_seed(path, seed)
    for method in prepared.config.study.methods:
        calibrated(prepared, prepared.config.method(method).calibration, method)


def run_trial(path: Path, trial: Trial) -> None:
    """One run, or nothing where it is done."""
    prepared = prepared_seed(path, trial.seed)
    run_method(prepared, prepared.config.method(trial.method, **trial.unlearning), label=trial.label)


def _results(path: Path, jobs: Sequence[Trial]) -> Iterator[tuple[Trial, Path, dict[str, Any]]]:
    """Of the finished ones: the trial, its directory, and its results."""
    for trial in jobs:
        directory = path / f"seed-{trial.seed}" / "methods" / trial.label
        if (result := read_json(directory / "results.json")) is not None:
            yield trial, directory, result


def _runs(config: ExperimentConfig, path: Path, jobs: Sequence[Trial], *, items: bool = False) -> dict[str, list[Run]]:
    """The finished ones of these runs by objective, with their items where asked."""
    runs: dict[str, list[Run]] = {trial.objective: [] for trial in jobs}
    for trial, directory, result in _results(path, jobs):
        validation, test = (decode(fronts.Front, result["fronts"][split]) for split in ("validation", "test"))
        board = scoreboard(result, config.data.name)
        kept = fronts.load_run_items(directory, test, board) if items else None
        runs[trial.objective].append(Run(trial.method, trial.setting, trial.seed, validation, test, kept))
    return runs


def write_study(config: ExperimentConfig, path: Path, jobs: Sequence[Trial], final: Sequence[Trial] = ()) -> str:
    """Compares finished runs at every level, `final` in the settings that the others choose, if there are any; writes
    study.json and returns the tables as text.
    """
    runs, tuning = _runs(config, path, final or jobs, items=True), _runs(config, path, jobs) if final else {}
    seconds, board = collections.defaultdict(list), config.data.board  # seconds of a step, by method
    for trial, _, result in _results(path, final or jobs):
        board = scoreboard(result, config.data.name)
        if result["seconds_per_step"] is not None:
            seconds[trial.method].append(result["seconds_per_step"])
    exempt = [method for method in config.study.methods if METHODS[method].steps != 1]
    comparisons: dict[str, list[Comparison]] = {}
    for objective, group in runs.items():
        kinds = itertools.product(config.evaluation.levels, READINGS)
        settings: Any = {"exempt": exempt, "resamples": config.evaluation.bootstrap}
        settings["tuning"] = tuning.get(objective, ())
        comparisons[objective] = [comparison.compare(group, level=level, reading=r, **settings) for level, r in kinds]
    of = {objective: {"objective": objective} if objective else {} for objective in runs}
    forgotten, names = config.data.forgotten, ("method", "setting", "seed", "test")
    study = {"name": config.name, "title": f"Study: unlearning {forgotten}", "benchmark": config.data.name}
    study |= {"board": encode(board), "forgotten": forgotten, "rows": _rows(comparisons)}
    study["comparisons"] = [of[objective] | encode(c) for objective, cs in comparisons.items() for c in cs]
    study["seconds_per_step"] = {method: float(np.median(values)) for method, values in seconds.items()}
    told = ((of[objective], r) for objective, group in runs.items() for r in group)
    study["runs"] = [which | {name: encode(getattr(r, name)) for name in names} for which, r in told]
    write_json(path / "study.json", study)
    tables, texts = [], []
    for objective, compared in comparisons.items():
        tables += [f"## {objective}"] * bool(objective) + list(map(comparison_text.as_markdown, compared))
        texts += [objective] * bool(objective) + list(map(comparison_text.as_text, compared))
    if config.study.objectives:
        of_reading = ({o: compared[i] for o, compared in comparisons.items()} for i in range(len(READINGS)))
        tables = [*map(comparison_text.objectives_markdown, of_reading), *tables]
    with replacing(path / "tables.md") as temporary:
        temporary.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    write_json(path / "environment.json", describe())
    text = "\n\n".join(texts)
    return f"{text}\n\nstudy: {shown(path / 'study.json')}\nreport: {link(write_report(path))}"


def _rows(comparisons: Mapping[str, Sequence[Comparison]]) -> list[dict[str, Any]]:
    """Of the report: every method with its chosen setting at the first level, all seeds."""
    rows = []
    for objective, (first, *_) in comparisons.items():
        for result in first.results:
            name = f"{objective}: {result.method}" if objective else result.method
            forgetting = {"value": first.level, "n": None, "low": None, "high": None} if result.seeds else None
            seeds = ("seed " if len(result.missed) == 1 else "seeds ") + ", ".join(map(str, result.missed))
            missed = f"; {seeds} did not reach the level" if result.missed else ""
            where = comparison_text.tuned_text(first.tuning_seeds, " on")
            note = f"; {result.setting} chosen of {len(result.tried)}{where}{missed}"
            numbers = {"forgetting": forgetting, "utilities": encode(result.utilities)}
            rest = {"reached": bool(result.seeds), "seeds": len(result.seeds)}
            rest["run"] = objective, result.method, result.setting
            rows.append(comparison_row(name, result.method, numbers, note, **rest))
    return rows


def main(options: argparse.Namespace) -> int:
    config = options.load_config()
    print(run_study(config, options.workdir or f"runs/{config.name}", overwrite=options.overwrite))
    return 0
