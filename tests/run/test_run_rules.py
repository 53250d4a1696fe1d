"""Rules of a whole run: read off the validation split, written into its results, told apart from failures."""

import shutil

import pytest

from tests.run.toy import experiment
from trace_jax.evaluation.fronts import MEAN, Front
from trace_jax.io.files import decode, read_json, read_lines, write_json
from trace_jax.run.directory import write_report
from trace_jax.run.export import model_card
from trace_jax.run.methods import run

METRICS = "methods/uniform/metrics.jsonl"
LENGTH = {"steps": None, "epochs": 2.0, "evaluate_every": 1, "learning_rate": 0.02, "alpha": 1.0}


@pytest.fixture(scope="module")
def trained(data, finished, tmp_path_factory):
    """A run of two epochs without rules."""
    path = shutil.copytree(finished[0], tmp_path_factory.mktemp("runs") / "plain")
    run(experiment(data, methods=["uniform"], unlearning=LENGTH), path)
    return path


def result_of(path):
    return read_json(path / "methods" / "uniform" / "results.json")


def test_the_number_of_steps_is_recorded(trained):
    result = result_of(trained)
    rows = read_json(trained / "config.json")["config"]["unlearning"]["forget_batch_size"]
    assert rows == 4 and result["unlearning"]["epochs"] == 2.0 and result["unlearning"]["steps"] == 0
    assert result["steps"] == result["step"] == len([r for r in read_lines(trained / METRICS) if "loss" in r]) > 4
    assert (result["stopped"], result["failed"]) == ("", False)


def test_a_run_stops_and_keeps_by_its_validation_front(data, trained, tmp_path):
    """The rules are set between the points of the run without them, so that what they must do is known."""
    front = decode(Front, result_of(trained)["fronts"]["validation"])
    falls = [i for i in range(1, len(front.steps)) if front.forgetting[i] < front.forgetting[:i].min()]
    target = falls[len(falls) // 2]
    level = (front.forgetting[target] + front.forgetting[:target].min()) / 2
    path = shutil.copytree(trained, tmp_path / "stopped")
    run(experiment(data, methods=["uniform"], unlearning=LENGTH | {"stop_forgetting": float(level)}), path)
    result = result_of(path)
    assert result["step"] == front.steps[target] < result["steps"] and not result["failed"]
    assert result["stopped"].startswith("forgetting ") and f"at step {front.steps[target]}" in result["stopped"]
    points = [row for row in read_lines(path / METRICS) if "evaluation" in row]
    assert [row["forgetting"] for row in points] == pytest.approx(front.forgetting[: target + 1])
    assert [row["utility"] for row in points] == pytest.approx(front.utilities[MEAN][: target + 1])
    assert "was ended by a rule: forgetting" in str(model_card_of(path, data))

    keep = {"keep": {"name": "best_utility", "forgetting": float(level)}}
    run(experiment(data, methods=["uniform"], unlearning=LENGTH | keep), path)
    reached = [i for i in range(len(front.steps)) if front.forgetting[i] <= level]
    best = max(reached, key=lambda i: front.utilities[MEAN][i])
    assert result_of(path)["step"] == front.steps[best]
    assert not (path / "methods" / "uniform" / "checkpoints").exists()


def model_card_of(path, data):
    return model_card(experiment(data, methods=["uniform"]), path, "uniform")


def test_a_failure_is_told_in_the_report_and_on_the_card(data, trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "failed")
    reason = "loss is not finite at step 3"
    write_json(path / "methods/uniform/results.json", result_of(path) | {"stopped": reason, "failed": True})
    results = read_json(path / "results.json")
    results["methods"]["uniform"] |= {"stopped": reason, "failed": True}
    write_json(path / "results.json", results)
    write_report(path)
    assert f"failed: {reason}" in (path / "report.html").read_text()
    assert f"The run failed, and this is a state from before: {reason}." in str(model_card_of(path, data))
