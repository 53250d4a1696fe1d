"""Many runs under one budget: methods x settings x seeds, side by side on idle cores, resumable, read off as fronts.

Every run is a method directory of its seed's run directory (`seed-0/methods/trace_rows@alpha=16`), so a study that was
interrupted continues with the runs that are missing. With tuning seeds the whole grid runs on these, and the seeds that
are reported run the settings that were chosen there.
"""

import argparse
import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trace_jax.config import ConfigError, resolve
from trace_jax.evaluation import comparison, comparison_text, fronts
from trace_jax.evaluation.comparison import READINGS, Comparison, Run
from trace_jax.evaluation.intervals import t_interval
from trace_jax.evaluation.task import Scoreboard
from trace_jax.io.environment import describe
from trace_jax.io.files import decode, encode, link, read_json, replacing, shown, write_json
from trace_jax.io.lock import locked
from trace_jax.io.progress import progress, say
from trace_jax.parallel.processes import usable_cores, worker_pool
from trace_jax.run.directory import (
    check_workdir,
    comparison_row,
    needed,
    on_test,
    open_workdir,
    seal,
    write_report,
)
from trace_jax.run.experiment import METHODS, ExperimentConfig, Method
from trace_jax.run.methods import calibrated, run_method
from trace_jax.run.prepare import Prepared, prepare, read_corpora
from trace_jax.run.result import trial_label


class Trial(NamedTuple):
    """One run of a study."""

    method: str
    seed: int
    setting: str
    changes: Mapping[str, Mapping[str, Any]]  # settings of unlearning and calibration
    variant: str = ""  # where the study compares several
    shared: bool = False  # with the other variants, which change nothing that the method reads
    first: bool = False  # of the setting that counts first: it is attacked, and experts are put back

    @property
    def label(self) -> str:
        return trial_label(self.method, self.setting, "" if self.shared else self.variant)

    def made(self, config: ExperimentConfig) -> Method:
        try:
            return config.method(self.method, **self.changes)
        except ConfigError as error:
            raise ConfigError(f"study.variants.{self.variant}: {error}" if self.variant else str(error)) from None


def check_study(config: ExperimentConfig) -> list[Trial]:
    """Every run of the study. Raises ConfigError: one has a setting that it can't have, or the study has attacks."""
    if config.attacks is not None and config.attacks.chosen and not config.study.tuning_seeds:
        raise ConfigError(
            "attacks would have no effect: a study attacks the runs whose settings tuning seeds chose. Give "
            "study.tuning_seeds, or --config.attacks=None."
        )
    jobs = list(trials(config))
    for trial in jobs:
        trial.made(config)
    return jobs


def trials(config: ExperimentConfig) -> Iterator[Trial]:
    """Every run that settings are chosen by, cheapest information first: all methods of a seed and setting (a point of
    the grid over everything that its variant is tuned over) before the next.
    """
    study = config.study
    variants = study.variants or {"": {}}
    for seed, (variant, given) in itertools.product(study.tuning_seeds or study.seeds, variants.items()):
        changed = given.get("calibration", {}).keys()
        for (setting, changes), method in itertools.product(_points(config, variant, given), study.methods):
            shared = not given.get("unlearning") and not METHODS[method].reads & changed
            yield Trial(method, seed, setting, changes, variant, shared)


def _points(config: ExperimentConfig, variant: str, given: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The grid of a variant: a setting in words, and what it changes, each."""
    leaves, rates = dict(_leaves(given)), config.study.learning_rates or (config.unlearning.learning_rate,)
    several = {path: value for path, value in leaves.items() if isinstance(value, (tuple, list)) and value}
    lists = {path: values for path, values in several.items() if all(isinstance(x, (int, float)) for x in values)}
    first = functools.reduce(_replaced, ((path, values[0]) for path, values in lists.items()), given)
    tuned: dict[tuple[str, ...], Sequence[Any]] = {("unlearning", "learning_rate"): rates}
    if Trial("uniform", 0, "", first, variant).made(config).unlearning.retains:
        tuned["unlearning", "alpha"] = config.study.alphas
    tuned = {path: values for path, values in (tuned | lists).items() if path in lists or path not in leaves}
    points = []
    for point in (dict(zip(tuned, values, strict=True)) for values in itertools.product(*tuned.values())):
        told = [(p[-1], v) for p, v in point.items() if len(tuned[p]) > 1 or p[-1] == "alpha"]
        names = [f"{'lr' if name == 'learning_rate' else name}={v:g}" for name, v in reversed(told)]
        points.append((",".join(names) or "only", functools.reduce(_replaced, point.items(), given)))
    return points


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        yield from _leaves(value, (*path, key)) if isinstance(value, Mapping) else [((*path, key), value)]


def _replaced(values: Mapping[str, Any], new: tuple[tuple[str, ...], Any]) -> dict[str, Any]:
    """A nested mapping with another value at a path."""
    (key, *rest), value = new
    return {**values, key: _replaced(values.get(key, {}), (tuple(rest), value)) if rest else value}


def final_trials(config: ExperimentConfig, path: Path, tuning: Sequence[Trial]) -> list[Trial]:
    """The runs of `study.seeds` in the settings that the finished runs of the tuning seeds choose, for any level and
    reading; none without tuning seeds.
    """
    chosen: dict[tuple[str, str, str], bool] = {}  # whether at the first level, where runs first come down to it
    kinds = list(itertools.product(config.evaluation.levels, READINGS))
    for variant, group in _runs(config, path, tuning).items() if config.study.tuning_seeds else ():
        for method, (level, reading) in itertools.product(config.study.methods, kinds):
            own = [run for run in group if run.method == method]
            tried = comparison.try_settings(own, level=level, reading=reading, fresh=True)
            setting = comparison.choose_setting(tried)
            chosen.setdefault((variant, method, setting), (level, reading) == kinds[0])
    of_one = {(t.variant, t.method, t.setting): t for t in tuning if t.seed == tuning[0].seed}
    once = [of_one[which]._replace(first=first) for which, first in chosen.items()]
    return [trial._replace(seed=seed) for seed in config.study.seeds for trial in once]


def run_study(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Runs what is missing of a study and compares. Returns the comparison as text.

    Writes study.json (fronts of every run, comparisons with intervals), tables.md and report.html into `workdir`.
    """
    jobs = check_study(config)
    check_workdir(config, workdir, overwrite=overwrite)
    if config.data.name == "text":
        read_corpora(config.data, config.model)  # before anything is written: the user's files may be refused
    with locked(workdir):
        return _run_study(config, open_workdir(config, workdir, overwrite=overwrite), jobs)


def _run_study(config: ExperimentConfig, path: Path, jobs: Sequence[Trial]) -> str:
    study, workers = config.study, config.study.workers or usable_cores()
    counts = f"{len(study.variants) or 1} variants, {len(study.methods)} methods, {len(study.seeds)} seeds"
    say(f"study: {len(jobs)} runs ({counts}), {min(workers, len(jobs))} side by side")
    with worker_pool(workers) as pool:

        def each(title: str, unit: str, work: Callable, items: Sequence[Any]) -> None:
            with progress(f"study: {title}", len(items), unit=unit) as advance:
                once = {(i.seed, i.label): i for i in items}.values() if work is run_trial else items  # variants share
                futures = [pool.submit(work, path, item) for item in once]
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    advance(done, "")

        each("target models", "model", prepare_seed, study.tuning_seeds + study.seeds)
        each("tuning" if study.tuning_seeds else "unlearning", "run", run_trial, jobs)
        if final := final_trials(config, path, jobs):
            each("unlearning", "run", run_trial, final)
    return write_study(config, path, jobs, final)


_PREPARED: dict[tuple[Path, int], Prepared] = {}


def prepared_seed(path: Path, seed: int) -> Prepared:
    """What the runs of a seed share. Data, base model and batch order are all drawn anew for it."""
    if (path, seed) not in _PREPARED:
        _PREPARED.clear()  # first, so that a process never holds two models
        values = needed(path / "config.json")["config"]
        values["seed"], values["data"]["seed"] = seed, seed
        if seed in values["study"]["tuning_seeds"]:  # of these, fronts are read alone
            values["attacks"] = None
            values["target"] = values["target"] and {**values["target"], "retrained": False}
        _PREPARED[path, seed] = prepare(resolve(ExperimentConfig, values), path / f"seed-{seed}")
    return _PREPARED[path, seed]


def prepare_seed(path: Path, seed: int) -> None:
    """Makes what the runs of a seed share: target model, statistics, references, and the weights of every method."""
    prepared = prepared_seed(path, seed)
    config = prepared.config
    for calibration, method in {trial.made(config).calibration: trial.method for trial in trials(config)}.items():
        calibrated(prepared, calibration, method)
    for context in prepared.attacks.values():
        _ = context.prepared


def run_trial(path: Path, trial: Trial) -> None:
    """One run, or nothing where it is done."""
    prepared = prepared_seed(path, trial.seed)
    full = trial.seed not in prepared.config.study.tuning_seeds  # of these, fronts are read alone
    run_method(prepared, trial.made(prepared.config), label=trial.label, alone=not trial.first, full=full)


def _results(path: Path, jobs: Sequence[Trial]) -> Iterator[tuple[Trial, Path, dict[str, Any]]]:
    """Of the finished ones: the trial, its directory, and its results."""
    for trial in jobs:
        directory = path / f"seed-{trial.seed}" / "methods" / trial.label
        if (result := read_json(directory / "results.json")) is not None:
            yield trial, directory, result


def _runs(config: ExperimentConfig, path: Path, jobs: Sequence[Trial], *, items: bool = False) -> dict[str, list[Run]]:
    """The finished ones of these runs by variant, with their items where asked."""
    runs: dict[str, list[Run]] = {trial.variant: [] for trial in jobs}
    for trial, directory, result in _results(path, jobs):
        validation, test = (decode(fronts.Front, result["fronts"][split]) for split in ("validation", "test"))
        board = decode(Scoreboard, result["board"])
        kept = fronts.load_run_items(directory, test, board) if items else None
        runs[trial.variant].append(Run(trial.method, trial.setting, trial.seed, validation, test, kept))
    return runs


def _robustness(directory: Path, result: Mapping[str, Any], board: Scoreboard) -> dict[str, float]:
    """What a run ended with, and what attacks and original experts that were put back gave, by dotted name: the board's
    scores of its model and of the references, membership of these, forgetting under each attack at its strongest,
    correlations of drift, and what returned.
    """
    models = {"unlearned": result["measurements"], **needed(directory.parents[1] / "references.json")["measurements"]}
    scores = {model: on_test(measured) for model, measured in models.items()}
    names, each = (board.forgetting, *board.utilities), [(m, *one) for m, own in scores.items() for one in own.items()]
    numbers = {f"{m}.{n}": value.value for m, n, value in each if n in names or n.endswith("_auc")}
    for file in sorted((directory / "attacks").glob("*.json")):
        if not file.name.endswith(".stage.json") and (attack := needed(file))["strongest"] is not None:
            point = attack["points"][attack["strongest"]]
            for model, key in (("unlearned", "measurements"), ("original", "original"), ("retrained", "retrained")):
                if value := on_test(point.get(key, ())).get(attack["measure"]):
                    numbers[f"attack.{file.stem}.{model}"] = value.value
    put_back = read_json(directory / "patching.json") or {"correlation": {}, "models": ()}
    numbers |= {f"drift.{name}": value["value"] for name, value in put_back["correlation"].items()}
    for row in put_back["models"][2:]:  # after the original and the unlearned model
        kind = f"{row['kind']}.{row['size'] or row['name']}"
        numbers |= {f"returned.{kind}.{name}": value["value"] for name, value in row["returned"].items()}
    return {name: value for name, value in numbers.items() if value is not None}


def write_study(config: ExperimentConfig, path: Path, jobs: Sequence[Trial], final: Sequence[Trial] = ()) -> str:
    """Compares finished runs at every level, `final` in the settings that the others choose, if there are any; writes
    study.json and returns the tables as text.
    """
    runs, tuning = _runs(config, path, final or jobs, items=True), _runs(config, path, jobs) if final else {}
    seconds, board = collections.defaultdict(list), config.data.board  # seconds of a step, by method
    for trial, _, result in _results(path, final or jobs):
        board = decode(Scoreboard, result["board"])
        if result["seconds_per_step"] is not None:
            seconds[trial.method].append(result["seconds_per_step"])
    exempt = [method for method in config.study.methods if METHODS[method].steps != 1]
    comparisons: dict[str, list[Comparison]] = {}
    for variant, group in runs.items():
        kinds = itertools.product(config.evaluation.levels, READINGS)
        settings: Any = {"exempt": exempt, "resamples": config.evaluation.bootstrap}
        settings["tuning"] = tuning.get(variant, ())
        comparisons[variant] = [comparison.compare(group, level=level, reading=r, **settings) for level, r in kinds]
    of = {variant: {"variant": variant} if variant else {} for variant in runs}
    forgotten, names = config.data.forgotten, ("method", "setting", "seed", "test")
    study = {"name": config.name, "title": f"Study: unlearning {forgotten}", "benchmark": config.data.name}
    study |= {"board": encode(board), "forgotten": forgotten, "rows": _rows(comparisons)}
    study["comparisons"] = [of[variant] | encode(c) for variant, cs in comparisons.items() for c in cs]
    study["seconds_per_step"] = {method: float(np.median(values)) for method, values in seconds.items()}
    told = {variant: iter(group) for variant, group in runs.items()}
    study["runs"], by_name = [], collections.defaultdict(dict)  # numbers of seeds, by (variant, method) and name
    for trial, directory, result in _results(path, final or jobs):
        run = next(told[trial.variant])
        row = {name: encode(getattr(run, name)) for name in names}
        row |= {"label": trial.label, "robustness": _robustness(directory, result, board) if trial.first else {}}
        study["runs"].append(of[trial.variant] | row)
        for name, value in row["robustness"].items():
            by_name[trial.variant, trial.method].setdefault(name, []).append(value)
    averaged = {which: {n: t_interval(np.array(v)) for n, v in group.items()} for which, group in by_name.items()}
    study["robustness"] = [{**of[v], "method": m, "numbers": encode(numbers)} for (v, m), numbers in averaged.items()]
    write_json(path / "study.json", study)
    tables, texts = [], []
    for variant, compared in comparisons.items():
        tables += [f"## {variant}"] * bool(variant) + list(map(comparison_text.as_markdown, compared))
        texts += [variant] * bool(variant) + list(map(comparison_text.as_text, compared))
    if config.study.variants:
        of_reading = ({o: compared[i] for o, compared in comparisons.items()} for i in range(len(READINGS)))
        tables = [*map(comparison_text.variants_markdown, of_reading), *tables]
    if averaged:
        rows = dict.fromkeys(name for numbers in averaged.values() for name in numbers)
        lines = [["under attack, and with experts put back", *(f"{v}: {m}" if v else m for v, m in averaged)]]
        lines += [[n, *(comparison_text.interval_text(numbers.get(n)) for numbers in averaged.values())] for n in rows]
        tables.append(comparison_text.markdown_table(lines))
    with replacing(path / "tables.md") as temporary:
        temporary.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    write_json(path / "environment.json", describe())
    seal(path)
    text = "\n\n".join(texts)
    return f"{text}\n\nstudy: {shown(path / 'study.json')}\nreport: {link(write_report(path))}"


def _rows(comparisons: Mapping[str, Sequence[Comparison]]) -> list[dict[str, Any]]:
    """Of the report: every method with its chosen setting at the first level, all seeds."""
    rows = []
    for variant, (first, *_) in comparisons.items():
        for result in first.results:
            name = f"{variant}: {result.method}" if variant else result.method
            forgetting = {"value": first.level, "n": None, "low": None, "high": None} if result.seeds else None
            seeds = ("seed " if len(result.missed) == 1 else "seeds ") + ", ".join(map(str, result.missed))
            missed = f"; {seeds} did not reach the level" if result.missed else ""
            where = comparison_text.tuned_text(first.tuning_seeds, " on")
            note = f"; {result.setting} chosen of {len(result.tried)}{where}{missed}"
            numbers = {"forgetting": forgetting, "utilities": encode(result.utilities)}
            rest = {"reached": bool(result.seeds), "seeds": len(result.seeds)}
            rest["run"] = variant, result.method, result.setting
            rows.append(comparison_row(name, result.method, numbers, note, **rest))
    return rows


def main(options: argparse.Namespace) -> int:
    config = options.load_config()
    print(run_study(config, options.workdir or f"runs/{config.name}", overwrite=options.overwrite))
    return 0
