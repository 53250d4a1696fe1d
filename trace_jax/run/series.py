"""Several requests to forget on one model: ever larger ones (scalability), or one after the other (sustainability).

MUSE (2407.06460, section 3) asks both of a method. Every step is an ordinary run directory of `pipeline.run`, which
continues where it stopped, so a series does too.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.checkpoints.export import save_pretrained
from trace_jax.config import ConfigError, as_dict, fingerprint, resolve
from trace_jax.data.sources import read_source
from trace_jax.evaluation.tables import number_text
from trace_jax.io.environment import describe
from trace_jax.io.files import shown, write_json
from trace_jax.io.progress import aligned, say
from trace_jax.models.config import ModelConfig
from trace_jax.parallel.processes import add_process_arguments, is_main, keep_freed_memory, start_processes
from trace_jax.run.experiment import ExperimentConfig, SeriesConfig
from trace_jax.run.export import load_trained
from trace_jax.run.methods import run
from trace_jax.run.prepare import prepare
from trace_jax.run.results import SPLIT, needed, write_run_report
from trace_jax.run.stages import Stage, check_export, open_workdir
from trace_jax.tasks.benchmarks import scoreboard

_TITLES = {
    "scalability": "Scalability: ever larger forget sets, each unlearned from the target",
    "sustainability": "Sustainability: forget sets in sequence, each unlearned from the model before",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One run of a series: the request `number`, from 1, by some methods."""

    number: int
    methods: tuple[str, ...]
    directory: Path


def run_series(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Runs, or continues, every step. Returns the scores per step and method as text.

    A model that is trained here is trained once, on `data.forget` and `data.retain` (in WORKDIR/target), and every step
    starts from its checkpoint. Scalability has the runs WORKDIR/step-N; sustainability has WORKDIR/METHOD/step-N, since
    every method goes on with its own model (step-N/export). Writes series.json and report.html.

    Raises:
      ConfigError, DataError: no series or one that can't be run; something given can't be used.
    """
    series = check_series(config)
    if series.kind == "sustainability":
        check_export(dataclasses.replace(config, export=config.methods[0]), workdir)
    path = open_workdir(config, workdir, overwrite=overwrite)
    target = _target(config, path, overwrite=overwrite)
    models: dict[str, str] = {}  # where each method has come to
    for step in steps(config, path):
        start = {**target, "path": models.get(step.methods[0], target["path"])}
        say(f"{series.kind}: step {step.number} of {len(series.forget)}, {', '.join(step.methods)}")
        run(step_config(config, step, start), step.directory, overwrite=overwrite)
        if series.kind == "sustainability":
            models[step.methods[0]] = os.fspath(step.directory / "export")
    return write_series(config, path) if is_main() else ""


def check_series(config: ExperimentConfig) -> SeriesConfig:
    """The series of an experiment. Every forget source is opened, so that a wrong name is known at once.

    Raises:
      ConfigError: there is none, or it isn't of the user's own text; DataError: a source that can't be read.
    """
    series = config.series
    if series is None:
        raise ConfigError(
            "the configuration has no series: set --config.series.kind=scalability or sustainability, and "
            "--config.series.forget to a list with the forget source of each step."
        )
    if config.data.benchmark != "text":
        raise ConfigError(f"a series unlearns sources of text (data.benchmark = text), not {config.data.benchmark}.")
    for source in series.forget:
        read_source(source, most=1)
    return series


def steps(config: ExperimentConfig, path: Path) -> Iterator[Step]:
    """Every run of a series, in order."""
    assert config.series is not None
    numbers = range(1, len(config.series.forget) + 1)
    if config.series.kind == "scalability":
        yield from (Step(number, config.methods, path / f"step-{number}") for number in numbers)
    else:
        yield from (Step(n, (m,), path / m / f"step-{n}") for m in config.methods for n in numbers)


def step_config(config: ExperimentConfig, step: Step, model: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment of one step: the series' own settings with another forget set, from the checkpoint of `model`."""
    assert config.series is not None
    values = as_dict(config)
    values |= {"name": f"{config.name}-step-{step.number}", "model": dict(model), "target": None, "series": None}
    values |= {"methods": step.methods, "export": config.export}
    if config.series.kind == "sustainability":
        values["export"] = step.methods[0]
    values["data"] |= {"forget": config.series.forget[step.number - 1], "vocab_size": None}
    return resolve(ExperimentConfig, values)


def _target(config: ExperimentConfig, path: Path, *, overwrite: bool) -> dict[str, Any]:
    """Settings of the checkpoint that a series starts from; one that is trained here is trained and exported first."""
    shape = config.model
    if isinstance(shape, PretrainedConfig):
        return as_dict(shape)
    assert isinstance(shape, ModelConfig) and config.target is not None
    directory = path / "target"
    alone = dataclasses.replace(config, series=None, export=None)
    identity = prepare(alone, directory, overwrite=overwrite).model_id
    names = ("target", "retrained") if config.target.retrained else ("target",)

    def make() -> None:
        for name in names:
            save_pretrained(load_trained(directory / name, shape), directory / f"{name}-checkpoint", overwrite=True)

    Stage("checkpoints", directory, fingerprint(identity, names)).run(make, "checkpoints of the target")
    given = {"path": os.fspath(directory / "target-checkpoint"), "dtype": shape.dtype}
    if len(names) > 1:
        given["retrained"] = os.fspath(directory / "retrained-checkpoint")
    return {**given, "grouped_matmul": shape.grouped_matmul}


# --- reading the runs


def write_series(config: ExperimentConfig, path: Path) -> str:
    """Writes series.json and report.html of a finished series from its runs; returns the table as text."""
    series = config.series
    assert series is not None
    found = [(step, needed(step.directory / "results.json")) for step in steps(config, path)]
    start = _test(found[0][1]["references"]["target"])
    scores = _scores(config, found)
    lines = [["", "", "start", *(f"step {number + 1}" for number in range(len(series.forget)))]]
    notes = [f"{m}, step {s.number}: {r['methods'][m]['stopped']}" for s, r in found for m in s.methods
             if r["methods"][m]["failed"]]  # fmt: skip
    for name, methods in scores.items():
        for method, values in methods.items():
            lines.append([name.replace("_", " "), method, *map(number_text, (start.get(name), *values))])
    own = "forget text and membership are of each step's own forget set; start: the target, on those of step 1"
    table = "\n".join([f"{_TITLES[series.kind]}, {SPLIT} split", *aligned(lines, left=2), own, *notes])
    write_json(
        path / "series.json",
        {
            "name": config.name,
            "title": _TITLES[series.kind],
            "benchmark": config.data.benchmark,
            "verdict": f"{len(series.forget)} steps. {own[0].upper()}{own[1:]}.",
            "kind": series.kind,
            "forget": series.forget,
            "steps": [
                {
                    "step": step.number,
                    "directory": os.fspath(step.directory.relative_to(path)),
                    "references": results["references"],
                    "methods": {m: _kept(results["methods"][m]) for m in step.methods},
                }
                for step, results in found
            ],
            "scores": {n: {m: [start.get(n), *v] for m, v in methods.items()} for n, methods in scores.items()},
            "table": table,
        },
    )
    write_json(path / "environment.json", describe())
    return f"{table}\n\nseries: {shown(path / 'series.json')}\n{write_run_report(path)}"


def _scores(
    config: ExperimentConfig, found: Sequence[tuple[Step, Mapping[str, Any]]]
) -> dict[str, dict[str, list[float | None]]]:
    """Value per step, by measurement and method. What is relative to the start of a step is left out: in a sequence
    every step has another."""
    board = scoreboard(config.data.benchmark)
    relative = {board.forgetting, *(utility.name for utility in board.utilities)}
    scores: dict[str, dict[str, list[float | None]]] = {}
    for step, results in found:
        for method in step.methods:
            for name, value in _test(results["methods"][method]["measurements"]).items():
                if name not in relative:
                    values = scores.setdefault(name, {}).setdefault(method, [])
                    values += [None] * (step.number - 1 - len(values)) + [value]
    return scores


def _test(measurements: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {m["name"]: m["value"] for m in measurements if m["split"] == SPLIT}


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("step", "steps", "stopped", "failed", "measurements")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command `series` beside --config and --workdir."""
    add_process_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """The command `series`."""
    config = options.load_config()
    keep_freed_memory()
    start_processes(options.coordinator, options.num_processes, options.process_id)
    if text := run_series(config, options.workdir or f"runs/{config.name}", overwrite=options.overwrite):
        print(text)
    return 0
