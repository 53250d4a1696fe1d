"""Several requests to forget on one model, as MUSE (2407.06460, section 3) asks of a method: ever larger ones
(scalability), or one after the other (sustainability). Every step is an ordinary run directory, which continues.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_jax.checkpoints.export import save_pretrained
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError, as_dict, fingerprint, resolve
from trace_jax.data.sources import read_source
from trace_jax.evaluation.comparison_text import number_text
from trace_jax.io.environment import describe
from trace_jax.io.files import encode, link, remove, run_stage, shown, write_json
from trace_jax.io.lock import locked
from trace_jax.io.progress import aligned, say
from trace_jax.parallel.processes import add_process_arguments, is_main, keep_freed_memory, start_processes
from trace_jax.run.directory import SPLIT, check_export, needed, on_test, open_workdir, seal, write_report
from trace_jax.run.experiment import ExperimentConfig, SeriesConfig
from trace_jax.run.export import RETRAINED, TARGET, load_model
from trace_jax.run.methods import run
from trace_jax.run.prepare import prepare

Step = tuple[int, tuple[str, ...], Path]  # its number from 1, the methods of its run, and where that is
_TITLES = {
    "scalability": "Scalability: ever larger forget sets, each unlearned from the target",
    "sustainability": "Sustainability: forget sets in sequence, each unlearned from the model before",
}


def run_series(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Runs, or continues, every step. Returns the scores per step and method as text.

    A model that is trained here is trained once, on `data.forget` and `data.retain` (in WORKDIR/target), and every step
    starts from its checkpoint. Scalability has the runs WORKDIR/step-N; sustainability has WORKDIR/METHOD/step-N, since
    every method goes on with its own model (step-N/export). Writes series.json and report.html.
    """
    series = check_series(config, workdir)
    for source in series.forget:  # so that a wrong name is known at once
        read_source(source, most=1)
    with locked(workdir):
        return _run_series(config, series, open_workdir(config, workdir, overwrite=overwrite), overwrite)


def _run_series(config: ExperimentConfig, series: SeriesConfig, path: Path, overwrite: bool) -> str:
    sequence = series.kind == "sustainability"
    target = _target(config, path, overwrite=overwrite)
    steps, start = [], target
    for methods, place in [((m,), path / m) for m in config.methods] if sequence else [(config.methods, path)]:
        for number, forget in enumerate(series.forget, start=1):
            if number == 1 or not sequence:
                start = target
            say(f"{series.kind}: step {number} of {len(series.forget)}, {', '.join(methods)}")
            values, directory = as_dict(config), place / f"step-{number}"
            values |= {"name": f"{config.name}-step-{number}", "model": start, "target": None, "series": None}
            values |= {"methods": methods, "export": methods[0] if sequence else config.export}
            values["data"] |= {"forget": forget, "vocab_size": None}
            run(resolve(ExperimentConfig, values), directory, overwrite=overwrite)
            start = {**target, "path": os.fspath(directory / "export")}
            steps.append((number, methods, directory))
    return write_series(config, path, steps) if is_main() else ""


def check_series(config: ExperimentConfig, workdir: str | os.PathLike) -> SeriesConfig:
    """The series of a configuration. Raises ConfigError: it has none, or one that can't run in `workdir`."""
    if config.series is None:
        raise ConfigError(
            "the configuration has no series: set --config.series.kind=scalability or sustainability, and "
            "--config.series.forget to a list with the forget source of each step."
        )
    if config.data.name != "text":
        raise ConfigError(f"a series unlearns sources of text (data.benchmark = text), not {config.data.name}.")
    if config.series.kind == "sustainability":
        check_export(dataclasses.replace(config, export=config.methods[0]), workdir)
    return config.series


def _target(config: ExperimentConfig, path: Path, *, overwrite: bool) -> dict[str, Any]:
    """Settings of the checkpoint that a series starts from; one that is trained here is trained and exported first."""
    shape = config.model
    if isinstance(shape, PretrainedConfig) or config.target is None:
        return as_dict(shape)
    directory = path / TARGET
    alone = dataclasses.replace(config, series=None, export=None)
    identity = prepare(alone, directory, overwrite=overwrite).model_id
    names = (TARGET, RETRAINED) if config.target.retrained else (TARGET,)

    def make() -> None:
        for name in names:
            output = directory / f"{name}-checkpoint"
            if not (output / "config.json").exists():
                remove(output)  # what is left of one is no checkpoint to replace
            save_pretrained(load_model(config, directory, name), output, overwrite=True)

    run_stage("checkpoints", directory, fingerprint(identity, names), "checkpoints of the target", make)
    paths = {"path" if n == TARGET else n: os.fspath(directory / f"{n}-checkpoint") for n in names}
    return {**paths, "dtype": shape.dtype, "grouped_matmul": shape.grouped_matmul}


def write_series(config: ExperimentConfig, path: Path, steps: Sequence[Step]) -> str:
    """Writes series.json and report.html of a finished series from its runs; returns the table as text."""
    series, board = config.series, config.data.board
    assert series is not None
    runs = [(number, methods, directory, needed(directory / "results.json")) for number, methods, directory in steps]
    # What is relative to the start of a step is left out: in a sequence every step has another.
    relative = {board.forgetting, *board.utilities}
    start = on_test(runs[0][3]["references"]["target"])
    scores, notes = {}, []  # scores per step, by measurement and method
    for number, methods, _, results in runs:
        for method in methods:
            result = results["methods"][method]
            notes += [f"{method}, step {number}: {result['stopped']}"] * result["failed"]
            for name, measured in on_test(result["measurements"]).items():
                if name not in relative:
                    first = start[name].value if name in start else None
                    values = scores.setdefault(name, {}).setdefault(method, [first])
                    values += [None] * (number - len(values)) + [measured.value]
    lines = [["", "", "start", *(f"step {number + 1}" for number in range(len(series.forget)))]]
    for name, of_methods in scores.items():
        lines += [[name.replace("_", " "), m, *map(number_text, values)] for m, values in of_methods.items()]
    own = "forget text and membership are of each step's own forget set; start: the target, on those of step 1"
    table = "\n".join([f"{_TITLES[series.kind]}, {SPLIT} split", *aligned(lines, left=2), own, *notes])
    names, told = ("step", "steps", "stopped", "failed", "measurements"), []
    for number, methods, directory, results in runs:
        of_methods = {m: {name: results["methods"][m][name] for name in names} for m in methods}
        where = {"step": number, "directory": os.fspath(directory.relative_to(path))}
        told.append({**where, "references": results["references"], "methods": of_methods})
    saved: dict[str, Any] = {"name": config.name, "title": _TITLES[series.kind], "benchmark": config.data.name}
    saved["board"] = encode(board)
    saved["verdict"] = f"{len(series.forget)} steps. {own[0].upper()}{own[1:]}."
    saved |= {"kind": series.kind, "forget": series.forget, "steps": told, "scores": encode(scores), "table": table}
    write_json(path / "series.json", saved)
    write_json(path / "environment.json", describe())
    seal(path)
    return f"{table}\n\nseries: {shown(path / 'series.json')}\nreport: {link(write_report(path))}"


add_arguments = add_process_arguments


def main(options: argparse.Namespace) -> int:
    config = options.load_config()
    keep_freed_memory()
    start_processes(options.coordinator, options.num_processes, options.process_id)
    if text := run_series(config, options.workdir or f"runs/{config.name}", overwrite=options.overwrite):
        print(text)
    return 0
