"""A run directory belongs to one corpus and model; a stage is kept exactly as long as its settings stay."""

import pytest

from trace_jax.config import ConfigError, resolve
from trace_jax.experiment import ExperimentConfig
from trace_jax.files import read_json, write_json
from trace_jax.stages import Stage, open_workdir


def experiment(**values):
    return resolve(ExperimentConfig, {"name": "x", **values})


def test_a_workdir_is_reopened_by_the_same_corpus_and_model(tmp_path):
    open_workdir(experiment(), tmp_path / "run")
    open_workdir(experiment(unlearning={"steps": 5}), tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json")["config"]["unlearning"]["steps"] == 5


def test_a_workdir_of_another_configuration_is_refused_and_untouched(tmp_path):
    open_workdir(experiment(), tmp_path / "run")
    write_json(tmp_path / "run" / "results.json", {})
    other = experiment(model={"num_layers": 3})
    with pytest.raises(ConfigError, match=r"another configuration \(model.num_layers 2 -> 3\).*--overwrite"):
        open_workdir(other, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").exists()
    open_workdir(other, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_directory_that_is_no_run_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds no run"):
            open_workdir(experiment(), tmp_path, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file"):
        open_workdir(experiment(), tmp_path / "thesis.txt")


def test_a_full_disk_is_said_before_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("trace_jax.stages.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5 << 20}))
    with pytest.raises(ConfigError, match="only 5 MiB are free"):
        open_workdir(experiment(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_runs_once_and_again_only_when_its_settings_change(tmp_path):
    calls = []
    for identity in ("a", "a", "b", "b"):
        stage = Stage("count", tmp_path, identity)
        stage.run(lambda identity=identity: calls.append(identity), lambda: None, "counting")
    assert calls == ["a", "b"]


def test_a_stage_that_failed_is_not_done(tmp_path):
    stage = Stage("count", tmp_path, "a")
    with pytest.raises(ZeroDivisionError):
        stage.run(lambda: 1 / 0, lambda: None, "counting")
    assert not stage.done()
