"""`evaluate`: the configured tasks on any checkpoint, relative to others, once per checkpoint."""

import numpy as np
import pytest

import trace_jax.run.evaluate
from tests.evaluation.test_task import Counting
from tests.run.toy import save_checkpoint
from trace_jax.evaluation.intervals import Measurement
from trace_jax.io.files import read_json
from trace_jax.main import main


class Weights(Counting):
    """The sum of the embedding's weights, and by how much it differs from the original's."""

    def measure(self, scores, *, original, retrained, resamples, seed):
        values = [float(of.arrays["values"].mean()) for of in (scores, original)]
        measured = {"sum": values[0], "sum_against_original": values[0] - values[1]}
        return [Measurement(value, value, value, 3, name, "test") for name, value in measured.items()]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: save_checkpoint(tmp_path_factory.mktemp(name), seed=n) for n, name in enumerate(("olmoe", "other"))}


@pytest.fixture
def task(monkeypatch):
    task = Weights()
    monkeypatch.setattr(trace_jax.run.evaluate, "build_tasks", lambda config: (task,))
    return task


def evaluate(checkpoint, output, **references):
    more = [f"--{name}={where}" for name, where in references.items()]
    return main(
        ["evaluate", "--config", "configs/huggingface.py", "--config.model.dtype=float32", "--config.data.forget=x",
         "--config.data.retain=y", "--checkpoint", str(checkpoint), "--output", str(output), *more]
    )  # fmt: skip


def test_a_checkpoint_is_measured_against_others_and_once(task, checkpoints, tmp_path, capsys):
    output = tmp_path / "out"
    assert evaluate(checkpoints["other"], output, original=checkpoints["olmoe"]) == 0
    assert "sum_against_original" in capsys.readouterr().out
    results = read_json(output / "results.json")
    values = {model: {m["name"]: m["value"] for m in measured} for model, measured in results["measurements"].items()}
    assert values["original"]["sum_against_original"] == 0
    change = values["checkpoint"]["sum"] - values["original"]["sum"]
    assert values["checkpoint"]["sum_against_original"] == pytest.approx(change) and change != 0
    assert task.calls == 2
    assert evaluate(checkpoints["other"], output, original=checkpoints["olmoe"]) == 0
    assert task.calls == 2
    assert read_json(output / "results.json")["measurements"] == results["measurements"]
    assert evaluate(checkpoints["olmoe"], output, original=checkpoints["olmoe"]) == 0
    assert task.calls == 3  # the checkpoint is another, the original is not
    now = {m["name"]: m["value"] for m in read_json(output / "results.json")["measurements"]["checkpoint"]}
    np.testing.assert_allclose(now["sum"], values["original"]["sum"])


def test_what_cannot_be_evaluated_is_said(task, checkpoints, tmp_path, capsys, monkeypatch):
    assert evaluate(tmp_path / "nothing", tmp_path / "out") == 2
    assert "nothing" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert evaluate(checkpoints["olmoe"], tmp_path / "file") == 2
    assert "--output needs a directory" in capsys.readouterr().err
    monkeypatch.setattr(trace_jax.run.evaluate, "build_tasks", lambda config: ())
    assert evaluate(checkpoints["olmoe"], tmp_path / "out") == 2
    assert "names no task" in capsys.readouterr().err
