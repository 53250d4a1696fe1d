"""A finished run in Python gives what its directory holds, and no number another time."""

import shutil

import numpy as np
import pytest

from tests.run.toy import experiment, measured
from trace_jax.config import ConfigError
from trace_jax.io.files import read_json, write_json
from trace_jax.main import main
from trace_jax.models.architecture import flatten
from trace_jax.run.result import open_run
from trace_jax.run.table import table


def test_every_measurement_is_one_row_of_the_frame(finished):
    path, done = finished
    frame = done.metrics().set_index(["method", "step", "split", "name"]).sort_index()
    assert frame.index.is_unique and frame.columns.tolist() == ["value", "low", "high", "n"]
    for method, step in (("target", 0), ("uniform", 6), ("trace_rows", 6)):
        rows = frame.loc[method, step, "test"]
        assert {name: (m["value"], m["n"]) for name, m in measured(path, method).items()} == {
            name: (row.value, row.n) for name, row in rows.iterrows()
        }
    front = read_json(path / "results.json")["methods"]["trace_rows"]["fronts"]["test"]
    ends = done.metrics(final=True).set_index(["method", "step", "split", "name"])
    assert ends.equals(frame.loc[ends.index]) and set(ends.loc["uniform"].index.get_level_values("step")) == {6}
    assert len(ends) == len(frame) - 4 * len(frame.loc["uniform", 0])
    along = frame.loc["trace_rows", :, "test", "forget_probability_ratio"]
    assert along.index.tolist() == front["steps"] == [0, 3, 6] and along.value.tolist() == front["forgetting"]


def test_it_is_opened_from_its_directory_and_shows_itself(data, finished):
    path, done = finished
    opened = open_run(str(path))
    assert str(opened) == str(done) and opened.config == experiment(data)
    assert repr(opened) == f"Run({path}: uniform, trace_rows)"
    page = opened._repr_html_()
    assert page.count("<tr") == 4 and "<td>trace_rows</td>" in page and str(opened.report) in page
    assert opened.history("uniform").step.tolist() == [1, 2, 3, 4, 5, 6]
    assert (opened.history("uniform").loss != opened.history("trace_rows").loss).any()


def test_tables_for_papers_and_spreadsheets_hold_the_numbers_of_the_run(finished, capsys):
    path, done = finished
    first = read_json(path / "results.json")["equal_forgetting"][0]
    utility = first["rows"][-1]["intervals"]["mean_utility"]
    text = f"{utility['value']:.3f} [{utility['low']:.3f}, {utility['high']:.3f}]"
    lines = table([path]).splitlines()
    assert lines[0].startswith("| method |") and lines[3].startswith("| trace_rows |") and text in lines[3]
    assert main(["table", "--workdir", str(path), str(path), "--format", "latex"]) == 0
    written = capsys.readouterr().out
    assert text in written and written.count("trace\\_rows &") == 2 and written.startswith("\\begin{tabular}")
    assert len(table([path], "csv").splitlines()) == 1 + len(done.metrics(final=True))


def test_models_and_weights_are_those_of_the_method(finished):
    done = finished[1]
    target, unlearned = (flatten(done.model(label).params) for label in ("target", "trace_rows"))
    assert not np.array_equal(target["layers/experts/down"], unlearned["layers/experts/down"])
    weights, same = done.calibration("trace_rows"), done.calibration("uniform")
    assert weights.apply == "sampling" and weights.calibration is not None and weights.tokens.std() > 0.1
    assert (same.apply, same.calibration) == ("weights", None) and (same.tokens == 1).all()
    with pytest.raises(
        ConfigError, match=r"there is no method 'trace_row'; did you mean 'trace_rows'\? It has uniform, "
    ):
        done.model("trace_row")
    with pytest.raises(ConfigError, match="name one of its methods"):
        done.history()


def test_what_an_earlier_version_spelled_otherwise_is_refused_and_all_else_is_read(finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    saved = read_json(path / "config.json")
    saved["config"]["unlearning"] = {"beta": 0.1}
    write_json(path / "config.json", saved)
    with pytest.raises(ValueError, match=r"config\.json is not as it was written"):
        open_run(path)
    (path / "results.stage.json").unlink()  # as if it had always said so
    opened = open_run(path)
    assert opened.metrics().equals(finished[1].metrics()) and opened.model("uniform").tokenizer is not None
    with pytest.raises(
        ConfigError, match=r"config\.json: an earlier version spelled its settings otherwise \(unlearning"
    ):
        _ = opened.config
    with pytest.raises(ConfigError, match=r"is no run \(it has no config.json\)"):
        open_run(tmp_path)
    results = read_json(path / "results.json")
    for row in results["equal_forgetting"][0]["rows"][1:]:
        row["reached"] = False
    results["equal_forgetting"][0]["best"] = None
    write_json(path / "results.json", results)
    assert "Not reached: no method came down to forget probability ratio 0.99 (lowest: " in str(open_run(path))
    (path / "results.json").unlink()
    with pytest.raises(ConfigError, match="the run is not finished"):
        open_run(path)
