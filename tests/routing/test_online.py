"""Weights by the routing of the model that trains: those of the calibration at first, and unbiased afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.models.decoder import forward
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.online import online_loss_weights
from trace_jax.routing.retain_weights import RetainWeights, retain_weights
from trace_jax.routing.statistics import expert_statistics


@pytest.fixture(scope="module")
def setting(tiny_model, random_rows):
    forget, retain = random_rows(1, rows=16, high=12), random_rows(2, rows=24)
    retain.valid[5] = False
    return {
        "model": tiny_model, "forget": forget, "retain": retain,
        "forget_statistics": expert_statistics(tiny_model, sequential_batches(forget, 8)),
        "retain_statistics": expert_statistics(tiny_model, sequential_batches(retain, 8)),
    }  # fmt: skip


def solved(setting, **settings):
    """The ridge keeps multipliers, and with them the rounding of float32, of order one."""
    options = {"weighting": "entropy", "rule": "all", "strength": 0.5, "routing": "online", "ridge": 0.02, **settings}
    return retain_weights(CalibrationConfig(**options), **setting)


def on_devices(model, rows, found, mesh):
    """f32 [N, S]: the loss weights that a step computes on `mesh` for all rows."""

    def weigh(params, tokens, segments, valid, factor):
        indices = forward(params, model.config, tokens, mask=segments, collect=("indices",)).router.indices
        return online_loss_weights(found.online, indices, valid, factor)

    params = placed_params(model.params, model.config, mesh)
    arrays = place((rows.tokens, rows.segments, rows.valid, found.step_weights), mesh, P(BATCH_AXES))
    return np.asarray(jax.jit(on_mesh(weigh, model.config, mesh, out_specs=P(BATCH_AXES)))(params, *arrays))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize(
    ("unit", "apply"), [("token", "both"), ("row", "weights"), ("window", "both"), ("row", "both")]
)
def test_under_the_original_routing_they_are_the_offline_weights(setting, unit, apply, sizes):
    found = solved(setting, unit=unit, apply=apply)
    mesh = make_mesh(jax.devices()[: np.prod(sizes)], data=sizes[0], expert=sizes[1], tensor=sizes[2])
    weights = on_devices(setting["model"], setting["retain"], found, mesh)
    assert np.ptp(found.weights[setting["retain"].valid]) > 0.1
    np.testing.assert_allclose(weights, found.loss_weights, rtol=1e-6, atol=1e-6)


def test_offline_and_online_differ_in_nothing_that_is_prepared(setting):
    online, offline = (solved(setting, routing=routing) for routing in ("online", "offline"))
    assert np.array_equal(online.loss_weights, offline.loss_weights)
    assert np.array_equal(online.row_probability, offline.row_probability)
    assert offline.online is None and offline.step_weights is offline.loss_weights


@pytest.mark.parametrize("apply", ["weights", "both"])
def test_the_expected_loss_is_that_of_the_present_weights(setting, apply):
    """Rows are drawn by the old weights and tokens weighed by new ones: E[sum v r] / E[count] is the mean of w r."""
    found, retain = solved(setting, apply=apply), setting["retain"]
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.permuted(np.tile(np.arange(8), (2, 24, 24, 1)), axis=-1)[..., :2], jnp.int32)
    losses = rng.random(retain.valid.shape)
    ones = jnp.ones(retain.valid.shape, jnp.float32)
    present = np.asarray(online_loss_weights(found.online, indices, jnp.asarray(retain.valid), ones))
    v = np.asarray(online_loss_weights(found.online, indices, jnp.asarray(retain.valid), found.step_weights))
    total = found.row_probability @ (v * losses).sum(1)
    count = found.row_probability @ retain.valid.sum(1)
    np.testing.assert_allclose(total / count, (present * losses)[retain.valid].mean(), rtol=1e-5)
    mean = found.row_probability @ v.sum(1) / count
    np.testing.assert_allclose(mean, present[retain.valid].mean(), rtol=1e-5)
    assert abs(mean - 1) > 1e-3  # the routing is another one, so the mean is no longer one


def test_no_gradient_flows_through_them(setting):
    found = solved(setting)
    indices = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (2, 3, 4, 2))
    valid, factor = jnp.ones((3, 4), bool), jnp.ones((3, 4), jnp.float32)
    gradient = jax.grad(lambda online: online_loss_weights(online, indices, valid, factor).sum())(
        jax.tree.map(jnp.asarray, found.online)
    )
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_they_are_kept_on_disk(setting, tmp_path):
    found = solved(setting)
    found.save(tmp_path)
    loaded = RetainWeights.load(tmp_path)
    assert np.array_equal(loaded.step_weights, found.step_weights)
    for one, other in zip(jax.tree.leaves(loaded.online), jax.tree.leaves(found.online), strict=True):
        assert np.array_equal(one, other)
    solved(setting, routing="offline").save(tmp_path)
    assert RetainWeights.load(tmp_path).online is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "ratio"}, "weighting 'ratio', which has no multipliers"),
        ({"weighting": "permuted"}, "weighting 'permuted', which has no multipliers"),
        ({"weighting": "entropy", "apply": "sampling"}, "set apply to 'both' or 'weights'"),
        ({"weighting": "hidden"}, "routing = 'online' would have no effect"),
    ],
)
def test_weights_that_can_not_follow_the_model_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**settings, routing="online")


def test_experts_can_be_chosen_over_the_whole_model(setting):
    found = solved(setting, rule="affinity", top=1, scope="model")
    assert found.selected.sum() == 1
    assert dataclasses.replace(CalibrationConfig(weighting="entropy", rule="affinity")).scope == "layer"
    with pytest.raises(ConfigError, match="scope = 'model' would have no effect"):
        CalibrationConfig(weighting="entropy", scope="model")
