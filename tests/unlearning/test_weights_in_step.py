"""What the weights of retain tokens do in a step: they count tokens, and online they follow the model's routing."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.unlearning.conftest import CONFIG, ONE, Stop, assert_same, flat_of, weights_of
from trace_jax.config import ConfigError, resolve
from trace_jax.data.rows import Rows
from trace_jax.io.files import read_lines
from trace_jax.models.architecture import flatten
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, make_mesh, place, to_host
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.weights import Recalibration
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants, coefficients
from trace_jax.unlearning.step import initial_state, unlearning_settings, unlearning_step
from trace_jax.unlearning.unlearn import unlearn

ROWS = 48  # retain rows of every step, most of them empty in some: one program


def gradient(model, forget, retain, weights, *, config=CONFIG, mesh=ONE, online=None, parallel=PLAIN, away=0.02):
    """(gradient by path, metrics) of one step on all rows, a little `away` from the original model."""
    settings = unlearning_settings(dataclasses.replace(config, clip_norm=0.0), model.config, parallel)
    training = flatten(placed_params(model.params, model.config, mesh))
    numbers, online = place((coefficients(config), online), mesh)
    target = place(np.ones((1, 16), np.float32), mesh) if config.objective.name == "rmu" else None
    constants = Constants(training, None, None, numbers, target, online=online)
    keys = jax.random.split(jax.random.key(7), len(training))
    moved = {
        path: leaf + np.float32(away) * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, training.items(), strict=True)
    }
    state = initial_state(moved, settings, mesh)
    retained = pad_rows((retain.batch(np.arange(len(retain))), np.asarray(weights, np.float32)), ROWS)
    rows = StepRows(forget.batch(np.arange(len(forget))), *retained, topic=np.zeros(len(forget), np.int32))
    state, metrics = unlearning_step(state, constants, place(rows, mesh, P(BATCH_AXES)), settings=settings, mesh=mesh)
    first_moment = next(s for s in state.optimizer if hasattr(s, "mu")).mu
    return {path: m / np.float32(0.1) for path, m in to_host(first_moment).items()}, to_host(metrics)


def assert_close(one, other, rtol=1e-5):
    assert float(one[1]["retain_loss"]) == pytest.approx(float(other[1]["retain_loss"]), rel=rtol)
    for path, wanted in other[0].items():
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(one[0][path], wanted, atol=2e-5 * max(scale, 0.1), err_msg=path)


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
    assert float(plain[1]["retain_loss"]) != pytest.approx(float(weighted[1]["retain_loss"]), rel=1e-3)


NLL = dataclasses.replace(CONFIG, retain_loss="nll")
TENSORS = make_mesh(jax.devices()[:4], data=1, expert=2, tensor=2), ParallelConfig(microbatches=2, remat="layer")


@pytest.mark.parametrize(
    ("unit", "apply", "where"),
    [("token", "both", (ONE, PLAIN)), ("row", "weights", (ONE, PLAIN)), ("row", "both", TENSORS)],
    ids=["token", "row", "tensors"],
)
def test_online_weights_are_the_offline_ones_before_the_first_step(model, forget, retain, unit, apply, where):
    mesh, parallel = where
    offline, online = (
        weights_of(model, forget, retain, unit=unit, apply=apply, routing=routing) for routing in ("offline", "online")
    )
    options = {"config": NLL, "away": 0.0, "mesh": mesh, "parallel": parallel}
    on = gradient(model, forget, retain, online.step_weights, online=online.step_calibration, **options)
    assert_close(on, gradient(model, forget, retain, offline.step_weights, **options))
    # All rows at once: 1 also for "both", where the weights of a row are divided by their mean.
    assert float(on[1]["weight_mean"]) == pytest.approx(1.0, rel=1e-5)


def test_online_weights_see_all_layers_also_where_the_losses_do_not(model, forget, retain):
    """RMU and `hidden` look at layer 1; the routing of layer 2 weighs the tokens all the same."""
    rmu = {"name": "rmu", "layer": 1}
    config = UnlearningConfig(objective=rmu, steps=6, retain_loss="hidden", alpha=1.0, trainable="all")
    online = weights_of(model, forget, retain, apply="weights", routing="online")
    assert online.calibration.multipliers[1].any()
    _, metrics = gradient(
        model, forget, retain, online.step_weights, config=config, online=online.step_calibration, away=0.0
    )
    assert float(metrics["weight_mean"]) == pytest.approx(1.0, rel=1e-5)


def run(model, forget, retain, **options):
    return unlearn(model, forget, retain, mesh=ONE, **{"config": CONFIG, **options})


@pytest.mark.parametrize(
    ("routing", "apply", "unit"),
    [("offline", "both", "token"), ("offline", "weights", "row"), ("online", "weights", "token"),
     ({"name": "recalibrated", "every": 2}, "both", "token")],
)  # fmt: skip
def test_weights_of_one_train_bit_identically_to_no_weights(model, retain, routing, apply, unit):
    """Forget and retain text are the same: under any routing every weight is exactly one, and TRACE plain GradDiff."""
    settings = {"apply": apply, "unit": unit, "routing": routing, "strength": 1.0, "ridge": 1e-3}
    weights, config = weights_of(model, retain, retain, **settings), {"name": "entropy", "rule": "all", **settings}
    assert (weights.weights == retain.valid).all()
    solve = Recalibration(CalibrationConfig(config), model, retain, retain) if isinstance(routing, dict) else None
    plain = run(model, retain, retain)
    assert_same(run(model, retain, retain, weights=weights, recalibrate=solve).model.params, plain.model.params)


def test_online_training_reports_how_the_mean_weight_drifts(model, forget, retain, tmp_path):
    online = weights_of(model, forget, retain, apply="weights", routing="online")
    run(model, forget, retain, weights=online, directory=tmp_path)
    means = [row["weight_mean"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert len(set(means)) == 6 and all(0.2 < mean < 5 for mean in means)


@pytest.mark.parametrize(("trainable", "stop"), [("all", 3), ("all", 5), ("selected_experts", 7)])
def test_an_interrupted_run_that_recalibrates_equals_the_uninterrupted_one(
    model, forget, retain, tmp_path, stop, trainable
):
    """Saved every 2 steps and recalibrated every 3: it goes on before, at and after recalibrations."""
    settings = {"rule": {"name": "difference", "top": 2}, "routing": {"name": "recalibrated", "every": 3}}
    weights = weights_of(model, forget, retain, **settings)
    solve = Recalibration(CalibrationConfig({"name": "entropy", "strength": 0.5, "ridge": 0.02, **settings}),
                          model, forget, retain)  # fmt: skip
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
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    recalibrations = [r["recalibration"] for r in read_lines(tmp_path / "whole/metrics.jsonl") if "recalibration" in r]
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


def test_what_can_not_be_weighed_is_refused(model, forget, retain):
    batch = dataclasses.replace(CONFIG, normalize="batch")
    online = weights_of(model, forget, retain, routing="online")
    with pytest.raises(ConfigError, match="normalize is 'batch', and routing 'online'"):
        run(model, forget, retain, config=batch, weights=online)
    with pytest.raises(ConfigError, match="normalize is 'batch', and routing 'online'"):
        unlearning = {"normalize": "batch"}
        resolve(ExperimentConfig, {"name": "x", "calibration": {"routing": "online"}, "unlearning": unlearning})
    config = CalibrationConfig({"name": "entropy", "routing": "recalibrated"})
    with pytest.raises(ConfigError, match="recalibrate is given without weights"):
        run(model, forget, retain, recalibrate=Recalibration(config, model, forget, retain))
