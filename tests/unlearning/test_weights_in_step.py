"""What the weights of retain tokens do in a step: they count tokens, and online they follow the model's routing."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.data.rows import Rows
from trace_jax.io.files import read_lines
from trace_jax.models.arrays import flatten
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, make_mesh, place, to_host
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import expert_statistics
from trace_jax.routing.weights import Recalibration, retain_weights
from trace_jax.run.experiment import Method
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants, coefficients
from trace_jax.unlearning.state import initial_state, unlearning_settings
from trace_jax.unlearning.step import row_multiple, unlearning_step
from trace_jax.unlearning.unlearn import unlearn

ONE = make_mesh(jax.devices()[:1])
CONFIG = UnlearningConfig(
    steps=6,
    forget_batch_size=4,
    retain_batch_size=4,
    learning_rate=0.01,
    alpha=1.0,
    checkpoint_every=2,
    trainable="all",
)


def weights_of(model, forget, retain, **settings):
    statistics = [expert_statistics(model, sequential_batches(rows, 8), min_activations=1) for rows in (forget, retain)]
    config = CalibrationConfig({"name": "entropy", "rule": "all", "strength": 0.5, "ridge": 0.02, **settings})
    return retain_weights(
        config, model=model, forget=forget, retain=retain,
        forget_statistics=statistics[0], retain_statistics=statistics[1],
    )  # fmt: skip


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
    batches = [rows.batch(np.arange(len(rows))) for rows in (forget, retain)]
    rows = StepRows(batches[0], batches[1], np.asarray(weights, np.float32), topic=np.zeros(len(forget), np.int32))
    rows = place(pad_rows(rows, row_multiple(settings, mesh)), mesh, P(BATCH_AXES))
    state, metrics = unlearning_step(state, constants, rows, settings=settings, mesh=mesh)
    first_moment = next(s for s in state.optimizer if hasattr(s, "mu")).mu
    return {path: m / np.float32(0.1) for path, m in to_host(first_moment).items()}, to_host(metrics)


def assert_close(one, other, rtol=1e-5):
    assert float(one[1]["retain_loss"]) == pytest.approx(float(other[1]["retain_loss"]), rel=rtol)
    for path, wanted in other[0].items():
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(one[0][path], wanted, atol=2e-5 * max(scale, 0.1), err_msg=path)


@pytest.mark.parametrize(("retain_loss", "unit"), [("nll", "row"), ("kl", "token"), ("hidden", "token")])
def test_integer_weights_are_copies_of_tokens(model, forget, retain, retain_loss, unit):
    """A token of weight 3 is three tokens: the row once for each, valid where there is one more copy to count."""
    config = dataclasses.replace(CONFIG, retain_loss=retain_loss)
    rng = np.random.default_rng(4)
    copies = rng.integers(0, 4, (len(retain), 1) if unit == "row" else retain.valid.shape)
    copies = np.where(retain.valid, copies, 0)
    weights = copies * (retain.valid.sum() / copies.sum())  # mean one
    parts = [dataclasses.replace(retain, valid=copies > number) for number in range(3)]
    duplicated = Rows.concatenate(parts)
    assert duplicated.valid.sum() == copies.sum() != retain.valid.sum()
    weighted = gradient(model, forget, retain, weights, config=config)
    assert_close(weighted, gradient(model, forget, duplicated, duplicated.valid, config=config))
    plain = gradient(model, forget, retain, retain.valid, config=config)
    assert float(plain[1]["retain_loss"]) != pytest.approx(float(weighted[1]["retain_loss"]), rel=1e-3)


MESHES = {
    "one": (ONE, PLAIN),
    "all": (make_mesh(jax.devices(), data=2, expert=2, tensor=2), PLAIN),
    "tensors": (
        make_mesh(jax.devices()[:4], data=1, expert=2, tensor=2),
        ParallelConfig(microbatches=2, remat="layer"),
    ),
}


@pytest.mark.parametrize(
    ("unit", "apply", "name"), [("token", "both", "one"), ("row", "weights", "tensors"), ("row", "both", "all")]
)
def test_online_weights_are_the_offline_ones_before_the_first_step(model, forget, retain, unit, apply, name):
    mesh, parallel = MESHES[name]
    offline, online = (
        weights_of(model, forget, retain, unit=unit, apply=apply, routing=routing) for routing in ("offline", "online")
    )
    config = dataclasses.replace(CONFIG, retain_loss="nll")
    options = {"config": config, "mesh": mesh, "parallel": parallel, "away": 0.0}
    found = gradient(model, forget, retain, online.step_weights, online=online.step_calibration, **options)
    assert_close(found, gradient(model, forget, retain, offline.loss_weights, **options))
    # All rows at once: 1 also for "both", where the weights of a row are divided by their mean.
    assert float(found[1]["weight_mean"]) == pytest.approx(1.0, rel=1e-5)


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


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("apply", ["weights", "both"])
@pytest.mark.parametrize("routing", ["online", "recalibrated"])
def test_weights_of_one_train_bit_identically_to_no_weights(model, retain, routing, apply):
    """Forget and retain text are the same, so that under any routing every weight is exactly one."""
    routing = {"name": routing, "every": 2} if routing == "recalibrated" else routing
    settings = {"name": "entropy", "rule": "all", "apply": apply, "routing": routing}
    weights = weights_of(model, retain, retain, **settings)
    solve = Recalibration(CalibrationConfig(settings), model, retain, retain) if routing != "online" else None
    plain = unlearn(model, retain, retain, config=CONFIG)
    found = unlearn(model, retain, retain, config=CONFIG, weights=weights, recalibrate=solve)
    assert_same(found.model.params, plain.model.params)


def test_online_training_reports_how_the_mean_weight_drifts(model, forget, retain, tmp_path):
    online = weights_of(model, forget, retain, apply="weights", routing="online")
    config = dataclasses.replace(CONFIG, retain_batch_size=len(retain), learning_rate=0.05)
    unlearn(model, forget, retain, config=config, weights=online, directory=tmp_path)
    means = [row["weight_mean"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert means[0] == pytest.approx(1.0, rel=1e-5)
    assert abs(means[-1] - 1) > 1e-3


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 5, 7])
@pytest.mark.parametrize("trainable", ["all", "selected_experts"])
def test_an_interrupted_run_that_recalibrates_equals_the_uninterrupted_one(
    model, forget, retain, tmp_path, stop, trainable
):
    """Saved every 2 steps and recalibrated every 3: it goes on before, at and after recalibrations."""
    settings = {"rule": {"name": "difference", "top": 2}, "routing": {"name": "recalibrated", "every": 3}}
    weights = weights_of(model, forget, retain, **settings)
    solve = Recalibration(CalibrationConfig({"name": "entropy", "strength": 0.5, "ridge": 0.02, **settings}),
                          model, forget, retain)  # fmt: skip
    config = dataclasses.replace(CONFIG, steps=8, evaluate_every=1, learning_rate=0.05, trainable=trainable)

    def run(name, until):
        calls = iter(range(100))

        def evaluate(_):
            if until is not None and next(calls) == until:
                raise Stop
            return []

        return unlearn(
            model, forget, retain, config=config, weights=weights, recalibrate=solve, directory=tmp_path / name,
            identity="a", evaluate=evaluate,
        )  # fmt: skip

    whole = run("whole", None)
    with pytest.raises(Stop):
        run("cut", stop)
    assert_same(run("cut", None).model.params, whole.model.params)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    recalibrations = [r["recalibration"] for r in read_lines(tmp_path / "whole/metrics.jsonl") if "recalibration" in r]
    assert len(recalibrations) == 2 and min(recalibrations[1]["overlap"]["retain"]) < 1
    for step in (3, 6):
        name = f"recalibration/step-{step:06d}/drift.json"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if trainable == "selected_experts":  # those of step 0, although others are selected later
        experts = [np.asarray(m.params["layers"]["experts"]["down"]) for m in (model, whole.model)]
        changed = (experts[0] != experts[1]).any(axis=(2, 3))
        assert (changed == weights.selected).all() and recalibrations[1]["selected_overlap"] <= 1


def test_recalibration_changes_what_is_trained(model, forget, retain):
    settings = {"rule": "all", "routing": {"name": "recalibrated", "every": 2}}
    weights = weights_of(model, forget, retain, **settings)
    solve = Recalibration(
        CalibrationConfig({"name": "entropy", "strength": 0.5, "ridge": 0.02, **settings}), model, forget, retain
    )
    config = dataclasses.replace(CONFIG, learning_rate=0.05)
    with_it, without = (
        unlearn(model, forget, retain, config=config, weights=weights, recalibrate=r).model.params["head"]
        for r in (solve, None)
    )
    assert not np.array_equal(with_it, without)


def test_what_can_not_be_weighed_is_refused(model, forget, retain):
    batch = dataclasses.replace(CONFIG, normalize="batch")
    online = weights_of(model, forget, retain, routing="online")
    with pytest.raises(ConfigError, match="normalize is 'batch', and routing 'online'"):
        unlearn(model, forget, retain, config=batch, weights=online)
    with pytest.raises(ConfigError, match="normalize is 'batch', and routing 'online'"):
        Method("trace", CalibrationConfig({"name": "entropy", "routing": "online"}), batch)
    config = CalibrationConfig({"name": "entropy", "routing": "recalibrated"})
    with pytest.raises(ConfigError, match="recalibrate is given without weights"):
        unlearn(model, forget, retain, config=CONFIG, recalibrate=Recalibration(config, model, forget, retain))
