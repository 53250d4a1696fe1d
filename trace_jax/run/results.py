"""What a finished run says: the table at equal forgetting, results.json and the report, from its files."""

import argparse
import datetime
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.evaluation.fronts import Front, crossing
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.tables import equal_forgetting, equal_forgetting_text
from trace_jax.io.codec import decode, encode
from trace_jax.io.files import as_path, local_copy, read_json, read_lines, shown, write_json
from trace_jax.report.page import write_report
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.run.experiment import METHODS
from trace_jax.run.stages import calibration_directory
from trace_jax.tasks.benchmarks import scoreboard

SPLIT = "test"
CONTROLS = ("permuted", "random_experts", "ngram", "hidden", "loss", "oracle")
FORGOTTEN = {
    "handbook": "the forget topic of a generated handbook",
    "presidents": "Polk's addresses of 1845 to 1847",
    "text": "the forget text",
}


def needed(file: Path) -> dict[str, Any]:
    """The JSON object of a finished stage."""
    value = read_json(file)
    if value is None:
        raise ConfigError(f"{file}: is not there; the run is not finished. Run it first, with the same --workdir.")
    return value


def write_run_report(workdir: str | os.PathLike) -> str:
    """Writes report.html of a finished run, study or series from its files. Returns where it is, as a sentence."""
    path = as_path(workdir)
    names = ("results.json", "study.json", "series.json")
    page = needed(next((path / name for name in names if (path / name).exists()), path / names[0]))
    page |= {"config": needed(path / "config.json")["config"], "environment": needed(path / "environment.json")}
    board = scoreboard(page["benchmark"])
    page |= {"forgetting": board.forgetting, "chance": board.chance}
    page |= {"generated": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")}
    if "methods" in page:
        page |= {
            "title": f"Unlearning {FORGOTTEN[page['benchmark']]}",
            "forgotten": FORGOTTEN[page["benchmark"]],
            "rows": _rows(path, page),
            "frequency": _frequency(path, page["methods"]),
            "certificates": {
                label: saved["certificate"]
                for label in page["methods"]
                if (saved := read_json(calibration_directory(path, label) / "calibration.json")) is not None
            },
        }
    return f"report: {shown(write_report(page, path / 'report.html'))}"


def comparison_row(label: str, method: str, numbers: Mapping[str, Any], note: str, **rest: Any) -> dict[str, Any]:
    """A row of the report (`trace_jax.report.page.render`) on a method of `METHODS`; `note` stands after what it is."""
    kind, note = "control" if method in CONTROLS else "method", METHODS[method].summary + note
    return {"method": label, "kind": kind, **numbers, "step": None, "note": note, **rest}


def _rows(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """References as measured; methods where their front first comes down to the level, with interpolated intervals."""
    level, board = results["config"]["evaluation"]["levels"][0], scoreboard(results["benchmark"])
    original = _on_test(results["references"]["target"])
    scales = {u.name: original[u.name].value if u.relative and u.name in original else 1.0 for u in board.utilities}

    def numbers(measured: Mapping[str, Interval]) -> dict[str, Any]:
        """Forgetting, and utilities over the target model's, as the fronts are drawn."""
        utilities = {n: measured[n].map(lambda x, n=n: x / scales[n]) for n in scales if n in measured}
        return encode({"forgetting": measured.get(board.forgetting), "utilities": utilities})

    rest = {"kind": "reference", "reached": True, "step": None, "seeds": None, "note": ""}
    rows = [{"method": f"{n} model", **numbers(_on_test(ms)), **rest} for n, ms in results["references"].items()]
    for label, result in results["methods"].items():
        front = decode(Front, result["fronts"][SPLIT])
        read, lowest = crossing(front, level), int(np.argmin(front.forgetting))
        lines, measured = read_lines(path / "methods" / label / "metrics.jsonl"), {}
        history = [_on_test(line["evaluation"]) for line in lines if "evaluation" in line]
        for name in set.intersection(*map(set, history)) if history else ():
            points = [evaluation[name] for evaluation in history]
            columns = (np.array([getattr(point, end) for point in points]) for end in ("value", "low", "high"))
            value, low, high = (float(c[lowest]) if read is None else read(c) for c in columns)
            measured[name] = Interval(value, low, high, points[0].n)
        failed = f"; failed: {result['stopped']}" if result["failed"] else ""
        step = None if read is None else round(read(front.steps))
        rows.append(
            comparison_row(label, result["method"], numbers(measured), failed, reached=bool(read), step=step, seeds=1)
        )
    return rows


def _on_test(measurements: Iterable[Mapping[str, Any]]) -> dict[str, Interval]:
    """What was measured on the test split, by name."""
    return {
        m["name"]: decode(Interval, {field: m[field] for field in ("value", "low", "high", "n")})
        for m in measurements
        if m["split"] == SPLIT
    }


def _frequency(path: Path, labels: Iterable[str]) -> dict[str, Any] | None:
    """How often experts are used, and what each method selected (`trace_jax.report.page.render`)."""
    files = [path / "statistics" / f"{name}.npz" for name in ("forget", "retain")]
    if not all(file.exists() for file in files):
        return None
    forget, retain = map(ExpertStatistics.load, files)
    found = {
        "forget": forget.frequency, "retain": retain.frequency, "layers": forget.layers,
        "uniform": forget.top_k / forget.counts.shape[1], "calibrated": {}, "selected": {},
    }  # fmt: skip
    for label in labels:
        file = calibration_directory(path, label) / "weights.npz"
        with local_copy(file) as local, np.load(local, allow_pickle=False) as arrays:
            if "frequency" in arrays and arrays["selected"].any():
                found["calibrated"][label], found["selected"][label] = arrays["frequency"], arrays["selected"]
    return found


def refresh(workdir: str | os.PathLike, labels: Iterable[str]) -> str:
    """Writes results.json (references, every method's measurements and front, the tables) and report.html anew.

    Returns the tables and where the report is, as text.
    """
    path = as_path(workdir)
    config, references = needed(path / "config.json")["config"], needed(path / "references.json")
    methods = {label: needed(path / "methods" / label / "results.json") for label in labels}
    attacks = [name for name, settings in (config["attacks"] or {}).items() if settings is not None]
    for label, result in methods.items():
        result["attacks"] = {name: needed(path / "methods" / label / "attacks" / f"{name}.json") for name in attacks}
    fronts = {label: decode(Front, result["fronts"][SPLIT]) for label, result in methods.items()}
    benchmark, levels = config["data"]["benchmark"], config["evaluation"]["levels"]
    tables = [equal_forgetting(fronts, board=scoreboard(benchmark), level=level, split=SPLIT) for level in levels]
    results = {
        "name": config["name"],
        "benchmark": benchmark,
        "data": references["data"],
        "references": references["measurements"],
        "methods": methods,
        "equal_forgetting": tables,
        "table": "\n\n".join(map(equal_forgetting_text, tables)),
    }
    write_json(path / "results.json", results)
    return f"{results['table']}\n\n{write_run_report(path)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a finished run, here or at gs://BUCKET/NAME")


def main(options: argparse.Namespace) -> int:
    print(write_run_report(options.workdir))
    return 0
