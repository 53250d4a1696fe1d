"""Series of forget sets: each step starts where it should, and the scores stand together."""

import shutil

import pytest

from tests.run.toy import experiment, measured
from tests.tiny import write_lines
from trace_jax.config import ConfigError, as_dict, resolve
from trace_jax.data.sources import DataError
from trace_jax.io.files import read_json, read_lines
from trace_jax.main import main
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.result import open_run
from trace_jax.run.series import run_series


@pytest.fixture(scope="module")
def parts(data):
    """The forget set in two folds, and as sets that grow."""
    rows = read_lines(data / "forget.jsonl")
    sets = {"fold-1": rows[:6], "fold-2": rows[6:], "all": rows}
    return {name: write_lines(data / f"{name}.jsonl", part) for name, part in sets.items()}


def settings(data, forget, **changes):
    return experiment(data, methods=["uniform"], series={"kind": "sustainability", "forget": forget}, **changes)


@pytest.fixture(scope="module")
def in_sequence(data, parts, tmp_path_factory):
    """A model that is trained here unlearns one fold after the other."""
    path = tmp_path_factory.mktemp("series") / "run"
    config = settings(data, [parts["fold-1"], parts["fold-2"]], target={"retrained": True})
    return config, path, run_series(config, path)


def general_nll(directory, method="uniform"):
    """(at the start, at the end) of a step."""
    return [measured(directory, model)["general_nll"]["value"] for model in ("target", method)]


def test_every_step_of_a_sequence_starts_where_the_one_before_ended(in_sequence, parts):
    _, path, _ = in_sequence
    first, second = (path / "uniform" / f"step-{n}" for n in (1, 2))
    trained = {m["name"]: m["value"] for m in read_json(path / "target/references.json")["measurements"]["target"]}
    (start, after_first), (before_second, end) = map(general_nll, (first, second))
    assert start == pytest.approx(trained["general_nll"], rel=1e-6)
    assert before_second == pytest.approx(after_first, rel=1e-6)
    assert len({start, after_first, end}) == 3
    configs = [read_json(step / "config.json")["config"] for step in (first, second)]
    assert [c["data"]["forget"] for c in configs] == [parts["fold-1"], parts["fold-2"]]
    assert configs[1]["model"]["path"] == str(first / "export") and (second / "export").is_dir()
    references = [measured(step, "retrained")["general_nll"] for step in (first, second)]
    assert references[0] == references[1], "the retrained model is the same in every step"


def test_scores_of_all_steps_stand_in_one_table(in_sequence):
    _, path, text = in_sequence
    series = read_json(path / "series.json")
    assert series["table"] in text
    assert [step["directory"] for step in series["steps"]] == ["uniform/step-1", "uniform/step-2"]
    (line,) = (line for line in text.split("\n") if line.startswith("general nll"))
    values = [general_nll(path / f"uniform/step-{n}") for n in (1, 2)]
    assert line.split()[2:] == ["uniform", *(f"{x:.3f}" for x in (values[0][0], values[0][1], values[1][1]))]
    assert "utility" not in text and "probability ratio" not in text, "they are relative to each step's own start"
    page = (path / "report.html").read_text()
    assert "Step by step" in page and page.count("after each step, one line per method") > 3


def test_what_is_left_of_its_checkpoints_is_made_anew(in_sequence):
    config, path, text = in_sequence
    kept = {}
    for directory in (path / "target" / "target-checkpoint", path / "uniform" / "step-1" / "export"):
        kept[directory] = (directory / "config.json").read_bytes(), (directory / "model.safetensors").read_bytes()
        (directory / "config.json").unlink()
    assert run_series(config, path) == text
    for directory, before in kept.items():
        assert ((directory / "config.json").read_bytes(), (directory / "model.safetensors").read_bytes()) == before


def test_a_series_is_opened_with_the_runs_of_its_steps(in_sequence):
    path = in_sequence[1]
    series = open_run(path)
    assert series.methods == ("uniform/step-1/uniform", "uniform/step-2/uniform") and series.table() in in_sequence[2]
    frame = series.metrics().set_index(["variant", "method", "step", "split", "name"]).value.sort_index()
    for number in (1, 2):
        values = [
            frame[f"uniform/step-{number}", m, s, "test", "general_nll"] for m, s in (("target", 0), ("uniform", 6))
        ]
        assert values == general_nll(path / f"uniform/step-{number}")


def test_a_series_continues_with_the_step_that_is_missing(in_sequence):
    config, path, text = in_sequence
    written = {file: file.stat().st_mtime_ns for file in path.rglob("model.safetensors") if "step-2" not in str(file)}
    before = general_nll(path / "uniform/step-2")
    shutil.rmtree(path / "uniform" / "step-2")
    assert run_series(config, path) == text
    assert written == {file: file.stat().st_mtime_ns for file in written}
    assert general_nll(path / "uniform/step-2") == before


def test_growing_sets_are_each_unlearned_from_the_target(in_sequence, data, parts, tmp_path):
    """By the command line, from a checkpoint, with two methods in every run."""
    config, path, _ = in_sequence
    model = {"path": str(path / "target" / "target-checkpoint"), "dtype": "float32"}
    series = {"kind": "scalability", "forget": [parts["fold-1"], parts["all"]]}
    values = as_dict(config) | {"methods": ["uniform", "trace_rows"], "model": model, "target": None, "series": series}
    values["data"]["vocab_size"] = None
    file = tmp_path / "config.py"
    file.write_text(f"def get_config():\n    return {values!r}\n")
    assert main(["series", "--config", str(file), "--workdir", str(tmp_path / "run")]) == 0
    first, second = (tmp_path / "run" / f"step-{n}" for n in (1, 2))
    for method in ("uniform", "trace_rows"):
        (one, after_one), (two, after_two) = (general_nll(step, method) for step in (first, second))
        assert one == two and after_one != after_two
    counts = [read_json(step / "references.json")["data"]["documents"]["train/forget"] for step in (first, second)]
    assert counts == [6, 12] and not (second / "export").exists()
    assert read_json(tmp_path / "run/series.json")["kind"] == "scalability"


def test_what_is_no_series_is_refused_before_anything_is_written(data, parts, tmp_path):
    with pytest.raises(ConfigError, match=r"has no series: set --config\.series\.kind=scalability"):
        run_series(experiment(data), tmp_path / "run")
    with pytest.raises(DataError, match="no such file"):
        run_series(settings(data, [parts["fold-1"], str(tmp_path / "none.jsonl")]), tmp_path / "run")
    with pytest.raises(ConfigError, match="forget is an empty list"):
        settings(data, [])
    series = {"kind": "scalability", "forget": [parts["fold-1"]]}
    handbook = resolve(ExperimentConfig, {"name": "toy", "series": series})
    with pytest.raises(ConfigError, match="not handbook"):
        run_series(handbook, tmp_path / "run")
    assert not (tmp_path / "run").exists()
