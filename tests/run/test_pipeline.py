"""The whole run on a toy scale: it continues where it stopped, reruns only what changed, and ends by its rules."""

import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest

from tests.run.toy import experiment, numbers, on_one_device
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError
from trace_jax.evaluation.fronts import MEAN, Front
from trace_jax.io.files import decode, read_json, read_lines, write_json
from trace_jax.models.architecture import flatten
from trace_jax.run import directory, methods
from trace_jax.run.directory import calibration_directory, write_report
from trace_jax.run.export import export, find_model, load_model, model_card
from trace_jax.run.methods import run
from trace_jax.run.prepare import prepare

METRICS = "methods/uniform/metrics.jsonl"
LENGTH = {"steps": None, "epochs": 2.0, "evaluate_every": 1, "learning_rate": 0.02, "alpha": 1.0}


def test_a_run_leaves_every_artefact_and_a_table(finished):
    """Every measurement has its number of items and an interval."""
    path, text = finished[0], str(finished[1])
    assert "trace_rows" in text and "target model" in text and f"report: {(path / 'report.html').as_uri()}" in text
    assert " the best mean utility is that of " in text
    assert f"next: python -m trace_jax.main export --workdir {path} --method " in text
    files = {str(file.relative_to(path)) for file in path.rglob("*")}
    assert {"config.json", "environment.json", "references.json", "results.json", "report.html", "statistics"} <= files
    made = ("weights.json", "metrics.jsonl", "model.safetensors", "results.json")
    assert {f"methods/trace_rows/{name}" for name in made} <= files and not any(".tmp" in name for name in files)
    shared = {file.name for file in calibration_directory(path, "trace_rows").iterdir()}
    assert {"calibration.json", "calibration.npz", "weights.npz"} <= shared
    measured = [m for method in numbers(path)["methods"].values() for m in method["measurements"]]
    assert all(m["n"] > 0 and m["low"] <= m["value"] <= m["high"] for m in measured)
    names = {m["name"] for m in measured}
    assert {"general_utility", "neighbour_utility", "forget_probability_ratio", "verbatim", "privleak_auc"} <= names
    assert {"routing_jaccard_forget", "routing_gap", "router_drift", "calibration_gap_after"} <= names


def test_the_last_evaluation_along_a_run_is_what_is_measured_afterwards(finished):
    """The same state, once as it trains and once as the finished model."""
    for name, method in numbers(finished[0])["methods"].items():
        rows = read_lines(finished[0] / "methods" / name / "metrics.jsonl")
        along = [row for row in rows if row["kind"] == "measurement" and row["step"] == 6]
        assert len(along) == 12 and rows[-1]["kind"] == "evaluation"
        after = {(m["name"], m["split"]): m for m in method["measurements"]}
        for measured in along:
            other = after[measured["name"], measured["split"]]
            assert other["n"] == measured["n"]
            for key in ("value", "low", "high"):
                assert other[key] == pytest.approx(measured[key], rel=1e-6)


def test_a_changed_setting_reruns_its_stage_and_those_after_it(data, finished, tmp_path, capsys):
    """Another way to evaluate does not unlearn again; another alpha does, with the same weights."""
    path = shutil.copytree(finished[0], tmp_path / "copy")
    shared = [path / "target/model.safetensors", path / "statistics/forget.npz"]
    shared.append(calibration_directory(path, "trace_rows") / "weights.npz")
    made = [path / "methods/trace_rows" / name for name in ("model.safetensors", "metrics.jsonl")]
    written, before = [file.stat().st_mtime_ns for file in shared + made], numbers(path)["methods"]["trace_rows"]
    run(experiment(data, evaluation={"max_prompts": 2}), path)
    assert written == [file.stat().st_mtime_ns for file in shared + made]
    after = numbers(path)["methods"]["trace_rows"]
    pairs = [[(m["name"] == "verbatim", m) for m in r["measurements"]] for r in (before, after)]
    verbatim, others = ([[m for is_it, m in pair if is_it == of] for pair in pairs] for of in (True, False))
    assert [measured[0]["n"] for measured in verbatim] == [4, 2]
    assert others[0] == others[1] and before["fronts"] == after["fronts"]
    capsys.readouterr()
    run(experiment(data, unlearning={"alpha": 2.0}), path)
    said = capsys.readouterr().err
    assert said.count("parameter  ") == 1 and said.count(": trainable parameters: ") == 2  # one table, a line a method
    assert said.count(": compiling") == 2 and written[:3] == [file.stat().st_mtime_ns for file in shared]
    after = numbers(path)["methods"]["trace_rows"]
    assert after["unlearning"]["alpha"] == 2.0 and after["measurements"] != before["measurements"]


def test_a_start_with_everything_done_reads_no_text(data, tmp_path, monkeypatch):
    """Of another text, setting, code or file it looks at all again."""
    path, own = tmp_path / "run", shutil.copytree(data, tmp_path / "data")

    def reads(**changes):
        prepared = []
        with monkeypatch.context() as patched:
            patched.setattr(methods, "prepare", lambda *a, **k: prepared.append(a) or prepare(*a, **k))
            run(experiment(own, methods=["uniform"], **changes), path)
        return bool(prepared)

    assert reads() and not reads()
    assert reads(evaluation={"max_prompts": 2}) and reads() and not reads()
    (path / "report.html").unlink()
    assert reads() and (path / "report.html").exists() and not reads()
    with (path / "methods/uniform/results.json").open("a") as file:
        file.write(" ")
    assert reads() and not reads()
    with (own / "forget.jsonl").open("a") as file:
        file.write("\n")
    assert reads() and not reads()
    (path / "methods/uniform/evaluation.stage.json").unlink()
    assert reads() and not reads()
    monkeypatch.setattr(directory, "_PACKAGE", own)
    assert reads()


def test_experts_are_put_back_into_the_models_of_a_finished_run(data, finished, tmp_path):
    """Nothing else is made again; and nothing at all the second time."""
    path = shutil.copytree(finished[0], tmp_path / "copy")
    methods = "uniform", "trace_rows"
    made = {f"methods/{method}/patching{end}" for method in methods for end in (".json", ".stage.json")}
    for expected in (made, set()):
        before = {file: file.stat().st_mtime_ns for file in (path / "methods").rglob("*.*")}
        run(experiment(data, evaluation={"patching": True}), path)
        after = {file: file.stat().st_mtime_ns for file in (path / "methods").rglob("*.*")}
        changed = {str(file.relative_to(path)) for file, written in after.items() if before.get(file) != written}
        assert changed - {f"methods/{method}/weights.json" for method in methods} == expected
    for result in numbers(path)["methods"].values():
        put = {row["name"]: row["values"] for row in result["patching"]["models"]}
        assert np.array(result["patching"]["drift"]).all()
        assert put["original"]["forget_probability_ratio"]["value"] == 1.0
        assert {"1 critical", "all experts", "experts, layer 1", "routers", "attention"} <= put.keys()
    assert "Which experts carry the damage" in (path / "report.html").read_text()


def test_weights_follow_the_model_where_a_run_asks_for_it(data, finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "copy")
    settings = {"rule": {"name": "difference", "top": 1}}
    recalibrated = {**settings, "routing": {"name": "recalibrated", "every": 2}}
    run(experiment(data, methods=["trace"], calibration=recalibrated), path)
    directory = path / "methods" / "trace"
    rows = [row for row in read_lines(directory / "metrics.jsonl") if row["kind"] == "recalibration"]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        where = directory / "recalibration" / f"step-{row['step']:06d}"
        assert read_json(where / "drift.json")["gap"] == row["gap"]
        assert (where / "weights.npz").exists() and (where / "calibration.json").exists()
    run(experiment(data, methods=["trace"], calibration={**settings, "routing": "online"}), path)
    steps = [row for row in read_lines(directory / "metrics.jsonl") if "loss" in row]
    assert len(steps) == 6 and all(row["weight_mean"] > 0 for row in steps)
    assert not (directory / "recalibration").exists()


def test_the_report_is_rebuilt_from_files(finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    (path / "report.html").unlink()
    assert write_report(path) == path / "report.html"
    new, old = ((p / "report.html").read_text() for p in (finished[0], path))
    assert "experts selected" in old and "Routing after unlearning" in old and len(old) == len(new)


def test_a_method_keeps_what_changed_and_its_model_can_be_exported(finished, data, tmp_path):
    """Routers did not train but were realigned; a model that was trained here is exported as a Mixtral."""
    path = shutil.copytree(finished[0], tmp_path / "run")
    changes = {"trainable": "routers_frozen", "grip": {"name": "realign", "tokens": 200}}
    run(experiment(data, methods=["uniform"], unlearning=changes), path)
    results = read_json(path / "methods/uniform/results.json")
    assert all(row["kept"] and row["cosine"] > 0.95 for row in results["grip"])
    export(path, tmp_path / "out", method="uniform")
    config, *_ = find_model(path, "uniform")
    target, unlearned = (flatten(load_model(config, path, label).params) for label in ("target", "uniform"))
    assert not np.array_equal(target["layers/router"], unlearned["layers/router"])
    np.testing.assert_allclose(target["layers/router"], unlearned["layers/router"], atol=0.3)
    for name, leaf in flatten(load_pretrained(tmp_path / "out").params).items():
        np.testing.assert_array_equal(leaf, unlearned[name])
    with pytest.raises(ConfigError, match=r"no method is given; name one .* --method=trace_rows or uniform"):
        export(path, tmp_path / "out")


def _run_in_process(data, path):
    import tests.conftest  # noqa: F401  (the same devices as this process: other counts round differently)

    with on_one_device():
        run(experiment(data), path)


def test_killed_and_started_again_it_ends_in_the_same_numbers(data, finished, tmp_path):
    """kill -9 after a state was saved, while it unlearns; the states of the target model are of the same loop."""
    path = shutil.copytree(finished[0], tmp_path / "cut")
    shutil.rmtree(path / "methods")
    process = multiprocessing.get_context("spawn").Process(target=_run_in_process, args=(data, path))
    process.start()
    deadline = time.monotonic() + 240
    while not (path / "methods/uniform/checkpoints/2").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run(experiment(data), path)
    assert numbers(path) == numbers(finished[0])


@pytest.fixture(scope="module")
def trained(data, finished, tmp_path_factory):
    """A run of two epochs without rules."""
    path = shutil.copytree(finished[0], tmp_path_factory.mktemp("runs") / "plain")
    run(experiment(data, methods=["uniform"], unlearning=LENGTH), path)
    return path


def result_of(path):
    return read_json(path / "methods" / "uniform" / "results.json")


def test_a_run_stops_and_keeps_by_its_validation_front(data, trained, tmp_path):
    """The rules are set between the points of the run without them, so that what they must do is known."""
    result, config = result_of(trained), experiment(data, methods=["uniform"])
    assert result["unlearning"]["epochs"] == 2.0 and result["unlearning"]["steps"] == 0
    assert result["steps"] == result["step"] == len([r for r in read_lines(trained / METRICS) if "loss" in r]) > 4
    assert (result["stopped"], result["failed"]) == ("", False)
    front = decode(Front, result["fronts"]["validation"])
    falls = [i for i in range(1, len(front.steps)) if front.forgetting[i] < front.forgetting[:i].min()]
    target = falls[len(falls) // 2]
    level = (front.forgetting[target] + front.forgetting[:target].min()) / 2
    path = shutil.copytree(trained, tmp_path / "stopped")
    run(experiment(data, methods=["uniform"], unlearning=LENGTH | {"stop_forgetting": float(level)}), path)
    result = result_of(path)
    assert result["step"] == front.steps[target] < result["steps"] and not result["failed"]
    assert result["stopped"].startswith("forgetting ") and f"at step {front.steps[target]}" in result["stopped"]
    points = [row for row in read_lines(path / METRICS) if row["kind"] == "evaluation"]
    assert [row["forgetting"] for row in points] == pytest.approx(front.forgetting[: target + 1])
    assert [row["utility"] for row in points] == pytest.approx(front.utilities[MEAN][: target + 1])
    assert "was ended by a rule: forgetting" in str(model_card(config, path, "uniform"))

    keep = {"keep": {"name": "best_utility", "forgetting": float(level)}}
    run(experiment(data, methods=["uniform"], unlearning=LENGTH | keep), path)
    reached = [i for i in range(len(front.steps)) if front.forgetting[i] <= level]
    best = max(reached, key=lambda i: front.utilities[MEAN][i])
    assert result_of(path)["step"] == front.steps[best]
    assert not (path / "methods" / "uniform" / "checkpoints").exists()


def test_a_failure_is_told_in_the_report_and_on_the_card(data, trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "failed")
    reason = "loss is not finite at step 3"
    write_json(path / "methods/uniform/results.json", result_of(path) | {"stopped": reason, "failed": True})
    results = read_json(path / "results.json")
    results["methods"]["uniform"] |= {"stopped": reason, "failed": True}
    write_json(path / "results.json", results)
    write_report(path)
    assert f"failed: {reason}" in (path / "report.html").read_text()
    card = str(model_card(experiment(data), path, "uniform"))
    assert f"The run failed, and this is a state from before: {reason}." in card
