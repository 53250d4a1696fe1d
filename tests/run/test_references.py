"""Checkpoints against others: a run whose retrained twin is given, from MUSE's files to results, and `evaluate`."""

import shutil

import numpy as np
import pytest

import trace_jax.run.evaluate
from tests.evaluation.test_task import Counting
from tests.run.toy import SMALL, WORDS, measured, save_checkpoint
from tests.tiny import write_lines
from trace_jax.config import ConfigError
from trace_jax.evaluation.intervals import Measurement
from trace_jax.io.files import read_json, read_lines
from trace_jax.main import main
from trace_jax.run.experiment import load_config
from trace_jax.run.methods import run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The target, another of the same shape in the place of the retrained one, and one of another shape."""
    several = {"target": {}, "retrained": {"seed": 1}, "other": {"num_hidden_layers": 1}}
    return {name: save_checkpoint(tmp_path_factory.mktemp(name), **changes) for name, changes in several.items()}


@pytest.fixture(scope="module")
def muse(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("muse"), np.random.default_rng(1)

    def words(count):
        return " ".join(rng.choice(WORDS, count))

    for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"):
        asked = [{"question": words(3), "answer": words(1)} for _ in range(2)]
        write_lines(directory / "knowmem" / f"{name}.jsonl", asked)
    write_lines(directory / "verbmem/forget.jsonl", [{"prompt": words(5), "gt": words(9)} for _ in range(2)])
    for side in ("forget", "holdout"):
        write_lines(directory / "privleak" / f"{side}.jsonl", [{"text": words(10)} for _ in range(4)])
    return directory


@pytest.fixture
def config(checkpoints, muse, data):
    settings = {**SMALL, "model.path": str(checkpoints["target"]), "methods": ["uniform"], "export": None}
    settings |= {f"data.{name}": str(data / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    settings["evaluation.muse.data"] = str(muse)
    return lambda **changes: load_config("configs/huggingface.py", {**settings, **changes})


def test_a_retrained_model_makes_privleak_and_no_method_unlearns_again(config, checkpoints, tmp_path):
    path = tmp_path / "run"
    run(config(), path)
    before = measured(path, "uniform")
    assert before["muse_verbmem"]["n"] == 2 and before["muse_ou_verbmem"]["profile"] == "open_unlearning"
    assert not {"muse_privleak", "privleak"} & set(before)
    assert "no retrained model" in before["muse_privleak_auc"]["note"]
    unlearned = path / "methods" / "uniform" / "model.safetensors"
    made = unlearned.stat().st_mtime_ns

    run(config(**{"model.retrained": str(checkpoints["retrained"])}), path)
    after, reference = measured(path, "uniform"), measured(path, "retrained")
    auc, auc_retrained = (m["muse_privleak_auc"]["value"] for m in (after, reference))
    assert after["muse_privleak"]["value"] == pytest.approx((auc - auc_retrained) / auc_retrained * 100)
    assert reference["muse_privleak"]["value"] == reference["privleak"]["value"] == 0.0
    assert "privleak" in after and after["muse_verbmem"] == before["muse_verbmem"]
    assert unlearned.stat().st_mtime_ns == made
    items = read_lines(path / "methods" / "uniform" / "scores" / "muse.ou_verbmem.jsonl")
    assert np.mean([item["rouge_l"] for item in items]) == pytest.approx(after["muse_ou_verbmem"]["value"])

    shutil.copytree(checkpoints["target"], tmp_path / "same")
    run(config(**{"model.retrained": str(tmp_path / "same")}), path)
    again = measured(path, "retrained")["muse_privleak_auc"]["value"]
    assert again == measured(path, "target")["muse_privleak_auc"]["value"] != auc_retrained


def test_another_shape_is_refused_before_anything_is_written(config, checkpoints, tmp_path):
    with pytest.raises(ConfigError, match=r"\(model\.retrained\) is another model than .*num_layers is 1, expected 2"):
        run(config(**{"model.retrained": str(checkpoints["other"])}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Weights(Counting):
    """The sum of the embedding's weights, and by how much it differs from the original's."""

    def measure(self, scores, *, original, retrained, resamples, seed):
        values = [float(of.arrays["values"].mean()) for of in (scores, original)]
        measured = {"sum": values[0], "sum_against_original": values[0] - values[1]}
        return [Measurement(value, value, value, 3, name, "test") for name, value in measured.items()]


@pytest.fixture
def task(monkeypatch):
    task = Weights()
    monkeypatch.setattr(trace_jax.run.evaluate, "build_tasks", lambda config: (task,))
    return task


def evaluate(checkpoint, output, **references):
    given = {"config": "configs/huggingface.py", "config.model.dtype": "float32", "config.data.forget": "x"}
    given |= {"config.data.retain": "y", "checkpoint": checkpoint, "output": output, **references}
    return main(["evaluate", *(f"--{name}={value}" for name, value in given.items())])


def test_a_checkpoint_is_measured_against_others_and_once(task, checkpoints, tmp_path, capsys):
    output = tmp_path / "out"
    assert evaluate(checkpoints["retrained"], output, original=checkpoints["target"]) == 0
    assert "sum_against_original" in capsys.readouterr().out
    results = read_json(output / "results.json")
    values = {model: {m["name"]: m["value"] for m in measured} for model, measured in results["measurements"].items()}
    assert values["original"]["sum_against_original"] == 0
    change = values["checkpoint"]["sum"] - values["original"]["sum"]
    assert values["checkpoint"]["sum_against_original"] == pytest.approx(change) and change != 0
    assert task.calls == 2
    assert evaluate(checkpoints["retrained"], output, original=checkpoints["target"]) == 0
    assert task.calls == 2
    assert read_json(output / "results.json")["measurements"] == results["measurements"]
    config = load_config({"name": "mine", "data": {"benchmark": "handbook"}, "model": {"dtype": "float32"}})
    alone = trace_jax.evaluate(checkpoints["retrained"], config, original=checkpoints["target"])
    assert repr(alone) == "Evaluation(2 of original, 2 of checkpoint)"
    frame = alone.metrics().set_index(["method", "split", "name"]).value.sort_index()
    assert frame["checkpoint", "test"].to_dict() == values["checkpoint"] and task.calls == 4
    assert evaluate(checkpoints["target"], output, original=checkpoints["target"]) == 0
    assert task.calls == 5  # the checkpoint is another, the original is not
    now = {m["name"]: m["value"] for m in read_json(output / "results.json")["measurements"]["checkpoint"]}
    np.testing.assert_allclose(now["sum"], values["original"]["sum"])


def test_what_cannot_be_evaluated_is_said(task, checkpoints, tmp_path, capsys, monkeypatch):
    assert evaluate(tmp_path / "nothing", tmp_path / "out") == 2
    assert "nothing" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert evaluate(checkpoints["target"], tmp_path / "file") == 2
    assert "--output needs a directory" in capsys.readouterr().err
    monkeypatch.setattr(trace_jax.run.evaluate, "build_tasks", lambda config: ())
    assert evaluate(checkpoints["target"], tmp_path / "out") == 2
    assert "names no task" in capsys.readouterr().err
