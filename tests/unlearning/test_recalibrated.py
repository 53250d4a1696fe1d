"""Weights that are solved anew while a run goes on: in force at once, on disk, and the same after an interruption."""

import json

import numpy as np
import pytest

from tests.unlearning.conftest import ONE, weights_of
from trace_jax.io.files import read_lines
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.weights import Recalibration, RetainWeights
from trace_jax.unlearning.unlearn import recalibration

EVERY = {"name": "entropy", "rule": "all", "strength": 0.5, "ridge": 0.02}
EVERY["routing"] = {"name": "recalibrated", "every": 2}


def with_router(model, change):
    layers = {**model.params["layers"], "router": change(model.params["layers"]["router"])}
    return model.replace(params={**model.params, "layers": layers})


@pytest.fixture(scope="module")
def solve(model, forget, retain):
    return Recalibration(CalibrationConfig(EVERY), model, forget, retain, mesh=ONE)


@pytest.fixture(scope="module")
def first(model, forget, retain):
    return weights_of(model, forget, retain, **EVERY)


@pytest.fixture(scope="module")
def models(model):
    """The model after 2 and after 4 steps, as it were: with experts in another order."""
    return {2: with_router(model, lambda r: r[..., ::-1]), 4: with_router(model, lambda r: r[:, ::-1])}


def open_in(directory, solve, first, identity="a"):
    used = []
    about = {"directory": directory, "identity": identity, "title": "test"}
    return recalibration(solve, first, lambda model: model, used.append, **about), used


def same(one: RetainWeights, other: RetainWeights) -> bool:
    names = ("weights", "row_probability", "step_weights", "selected", "frequency")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_new_weights_are_used_and_written_and_the_drift_is_noted(tmp_path, solve, first, models, forget, retain):
    recalibrated, used = open_in(tmp_path, solve, first)
    for step, current in models.items():
        recalibrated.call(step, current)
        assert same(used[-1], weights_of(current, forget, retain, **EVERY))
        where = tmp_path / "recalibration" / f"step-{step:06d}"
        assert same(RetainWeights.load(where), used[-1])
        about = json.loads((where / "drift.json").read_text())
        line = read_lines(tmp_path / "metrics.jsonl")[-1]
        assert line["step"] == about["step"] == step and line["identity"] == about["identity"] == "a"
        assert {"step": step, "identity": "a", **line["recalibration"]} == about
        assert len(about["overlap"]["retain"]) == 2 and about["gap"]["after"] < about["gap"]["before"]
    assert not same(used[0], used[1])


def test_weights_of_another_run_or_none_are_not_gone_on_with(tmp_path, solve, first, models):
    open_in(tmp_path, solve, first, identity="other")[0].call(2, models[2])
    with pytest.raises(ValueError, match="step-000002: the weights that this run had solved for after step 2"):
        open_in(tmp_path, solve, first)[0].resumed(3)
    open_in(tmp_path, solve, first, identity="other")[0].call(4, models[4])
    open_in(tmp_path, solve, first)[0].call(2, models[2])
    assert [path.name for path in (tmp_path / "recalibration").iterdir()] == ["step-000002"]


def test_a_damaged_model_keeps_the_last_weights_and_says_so(tmp_path, solve, first, model, capsys):
    recalibrated, used = open_in(tmp_path, solve, first)
    recalibrated.call(2, with_router(model, lambda r: r * np.nan))
    assert used == [first]
    assert "NaN" in read_lines(tmp_path / "metrics.jsonl")[0]["recalibration"]["problem"]
    assert "The last weights are kept" in capsys.readouterr().err
    again, read = open_in(tmp_path, solve, first)
    again.resumed(3)
    assert same(read[0], first)
