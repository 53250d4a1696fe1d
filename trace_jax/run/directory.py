"""The directory of a run: who may write there, and what a finished run says, from its files."""

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trace_jax.config import ConfigError, as_dict, fingerprint
from trace_jax.data.sources import HUGGINGFACE, is_here, revision_of
from trace_jax.evaluation import comparison, comparison_text, fronts
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.task import Scoreboard
from trace_jax.io import files
from trace_jax.io.files import decode, encode
from trace_jax.io.lock import LOCK
from trace_jax.parallel.processes import all_processes, barrier, broadcast_from_process_0, is_main
from trace_jax.report.page import figure_files, render
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.run.page import changed_settings, loss_curves, side_by_side, text_examples
from trace_jax.tasks.benchmarks import BENCHMARKS
from trace_jax.unlearning.metrics import front_rows

SPLIT = "test"
CONTROLS = (
    "permuted",
    "random_experts",
    "least_experts",
    "ngram",
    "ngram_dsir",
    "hidden",
    "similarity",
    "gradient",
    "loss",
    "oracle",
)
_PACKAGE = Path(__file__).parents[1]
_SECONDS_TO_SEE = 30.0
_TOLD, _SEAL = ("results.json", "study.json", "series.json"), "results.stage.json"
_ALWAYS = "config.json", "environment.json", "references.json"
ANEW = "Run it again with the same --workdir: what is damaged is made anew."


def calibration_directory(workdir: Path, label: str) -> Path:
    """Where the weights of `methods/LABEL` are."""
    return workdir / "calibrations" / needed(workdir / "methods" / label / "weights.json")["calibration"]


def open_workdir(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Makes or reopens a run directory (`check_workdir`) and writes the resolved configuration into it."""
    path = files.as_path(workdir)
    replaces = check_workdir(config, path, overwrite=overwrite)
    barrier("the workdir as it was found")  # a process that is late must not see what is written now
    for file in path.iterdir() if replaces and is_main() else ():
        if file.name != LOCK:
            files.remove(file)
    files.write_json(path / "config.json", {**config.identities(), "config": as_dict(config)})
    files.remove(path / _SEAL)  # what is told there will be told anew
    if jax.distributed.is_initialized():
        _check_shared(path)
    return path


def _check_shared(path: Path) -> None:
    """Every process must see what process 0 writes: a run continues from its files, and states are written by all."""
    file, token = path / "shared.json", broadcast_from_process_0(int.from_bytes(os.urandom(3)))
    files.write_json(file, token)
    barrier("a token in the workdir")
    end = time.monotonic() + _SECONDS_TO_SEE
    while not (seen := files.read_json(file) == token) and time.monotonic() < end:
        time.sleep(0.5)  # network file systems take a while
    shared = all_processes(seen)
    files.remove(file)
    if not shared:
        raise ConfigError(
            f"{path}: not every process sees what process 0 writes there; each host has a disk of its own. Give "
            "--workdir a directory that all hosts mount, or an address gs://BUCKET/NAME."
        )


def check_workdir(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> bool:
    """Whether a run of another corpus or model is in `workdir` and would be replaced. Writes nothing. Refuses to
    replace it without `overwrite`, a directory that holds anything else, and a disk without space.
    """
    path = files.as_path(workdir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; --workdir needs a directory.")
    try:
        earlier = files.read_json(path / "config.json")
        before = {} if earlier is None else earlier["config"]
    except (ValueError, KeyError, TypeError):
        if overwrite:
            return True
        raise ConfigError(
            f"{path / 'config.json'}: is damaged, so that nobody knows which run is there. Put it back, choose another "
            "--workdir, or pass --overwrite to replace that run."
        ) from None
    if earlier is None and path.is_dir() and any(file.name != LOCK for file in path.iterdir()):
        raise ConfigError(f"{path}: is not empty and holds no run (no config.json). Choose another --workdir.")
    replaces = earlier is not None and not any(earlier.get(key) == it for key, it in config.identities().items())
    if earlier is not None and replaces and not overwrite:
        after = json.loads(json.dumps(as_dict(config)))  # tuples are lists, as in the file
        changed = [
            f"{section}.{key} {before.get(section, {}).get(key)!r} -> {value!r}"
            for section in ("data", "model")
            for key, value in after[section].items()
            if before.get(section, {}).get(key) != value
        ] or ["the content of its checkpoint"]
        changed = [*changed[:3], *[f"and {len(changed) - 3} more"] * (len(changed) > 3)]
        raise ConfigError(
            f"{path}: holds a run of another configuration ({'; '.join(changed)}). Choose another --workdir, or "
            "pass --overwrite to replace that run."
        )
    check_export(config, path)
    files.check_writable(path)
    if (free := files.free_bytes(path)) < 1 << 30:
        raise ConfigError(f"{path}: only {free / 2**20:.0f} MiB are free there; a run needs 1 GiB.")
    return replaces


def check_export(config: ExperimentConfig, workdir: str | os.PathLike) -> None:
    """Raises ConfigError if the run would export a checkpoint to an address."""
    if config.export and files.is_remote(workdir):
        raise ConfigError(
            f"{os.fspath(workdir)}: checkpoints are exported to a local disk. Pass --config.export=None; afterwards, "
            f"on one machine: python -m trace_jax.main export --workdir {os.fspath(workdir)} --output DIR."
        )


def needed(file: Path) -> dict[str, Any]:
    """The JSON object of a finished stage."""
    value = files.read_json(file)
    if value is None and file.name == "config.json":
        what = "is no run (it has no config.json)" if file.parent.is_dir() else "there is no such directory"
        raise ConfigError(f"{file.parent}: {what}; give the directory of a run.")
    if value is None:
        raise ConfigError(f"{file}: is not there; the run is not finished. Run it first, with the same --workdir.")
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{file}: is damaged. {ANEW}")
    return value


def check_files(path: Path) -> None:
    """Raises ValueError if a file of a run, study or series is not as it was when what made it was finished."""
    for marker in sorted(path.glob("*.stage.json") if files.is_remote(path) else path.rglob("*.stage.json")):
        if problem := files.damage(marker):
            raise ValueError(f"{problem}. {ANEW}")


def seal(path: Path, made_by: str = "") -> None:
    """Writes down what a finished run, study or series tells of itself, for `check_files`; and, of a run that is done
    with all, what it was `made_by` and which stages it has.
    """
    files.finish(path / _SEAL, _whole(path, made_by), {path / name for name in (*_TOLD, *_ALWAYS)})


def _whole(path: Path, made_by: str) -> str:
    """Hash of what made a run and of the names of its stages; "" at an address, where they can't be looked for."""
    if not made_by or files.is_remote(path):
        return ""
    stages = (os.path.relpath(file, path) for file in path.rglob("*.stage.json") if file != path / _SEAL)
    return fingerprint(made_by, sorted(stages))


def is_done(path: Path, made_by: str) -> bool:
    """Whether a run is there that was `made_by` the same, with every file as it was written."""
    try:
        if not (whole := _whole(path, made_by)) or (files.read_json(path / _SEAL) or {}).get("identity") != whole:
            return False
        check_files(path)
    except (ValueError, AttributeError):
        return False
    return (path / "report.html").exists()


def made_by(config: ExperimentConfig) -> str:
    """Hash of all that makes a run: its settings, this code, and the content of what it reads. "" where that takes as
    long as a start: text from the hub, published benchmarks, several processes.
    """
    attacks = config.attacks.chosen.values() if config.attacks else ()
    sources = [*config.data.sources, *(attack.source for attack in attacks if attack.source)]
    unknown = any(source.startswith(HUGGINGFACE) or not is_here(source) for source in sources)
    evaluation = config.evaluation
    if unknown or evaluation.muse or evaluation.tofu or evaluation.multiple_choice or jax.distributed.is_initialized():
        return ""
    revisions = [revision_of(source) for source in sources]
    code = {str(file.relative_to(_PACKAGE)): file.read_text("utf-8") for file in sorted(_PACKAGE.rglob("*.py"))}
    return fingerprint(config, config.model_identity(), revisions, code) if all(revisions) else ""


def finished(path: Path) -> dict[str, Any]:
    """What a finished run, study or series says of itself: its results.json, study.json or series.json."""
    needed(path / "config.json")
    return needed(next((path / name for name in _TOLD if (path / name).exists()), path / _TOLD[0]))


def write_results(workdir: str | os.PathLike, labels: Iterable[str]) -> None:
    """Writes results.json (references, every method's measurements and front, the tables) and report.html."""
    path = files.as_path(workdir)
    config, references = needed(path / "config.json")["config"], needed(path / "references.json")
    methods = {label: needed(path / "methods" / label / "results.json") for label in labels}
    attacks = [name for name, settings in (config["attacks"] or {}).items() if settings is not None]
    for label, result in methods.items():
        if config["evaluation"].get("patching"):
            result["patching"] = needed(path / "methods" / label / "patching.json")
        result["attacks"] = {name: needed(path / "methods" / label / "attacks" / f"{name}.json") for name in attacks}
    results: dict[str, Any] = {"name": config["name"], "benchmark": config["data"]["benchmark"], "methods": methods}
    board = decode(Scoreboard, next(iter(methods.values()))["board"])
    results |= {"board": encode(board), "data": references["data"], "references": references["measurements"]}
    results["equal_forgetting"] = tables = equal_forgetting(path, config, results, board)
    results["table"] = "\n\n".join(map(comparison_text.equal_forgetting_text, tables))
    files.write_json(path / "results.json", results)
    seal(path)
    write_report(path)


def equal_forgetting(
    path: Path, config: Mapping[str, Any], results: Mapping[str, Any], board: Scoreboard
) -> list[dict[str, Any]]:
    """`comparison.equal_forgetting` of a run's methods, at each of its levels."""
    runs, evaluation = [], config["evaluation"]
    for label, result in results["methods"].items():
        front = decode(fronts.Front, result["fronts"][SPLIT])
        items = fronts.load_run_items(path / "methods" / label, front, board)
        runs.append(comparison.Run(label, "", config["seed"], front, front, items))
    controls = [label for label, result in results["methods"].items() if result["method"] in CONTROLS]
    about: dict[str, Any] = {"board": board, "controls": controls, "resamples": evaluation["bootstrap"]}
    return [comparison.equal_forgetting(runs, level=level, **about) for level in evaluation["levels"]]


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes report.html of a finished run, study or series from its files, and its fronts and curves as
    `figures/*.svg` and `*.pdf`. Returns where the page is.

    Example:
      >>> tj.write_report("runs/mine").name
      'report.html'
    """
    path = files.as_path(workdir)
    page = _page(path)
    for name, content in figure_files(page).items():
        with files.replacing(path / "figures" / name) as temporary:
            temporary.write_bytes(content)
    with files.replacing(path / "report.html") as temporary:
        temporary.write_text(render(page), encoding="utf-8")
    return path / "report.html"


def _page(path: Path) -> dict[str, Any]:
    """What `render` draws of a finished run, study or series."""
    page = finished(path)
    benchmark, board = BENCHMARKS[page["benchmark"]], decode(Scoreboard, page["board"])
    page["config"], page["environment"] = needed(path / "config.json")["config"], needed(path / "environment.json")
    page |= {"forgetting": board.forgetting, "chance": board.chance}
    page |= {"methods_known": tuple(dict.fromkeys(("uniform", "trace", "trace_rows", *METHODS)))}
    page["changed"] = changed_settings(page["config"])
    page["generated"] = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    if "comparisons" in page:
        first = {c.get("variant", ""): c for c in reversed(page["comparisons"])}
        found = {o: comparison_text.study_conclusion(c, board.forgetting, CONTROLS) for o, c in reversed(first.items())}
        page["conclusion"] = "\n".join(f"{o}: {text}" if o else text for o, text in found.items())
        for row in page["rows"]:
            variant, method, _ = row["run"]
            gains = {r["method"]: r["gains"].get(fronts.MEAN) for r in first[variant]["results"]}
            row["gain"] = gains[method] if method != first[variant]["baseline"] else None
    if "methods" in page:
        calibrations = {label: calibration_directory(path, label) for label in page["methods"]}
        solved = {label: files.read_json(place / "calibration.json") for label, place in calibrations.items()}
        page |= {"title": f"Unlearning {benchmark.forgotten}", "forgotten": benchmark.forgotten}
        table = equal_forgetting(path, page["config"], page, board)[0]
        page |= {
            "rows": _rows(path, page, board, table),
            "conclusion": comparison_text.conclusion(table),
            "frequency": _frequency(path, calibrations),
        }
        page["examples"] = text_examples(path, page["config"], page["methods"])
        page["losses"] = loss_curves(path, page["methods"])
        page["diagnosis"] = files.read_json(path / "statistics" / "diagnosis.json")
        page["certificates"] = {label: s["certificate"] for label, s in solved.items() if s is not None}
    return page


def _rows(path: Path, results: Mapping[str, Any], board: Scoreboard, table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """References as measured; methods where they first come down to the level, those that don't at their lowest."""

    def numbers(measured: Mapping[str, Interval]) -> dict[str, Any]:
        utilities = {n: measured[n] for n in board.utilities if n in measured}
        return {"forgetting": encode(measured.get(board.forgetting)), "utilities": encode(utilities)}

    same = {"kind": "reference", "reached": True, "step": None, "seeds": None, "note": "", "between": [], "gain": None}
    rows = [{"method": f"{n} model", **numbers(on_test(ms)), **same} for n, ms in results["references"].items()]
    exact = {"value": 1.0, "low": None, "high": None, "n": None}
    target = on_test(results["references"]["target"])
    for row, measured in zip(rows, map(on_test, results["references"].values()), strict=True):
        own = {n: measured[n].value for n in board.utilities if n in measured and n in target}
        relative = [value / target[n].value if board.utilities[n] else value for n, value in own.items()]
        row["utilities"][fronts.MEAN] = encode(exact | {"value": float(np.mean(relative)) if relative else None})
    for row in table["rows"][1:]:
        label, result = row["name"], results["methods"][row["name"]]
        front = decode(fronts.Front, result["fronts"][SPLIT])
        if row["reached"]:
            at = exact | {"value": row["values"][board.forgetting]}
            measured = {"forgetting": at, "utilities": row["intervals"]}
        else:
            lowest = int(np.argmin(front.forgetting))
            history = {int(one["step"]): one["evaluation"] for one in front_rows(path / "methods" / label)}
            measured = numbers(on_test(history.get(int(front.steps[lowest]), ())))
            measured["utilities"][fronts.MEAN] = exact | {"value": float(front.utilities[fronts.MEAN][lowest])}
        rest = {"reached": row["reached"], "step": row["step"], "between": row["between"], "seeds": 1}
        rest["gain"] = row["gains"].get(fronts.MEAN)
        failed = f"; failed: {result['stopped']}" if result["failed"] else ""
        rows.append(comparison_row(label, result["method"], measured, failed, **rest))
    return rows


def comparison_row(label: str, method: str, numbers: Mapping[str, Any], note: str, **rest: Any) -> dict[str, Any]:
    """A row of the report (`trace_jax.report.page.render`) on a method of `METHODS`; `note` stands after what it is."""
    kind, note = "control" if method in CONTROLS else "method", METHODS[method].summary + note
    plain = {"step": None, "between": [], "gain": None}
    return {"method": label, "kind": kind, **numbers, **plain, "note": note, **rest}


def on_test(measurements: Iterable[Mapping[str, Any]]) -> dict[str, Interval]:
    """What was measured on the test split, by name."""
    return {
        m["name"]: decode(Interval, {field: m[field] for field in ("value", "low", "high", "n")})
        for m in measurements
        if m["split"] == SPLIT
    }


def _frequency(path: Path, calibrations: Mapping[str, Path]) -> dict[str, Any] | None:
    """How often experts are used, and what each method selected (`trace_jax.report.page.render`)."""
    corpora = [path / "statistics" / f"{name}.npz" for name in ("forget", "retain")]
    if not all(file.exists() for file in corpora):
        return None
    forget, retain = map(ExpertStatistics.load, corpora)
    frequency = {
        "forget": forget.frequency, "retain": retain.frequency, "layers": forget.layers,
        "uniform": forget.top_k / forget.counts.shape[1], "calibrated": {}, "selected": {},
    }  # fmt: skip
    for label, directory in calibrations.items():
        arrays = files.read_arrays(directory / "weights.npz", ("frequency", "selected"))
        if "frequency" in arrays and arrays["selected"].any():
            frequency["calibrated"][label], frequency["selected"][label] = arrays["frequency"], arrays["selected"]
    return frequency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "a finished run, study or series, or gs://BUCKET/NAME; several runs: one page that sets them side by side"
    parser.add_argument("--workdir", nargs="+", required=True, metavar="DIR", help=about)
    about = "where that page is written; default: comparison.html"
    parser.add_argument("--output", default="comparison.html", metavar="FILE", help=about)


def main(options: argparse.Namespace) -> int:
    for workdir in options.workdir:
        check_files(files.as_path(workdir))
    if len(options.workdir) == 1:
        path = write_report(options.workdir[0])
    else:
        path = files.as_path(options.output)
        pages = {workdir: _page(files.as_path(workdir)) for workdir in options.workdir}
        with files.replacing(path) as temporary:
            temporary.write_text(render(side_by_side(pages)), encoding="utf-8")
    print(f"report: {files.link(path)}")
    return 0
