"""What a finished run says: the table at equal forgetting, results.json and the report, from its files."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.evaluation.benchmarks import Scoreboard, scoreboard
from trace_jax.evaluation.fronts import Front, crossing
from trace_jax.evaluation.tables import equal_forgetting
from trace_jax.io.files import as_path, local_copy, read_json, read_lines, shown, write_json
from trace_jax.report import Number, ReportData, Routing, SummaryRow, attack_rows, report_front, write_report
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.run.experiment import METHODS
from trace_jax.run.stages import calibration_directory

SPLIT = "test"
CONTROLS = ("permuted", "random_experts", "ngram", "hidden", "loss", "oracle")
FORGOTTEN = {
    "handbook": "the forget topic of a generated handbook",
    "presidents": "Polk's addresses of 1845 to 1847",
    "text": "the forget text",
}


def summarise(workdir: str | os.PathLike, labels: Iterable[str]) -> dict[str, Any]:
    """The content of results.json: references, every method's measurements and front, and the tables."""
    path = as_path(workdir)
    config, references = needed(path / "config.json")["config"], needed(path / "references.json")
    methods = {label: needed(path / "methods" / label / "results.json") for label in labels}
    attacks = [name for name, settings in (config.get("attacks") or {}).items() if settings is not None]
    for label, result in methods.items():
        result["attacks"] = {name: needed(path / "methods" / label / "attacks" / f"{name}.json") for name in attacks}
    fronts = {label: Front.from_json(result["fronts"][SPLIT]) for label, result in methods.items()}
    benchmark = config["data"]["benchmark"]
    tables = [
        equal_forgetting(fronts, benchmark=benchmark, level=level, split=SPLIT)
        for level in config["evaluation"]["levels"]
    ]
    return {
        "name": config["name"],
        "benchmark": benchmark,
        "data": references["data"],
        "references": references["measurements"],
        "methods": methods,
        "equal_forgetting": [table.to_json() for table in tables],
        "table": "\n\n".join(table.text() for table in tables),
    }


def needed(file: Path) -> dict[str, Any]:
    """The JSON object of a finished stage."""
    value = read_json(file)
    if value is None:
        raise ConfigError(f"{file}: is not there; the run is not finished. Run it first, with the same --workdir.")
    return value


def write_run_report(workdir: str | os.PathLike) -> str:
    """Writes report.html of a finished run from its files. Returns where it is, as a sentence."""
    path = as_path(workdir)
    results = needed(path / "results.json")
    file = write_report(_report_data(path, results), path / "report.html")
    return f"report: {shown(file)}"


def _report_data(path: Path, results: dict[str, Any]) -> ReportData:
    config, board = needed(path / "config.json")["config"], scoreboard(results["benchmark"])
    level = config["evaluation"]["levels"][0]
    methods = results["methods"]
    certificates = {}
    for label in methods:
        saved = read_json(calibration_directory(path, label) / "calibration.json")
        if saved is not None:
            certificates[label] = saved["certificate"]
    return ReportData(
        attacks=attack_rows(results),
        title=f"Unlearning {FORGOTTEN[results['benchmark']]}",
        benchmark=results["benchmark"],
        forgotten=FORGOTTEN[results["benchmark"]],
        forgetting=board.forgetting,
        level=level,
        chance=board.chance,
        rows=_rows(path, results, board, level),
        fronts={
            label: [report_front(result["seed"], Front.from_json(result["fronts"][SPLIT]))]
            for label, result in methods.items()
        },
        routing=_routing(path, results),
        certificates=certificates,
        measurements={
            **{f"{name} model": measured for name, measured in results["references"].items()},
            **{label: result["measurements"] for label, result in methods.items()},
            **{
                f"{label}, {name.replace('_', ' ')}, {point['at']}": point["measurements"]
                for label, result in methods.items()
                for name, attack in result["attacks"].items()
                for point in attack["points"]
            },
        },
        trained={label: _trained(result["trained"]) for label, result in methods.items()},
        config=config,
        environment=needed(path / "environment.json"),
        generated=now(),
    )


def _trained(table: Sequence[dict]) -> str:
    trained, total = (sum(row[key] for row in table) for key in ("trained", "parameters"))
    return f"{trained:,} of {total:,} parameters"


def now() -> str:
    """Date and time in words."""
    return datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")


def _rows(path: Path, results: dict[str, Any], board: Scoreboard, level: float) -> list[SummaryRow]:
    """References as measured; methods where their front first comes down to the level, with interpolated intervals."""
    names = [utility.name for utility in board.utilities]
    original = {m["name"]: m["value"] for m in results["references"]["target"] if m["split"] == SPLIT}
    scale = {u.name: original.get(u.name) or 1.0 for u in board.utilities if u.relative}
    rows = []
    for name, measured in results["references"].items():
        found = {m["name"]: Number(m["value"], m["n"], m["low"], m["high"]) for m in measured if m["split"] == SPLIT}
        utilities = {n: _relative(found.get(n, Number(None)), scale.get(n, 1.0)) for n in names}
        rows.append(SummaryRow(f"{name} model", "reference", found.get(board.forgetting), utilities))
    for label, result in results["methods"].items():
        front = Front.from_json(result["fronts"][SPLIT])
        at = crossing(front, level)
        lowest = int(np.argmin(front.forgetting))
        numbers = {n: _interpolated(path / "methods" / label, n, at, lowest) for n in [board.forgetting, *names]}
        rows.append(
            SummaryRow(
                label,
                "control" if result["method"] in CONTROLS else "method",
                numbers.pop(board.forgetting),
                {n: _relative(v, scale.get(n, 1.0)) for n, v in numbers.items() if v.value is not None},
                reached=at is not None,
                step=None if at is None else round(at.step),
                seeds=1,
                note=METHODS[result["method"]].summary + (f"; failed: {result['stopped']}" if result["failed"] else ""),
            )
        )
    return rows


def _relative(number: Number, scale: float) -> Number:
    """A number over the target model's, as the fronts are drawn."""
    value, low, high = (None if x is None else x / scale for x in (number.value, number.low, number.high))
    return Number(value, number.n, low, high)


def _interpolated(directory: Path, name: str, at, lowest: int) -> Number:
    """A measurement of a run and its interval at a crossing of its front, or at its most forgetful evaluation."""
    history = [row["evaluation"] for row in read_lines(directory / "metrics.jsonl") if "evaluation" in row]
    found = [m for evaluation in history for m in evaluation if m["name"] == name and m["split"] == SPLIT]
    if len(found) != len(history) or not found:
        return Number(None)
    columns = (
        np.array([np.nan if m[key] is None else m[key] for m in found], np.float64) for key in ("value", "low", "high")
    )
    value, low, high = (float(c[lowest]) if at is None else at.value(c) for c in columns)
    return Number(value, found[0]["n"], low, high)


def _routing(path: Path, results: dict[str, Any]) -> Routing | None:
    statistics = {name: path / "statistics" / f"{name}.npz" for name in ("forget", "retain")}
    if not all(file.exists() for file in statistics.values()):
        return None
    forget, retain = (ExpertStatistics.load(file) for file in statistics.values())
    calibrated, selected = {}, {}
    for label in results["methods"]:
        with (
            local_copy(calibration_directory(path, label) / "weights.npz") as local,
            np.load(local, allow_pickle=False) as file,
        ):
            if "frequency" in file and file["selected"].any():
                calibrated[label], selected[label] = file["frequency"], file["selected"]
    uniform = forget.top_k / forget.counts.shape[1]
    measured = {label: r["routing"] for label, r in results["methods"].items() if "quantities" in r["routing"]}
    return Routing(forget.frequency, retain.frequency, uniform, calibrated, selected, forget.layers, measured)


def refresh(workdir: str | os.PathLike, labels: Iterable[str]) -> str:
    """Rewrites results.json and report.html; returns the table and where the report is."""
    path = as_path(workdir)
    results = summarise(path, labels)
    write_json(path / "results.json", results)
    return f"{results['table']}\n\n{write_run_report(path)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command `report`."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a finished run, here or at gs://BUCKET/NAME")


def main(options: argparse.Namespace) -> int:
    """The command `report`."""
    print(write_run_report(options.workdir))
    return 0
