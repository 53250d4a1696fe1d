"""Weights that are solved anew while a run goes on: in force at once, on disk, and the same after an interruption."""

import json

import numpy as np
import pytest

from trace_jax.data.batches import sequential_batches
from trace_jax.io.files import read_lines
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import expert_statistics
from trace_jax.routing.weights import Recalibration, RetainWeights, retain_weights
from trace_jax.unlearning.unlearn import Recalibrated

EVERY = CalibrationConfig(
    {"name": "entropy", "rule": "all", "strength": 0.5, "routing": {"name": "recalibrated", "every": 2}}
)


def weights_of(model, forget, retain, config=EVERY):
    statistics = [expert_statistics(model, sequential_batches(rows, 8), min_activations=1) for rows in (forget, retain)]
    return retain_weights(
        config, model=model, forget=forget, retain=retain,
        forget_statistics=statistics[0], retain_statistics=statistics[1],
    )  # fmt: skip


def with_router(model, change):
    layers = {**model.params["layers"], "router": change(model.params["layers"]["router"])}
    return model.replace(params={**model.params, "layers": layers})


@pytest.fixture(scope="module")
def solve(model, forget, retain):
    return Recalibration(EVERY, model, forget, retain)


@pytest.fixture(scope="module")
def first(model, forget, retain):
    return weights_of(model, forget, retain)


@pytest.fixture(scope="module")
def models(model):
    """The model after 2 and after 4 steps, as it were: with experts in another order."""
    return {2: with_router(model, lambda r: r[..., ::-1]), 4: with_router(model, lambda r: r[:, ::-1])}


def open_in(directory, solve, first, identity="a"):
    used = []
    return Recalibrated(solve, first, used.append, directory=directory, identity=identity, title="test"), used


def same(one: RetainWeights, other: RetainWeights) -> bool:
    names = ("weights", "row_probability", "loss_weights", "selected", "frequency")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_new_weights_are_used_and_written_and_the_drift_is_noted(tmp_path, solve, first, models, forget, retain):
    recalibrated, used = open_in(tmp_path, solve, first)
    for step, current in models.items():
        recalibrated.refresh(step, current)
        assert same(used[-1], weights_of(current, forget, retain))
        where = tmp_path / "recalibration" / f"step-{step:06d}"
        assert same(RetainWeights.load(where), used[-1])
        about = json.loads((where / "drift.json").read_text())
        line = read_lines(tmp_path / "metrics.jsonl")[-1]
        assert line["step"] == about["step"] == step and line["identity"] == about["identity"] == "a"
        assert {"step": step, "identity": "a", **line["recalibration"]} == about
        assert len(about["overlap"]["retain"]) == 2 and about["gap"]["after"] < about["gap"]["before"]
    assert not same(used[0], used[1])


def test_a_continued_run_has_the_weights_of_its_last_step(tmp_path, solve, first, models):
    recalibrated, used = open_in(tmp_path, solve, first)
    for step, current in models.items():
        recalibrated.refresh(step, current)
    for done, expected in ((1, first), (2, first), (3, used[0]), (4, used[0]), (5, used[1])):
        again, read = open_in(tmp_path, solve, first)
        again.resumed(done)
        assert len(read) == 1 and same(read[0], expected)


def test_continuing_at_a_recalibration_repeats_it_and_its_line_is_written_once(tmp_path, solve, first, models):
    recalibrated, used = open_in(tmp_path, solve, first)
    for step, current in models.items():
        recalibrated.refresh(step, current)
    drift = (tmp_path / "recalibration" / "step-000004" / "drift.json").read_bytes()
    again, read = open_in(tmp_path, solve, first)
    again.resumed(4)
    again.refresh(4, models[4])
    assert same(read[-1], used[-1])
    assert (tmp_path / "recalibration" / "step-000004" / "drift.json").read_bytes() == drift
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [2, 4]


def test_weights_of_another_run_or_none_are_not_gone_on_with(tmp_path, solve, first, models):
    open_in(tmp_path, solve, first, identity="other")[0].refresh(2, models[2])
    with pytest.raises(ValueError, match="step-000002: the weights that this run had solved for after step 2"):
        open_in(tmp_path, solve, first)[0].resumed(3)
    open_in(tmp_path, solve, first, identity="other")[0].refresh(4, models[4])
    open_in(tmp_path, solve, first)[0].refresh(2, models[2])
    assert [path.name for path in (tmp_path / "recalibration").iterdir()] == ["step-000002"]


def test_a_damaged_model_keeps_the_last_weights_and_says_so(tmp_path, solve, first, model, capsys):
    recalibrated, used = open_in(tmp_path, solve, first)
    recalibrated.refresh(2, with_router(model, lambda r: r * np.nan))
    assert used == [first]
    assert "NaN" in read_lines(tmp_path / "metrics.jsonl")[0]["recalibration"]["problem"]
    assert "The last weights are kept" in capsys.readouterr().err
    again, read = open_in(tmp_path, solve, first)
    again.resumed(3)
    assert same(read[0], first)
