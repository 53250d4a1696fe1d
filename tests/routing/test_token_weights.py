"""Weights recomputed on a device from lambda and the chosen experts: those of the solver, and online weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.models.decoder import forward
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh, place
from trace_jax.routing.calibration import (
    calibrate,
    corpus_weights,
    count_activations,
    online_loss_weights,
    token_weights,
    weighted_frequency,
)
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.entropy_balancing import clipped_to_mean_one, effective_sample_size
from trace_jax.routing.statistics import Assignments
from trace_jax.routing.weights import RetainWeights, retain_weights

N, S, E = 60, 30, 8


@pytest.fixture(scope="module")
def corpus(random_routing):
    """(indices [L, N, S, K], valid [N, S], the assignments of its valid tokens, forget frequencies)."""
    indices = random_routing(3, tokens=N * S, domains=3).reshape(2, N, S, 2)
    valid = np.random.default_rng(0).random((N, S)) < 0.8  # holes, as at document boundaries
    valid[7] = False
    rows, positions = np.nonzero(valid)
    assignments = Assignments(indices[:, valid], rows.astype(np.int32), positions.astype(np.int32))
    return indices, valid, assignments, count_activations(random_routing(3, tokens=200, domains=3), E) / 200


@pytest.mark.parametrize("max_weight", [50.0, 1.5])
@pytest.mark.parametrize("unit", ["token", "row"])
def test_device_weights_equal_the_solvers(corpus, unit, max_weight):
    indices, valid, assignments, forget = corpus
    calibration = calibrate(
        assignments, selected=np.ones((2, E), bool), target=forget, unit=unit, max_weight=max_weight
    )
    solved = corpus_weights(assignments, calibration)
    compute = jax.jit(lambda indices, mask: token_weights(indices, calibration, mask=mask))
    weights = np.asarray(compute(jnp.asarray(indices, jnp.int32), jnp.asarray(valid)))
    assert weights.dtype == np.float32 and weights.shape == valid.shape
    np.testing.assert_allclose(weights[valid], solved, rtol=1e-5)
    assert (weights[~valid] == 0).all() and np.ptp(solved) > 0.1
    np.testing.assert_allclose(weights[valid].mean(), 1.0, rtol=1e-5)
    part = token_weights(jnp.asarray(indices[:, 5:9], jnp.int32), calibration, mask=jnp.asarray(valid[5:9]))
    np.testing.assert_allclose(weights[5:9], part, rtol=1e-6)  # whatever batch a row comes in
    if unit == "row":
        assert all(np.ptp(row[v]) == 0 for row, v in zip(weights, valid, strict=True) if v.any())
    else:
        flat = token_weights(jnp.asarray(assignments.indices, jnp.int32), calibration)
        np.testing.assert_allclose(flat, solved, rtol=1e-5)


def test_wrong_shapes_are_named(corpus):
    _, _, assignments, forget = corpus
    calibration = calibrate(assignments, selected=np.ones((2, E), bool), target=forget, unit="row")
    with pytest.raises(ValueError, match=r"need indices \[L, B, S, K\]"):
        token_weights(jnp.zeros((2, 5, 2), jnp.int32), calibration)
    with pytest.raises(ValueError, match="3 layers; the calibration was made for 2"):
        token_weights(jnp.zeros((3, 5, 2), jnp.int32), calibration)


def test_small_formulas_by_hand():
    clipped, scale = clipped_to_mean_one(np.array([1.0, 3.0]), 2.0)
    np.testing.assert_allclose(clipped, [2 / 3, 4 / 3])
    np.testing.assert_allclose(scale, 2 / 3)
    clipped, _ = clipped_to_mean_one(np.array([1.0, 3.0]), 2.0, np.array([3.0, 1.0]))
    np.testing.assert_allclose(clipped, [0.8, 1.6])
    np.testing.assert_allclose(effective_sample_size(np.array([1.0, 3.0])), 16 / 20)
    np.testing.assert_allclose(effective_sample_size(np.array([1.0, 3.0]), np.array([2.0, 1.0])), 25 / (3 * 11))
    frequency = weighted_frequency(np.array([[[0, 1], [1, 2]]]), np.array([1.0, 3.0]), 4)
    np.testing.assert_allclose(frequency, [[0.25, 1.0, 0.75, 0.0]])


# --- by the routing of the model that trains


def solved(setting, **settings):
    """The ridge keeps multipliers, and with them the rounding of float32, of order one."""
    options = {"name": "entropy", "rule": "all", "strength": 0.5, "routing": "online", "ridge": 0.02, **settings}
    return retain_weights(CalibrationConfig(options), **setting)


@pytest.mark.parametrize(
    ("unit", "apply", "sizes"),
    [("token", "both", (2, 2, 2)), ("row", "weights", (1, 4, 2)), ("row", "both", (1, 1, 1))],
)
def test_under_the_original_routing_online_weights_are_the_offline_ones(setting, unit, apply, sizes):
    found, model, rows = solved(setting, unit=unit, apply=apply), setting["model"], setting["retain"]
    mesh = make_mesh(jax.devices()[: np.prod(sizes)], data=sizes[0], expert=sizes[1], tensor=sizes[2])

    def weigh(params, tokens, segments, valid, factor):
        indices = forward(params, model.config, tokens, mask=segments, collect=("indices",)).router.indices
        return online_loss_weights(found.step_calibration, indices, valid, factor)

    params = placed_params(model.params, model.config, mesh)
    arrays = place((rows.tokens, rows.segments, rows.valid, found.step_weights), mesh, P(BATCH_AXES))
    weights = np.asarray(jax.jit(on_mesh(weigh, model.config, mesh, out_specs=P(BATCH_AXES)))(params, *arrays))
    assert np.ptp(found.weights[rows.valid]) > 0.1
    np.testing.assert_allclose(weights, found.loss_weights, rtol=1e-6, atol=1e-6)
    offline = solved(setting, unit=unit, apply=apply, routing="offline")
    assert np.array_equal(found.loss_weights, offline.loss_weights)
    assert np.array_equal(found.row_probability, offline.row_probability)
    assert offline.step_calibration is None and offline.step_weights is offline.loss_weights


@pytest.mark.parametrize("apply", ["weights", "both"])
def test_the_expected_loss_is_that_of_the_present_weights(setting, apply):
    """Rows are drawn by the old weights and tokens weighed by new ones: E[sum v r] / E[count] is the mean of w r."""
    found, valid, rng = solved(setting, apply=apply), setting["retain"].valid, np.random.default_rng(0)
    indices = jnp.asarray(rng.permuted(np.tile(np.arange(4), (2, *valid.shape, 1)), axis=-1)[..., :2], jnp.int32)
    losses = rng.random(valid.shape)
    present, v = (
        np.asarray(online_loss_weights(found.step_calibration, indices, jnp.asarray(valid), factor))
        for factor in (np.ones(valid.shape, np.float32), found.step_weights)
    )
    total, count = found.row_probability @ (v * losses).sum(1), found.row_probability @ valid.sum(1)
    np.testing.assert_allclose(total / count, (present * losses)[valid].mean(), rtol=1e-5)
    mean = found.row_probability @ v.sum(1) / count
    np.testing.assert_allclose(mean, present[valid].mean(), rtol=1e-5)
    assert abs(mean - 1) > 1e-3  # the routing is another one, so the mean is no longer one


def test_no_gradient_flows_through_online_weights(setting):
    calibration = jax.tree.map(jnp.asarray, solved(setting).step_calibration)
    indices = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (2, 3, 4, 2))
    valid, factor = jnp.ones((3, 4), bool), jnp.ones((3, 4), jnp.float32)
    gradient = jax.grad(lambda c: online_loss_weights(c, indices, valid, factor).sum())(calibration)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_online_weights_are_kept_on_disk(setting, tmp_path):
    found = solved(setting)
    found.save(tmp_path)
    loaded = RetainWeights.load(tmp_path)
    assert np.array_equal(loaded.step_weights, found.step_weights)
    for one, other in zip(*map(jax.tree.leaves, (loaded.step_calibration, found.step_calibration)), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ({"name": "ratio"}, "weighting 'ratio', which has no multipliers"),
        ({"name": "permuted"}, "weighting 'permuted', which has no multipliers"),
        ({"name": "entropy", "apply": "sampling"}, "set apply to 'both' or 'weights'"),
        ({"name": "hidden"}, r"routing would have no effect: it belongs to .*entropy"),
    ],
)
def test_weights_that_can_not_follow_the_model_are_refused(weighting, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig({**weighting, "routing": "online"})
