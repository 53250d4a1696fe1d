"""What the weights of retain tokens do in a run: they count tokens, follow the model's routing, or are solved anew.

Weights that are solved anew are in force at once, on disk, and the same after an interruption.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import tiny
from tests.unlearning.conftest import CONFIG, ONE, Stop, assert_same, flat_of, run, solver_of, weights_of
from tests.unlearning.test_step import gradient_of_step
from trace_jax.config import ConfigError, resolve
from trace_jax.data.rows import Rows
from trace_jax.io.files import encode
from trace_jax.parallel.mesh import PLAIN, ParallelConfig, make_mesh
from trace_jax.routing.weights import RetainWeights
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.unlearn import recalibration

ROWS = 48  # retain rows of every step, most of them empty in some: one program


def gradient(model, forget, retain, weights, *, config=CONFIG, away=0.02, **options):
    """`gradient_of_step` on all rows."""
    retained = pad_rows((retain.batch(np.arange(len(retain))), np.asarray(weights, np.float32)), ROWS)
    rows = StepRows(forget.batch(np.arange(len(forget))), *retained, topic=np.zeros(len(forget), np.int32))
    return gradient_of_step(dataclasses.replace(config, clip_norm=0.0), model, rows, away=away, **options)


def assert_close(one, other, rtol=1e-5):
    assert one[0]["retain_loss"] == pytest.approx(other[0]["retain_loss"], rel=rtol)
    for path, wanted in other[1].items():
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(one[1][path], wanted, atol=2e-5 * max(scale, 0.1), err_msg=path)


@pytest.mark.parametrize("unit", ["row", "token"])
def test_integer_weights_are_copies_of_tokens(model, forget, retain, unit):
    """A token of weight 3 is three tokens: the row once for each, valid where there is one more copy to count."""
    rng = np.random.default_rng(4)
    copies = rng.integers(0, 4, (len(retain), 1) if unit == "row" else retain.valid.shape)
    copies = np.where(retain.valid, copies, 0)
    weights = copies * (retain.valid.sum() / copies.sum())  # mean one
    duplicated = Rows.concatenate([dataclasses.replace(retain, valid=copies > number) for number in range(3)])
    assert duplicated.valid.sum() == copies.sum() != retain.valid.sum()
    weighted = gradient(model, forget, retain, weights)
    assert_close(weighted, gradient(model, forget, duplicated, duplicated.valid))
    plain = gradient(model, forget, retain, retain.valid)
    assert plain[0]["retain_loss"] != pytest.approx(weighted[0]["retain_loss"], rel=1e-3)


NLL = dataclasses.replace(CONFIG, retain_loss="nll")
TENSORS = make_mesh(jax.devices()[:4], data=1, expert=2, tensor=2), ParallelConfig(microbatches=2, remat="layer")


@pytest.mark.parametrize(
    ("unit", "apply", "where"),
    [("token", "both", (ONE, PLAIN)), ("row", "weights", (ONE, PLAIN)), ("row", "both", TENSORS)],
    ids=["token", "row", "tensors"],
)
def test_online_weights_are_the_offline_ones_before_the_first_step(model, forget, retain, unit, apply, where):
    mesh, parallel = where
    how = {"unit": unit, "apply": apply}
    offline, online = (weights_of(model, forget, retain, routing=name, **how) for name in ("offline", "online"))
    options = {"config": NLL, "away": 0.0, "mesh": mesh, "parallel": parallel}
    on = gradient(model, forget, retain, online.step_weights, online=online.step_calibration, **options)
    assert_close(on, gradient(model, forget, retain, offline.step_weights, **options))
    # All rows at once: 1 also for "both", where the weights of a row are divided by their mean, but for rows that
    # have no weight and are never drawn.
    mean = offline.step_weights.sum() / retain.valid.sum()
    assert on[0]["weight_mean"] == pytest.approx(mean, rel=1e-5) and (apply == "both" or mean == pytest.approx(1.0))


def test_online_weights_see_all_layers_also_where_the_losses_do_not(model, forget, retain):
    """RMU and `hidden` look at layer 1; the routing of layer 2 weighs the tokens all the same."""
    rmu = {"name": "rmu", "layer": 1}
    config = UnlearningConfig(objective=rmu, steps=6, retain_loss="hidden", alpha=1.0, trainable="all")
    online = weights_of(model, forget, retain, apply="weights", routing="online")
    assert online.calibration.multipliers[1].any()
    options = {"config": config, "online": online.step_calibration, "away": 0.0}
    metrics, _ = gradient(model, forget, retain, online.step_weights, **options)
    assert metrics["weight_mean"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("routing", "apply", "unit"),
    [("offline", "both", "token"), ("offline", "sampling", "row"), ("online", "weights", "token"),
     ("recalibrated", "both", "token")],
)  # fmt: skip
def test_weights_of_one_train_bit_identically_to_no_weights(model, retain, routing, apply, unit):
    """Forget and retain text are the same: under any routing every weight is exactly one, and TRACE plain GradDiff."""
    settings = {"apply": apply, "unit": unit}
    solve = solver_of(model, retain, retain, 2, **settings) if routing == "recalibrated" else None
    weights = weights_of(model, retain, retain, routing=routing, **settings)
    assert (weights.weights == retain.valid).all()
    plain = run(model, retain, retain)
    assert_same(run(model, retain, retain, weights=weights, recalibrate=solve).model.params, plain.model.params)


def test_online_training_reports_how_the_mean_weight_drifts(model, forget, retain, tmp_path):
    online = weights_of(model, forget, retain, apply="weights", routing="online")
    run(model, forget, retain, weights=online, directory=tmp_path)
    means = [row["weight_mean"] for row in tiny.history(tmp_path)]
    assert len(set(means)) == 6 and all(0.2 < mean < 5 for mean in means)


@pytest.mark.parametrize(("trainable", "stop"), [("all", 3), ("all", 5), ("selected_experts", 7)])
def test_an_interrupted_run_that_recalibrates_equals_the_uninterrupted_one(
    model, forget, retain, tmp_path, capsys, stop, trainable
):
    """Saved every 2 steps and recalibrated every 3: it goes on before, at and after recalibrations."""
    rule = {"name": "difference", "top": 2}
    weights, solve = weights_of(model, forget, retain, rule=rule), solver_of(model, forget, retain, 3, rule=rule)
    config = dataclasses.replace(CONFIG, steps=8, evaluate_every=1, checkpoint_every=2, trainable=trainable)
    options = {"config": config, "weights": weights, "identity": "a"}

    def runs(name, until=None, recalibrate=solve):
        calls = iter(range(100))

        def evaluate(_):
            if until is not None and next(calls) == until:
                raise Stop
            return []

        directory = tmp_path / name
        return run(model, forget, retain, recalibrate=recalibrate, directory=directory, evaluate=evaluate, **options)

    whole = runs("whole")
    with pytest.raises(Stop):
        runs("cut", stop)
    assert_same(runs("cut").model.params, whole.model.params)
    assert f"continuing after step {(stop - 1) // 2 * 2} of 8" in capsys.readouterr().err
    assert tiny.history(tmp_path / "cut") == tiny.history(tmp_path / "whole")
    recalibrations = [row for row in tiny.history(tmp_path / "whole") if row["kind"] == "recalibration"]
    assert len(recalibrations) == 2 and min(recalibrations[1]["overlap"]["retain"]) < 1
    for step in (3, 6):
        name = f"recalibration/step-{step:06d}/drift.json"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    experts, before = "layers/experts/down", flat_of(model)
    if trainable == "selected_experts":  # those of step 0, although others are selected later
        changed = (before[experts] != flat_of(whole.model)[experts]).any(axis=(2, 3))
        assert (changed == weights.selected).all() and recalibrations[1]["selected_overlap"] <= 1
    without = flat_of(runs("without", recalibrate=None).model)
    assert (without[experts] != flat_of(whole.model)[experts]).any()


def test_a_finished_run_is_not_taken_for_one_that_recalibrates(model, forget, retain, tmp_path):
    options = {"weights": weights_of(model, forget, retain), "directory": tmp_path}
    run(model, forget, retain, **options)
    run(model, forget, retain, recalibrate=solver_of(model, forget, retain, 4), **options)
    assert [row["step"] for row in tiny.history(tmp_path) if row["kind"] == "recalibration"] == [4]


def test_what_can_not_be_weighed_is_refused(model, forget, retain):
    batch = dataclasses.replace(CONFIG, normalize="batch")
    online = weights_of(model, forget, retain, routing="online")
    with pytest.raises(ConfigError, match="normalize is 'batch', and routing 'online'"):
        run(model, forget, retain, config=batch, weights=online)
    with pytest.raises(ConfigError, match="normalize is 'batch', and routing 'online'"):
        unlearning = {"normalize": "batch"}
        resolve(ExperimentConfig, {"name": "x", "calibration": {"routing": "online"}, "unlearning": unlearning})
    with pytest.raises(ConfigError, match="recalibrate is given without weights"):
        run(model, forget, retain, recalibrate=solver_of(model, forget, retain, 20))


# --- solved anew


@pytest.fixture(scope="module")
def solve(model, forget, retain):
    return solver_of(model, forget, retain, 2)


@pytest.fixture(scope="module")
def first(model, forget, retain):
    return weights_of(model, forget, retain)


@pytest.fixture(scope="module")
def models(model):
    """The model after 2 and after 4 steps, as it were: with experts in another order."""
    return {2: tiny.with_router(model, lambda r: r[..., ::-1]), 4: tiny.with_router(model, lambda r: r[:, ::-1])}


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
        drift = encode(recalibrated.call(step, current))
        assert same(used[-1], weights_of(current, forget, retain))
        where = tmp_path / "recalibration" / f"step-{step:06d}"
        assert same(RetainWeights.load(where), used[-1])
        about = json.loads((where / "drift.json").read_text())
        assert about == {"step": step, "identity": "a", **drift}
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
    noted = recalibrated.call(2, tiny.with_router(model, lambda r: r * np.nan))
    assert used == [first] and "NaN" in noted["problem"]
    assert "The last weights are kept" in capsys.readouterr().err
    again, read = open_in(tmp_path, solve, first)
    again.resumed(3)
    assert same(read[0], first)
