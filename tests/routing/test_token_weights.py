"""Weights recomputed on a device from lambda and the chosen experts are those of the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.routing.calibration import calibrate, count_activations
from trace_jax.routing.statistics import Assignments
from trace_jax.routing.weights import (
    clipped_to_mean_one,
    corpus_weights,
    effective_sample_size,
    ratio_weights,
    token_weights,
    weighted_frequency,
)

ROWS, LENGTH, E = 60, 30, 8


@pytest.fixture(scope="module")
def corpus(random_routing):
    """(indices [L, N, S, K], valid [N, S], the assignments of its valid tokens, forget frequencies)."""
    indices = random_routing(3, tokens=ROWS * LENGTH, domains=3).reshape(2, ROWS, LENGTH, 2)
    valid = np.random.default_rng(0).random((ROWS, LENGTH)) < 0.8  # holes, as at document boundaries
    valid[7] = False
    rows, positions = np.nonzero(valid)
    assignments = Assignments(indices[:, valid], rows.astype(np.int32), positions.astype(np.int32))
    forget = random_routing(3, tokens=200, domains=3)
    return indices, valid, assignments, count_activations(forget, E) / 200


@pytest.mark.parametrize("max_weight", [50.0, 1.5])
@pytest.mark.parametrize("unit,window", [("token", None), ("row", None), ("window", 1), ("window", 7), ("window", 99)])
def test_device_weights_equal_the_solvers(corpus, unit, window, max_weight):
    indices, valid, assignments, forget = corpus
    calibration = calibrate(
        assignments, selected=np.ones((2, E), bool), target=forget, unit=unit, window=window, max_weight=max_weight
    )
    solved = corpus_weights(assignments, calibration)
    compute = jax.jit(lambda indices, mask: token_weights(indices, calibration, mask=mask))
    weights = np.asarray(compute(jnp.asarray(indices, jnp.int32), jnp.asarray(valid)))
    assert weights.dtype == np.float32
    assert weights.shape == valid.shape
    np.testing.assert_allclose(weights[valid], solved, rtol=1e-5)
    assert (weights[~valid] == 0).all()
    np.testing.assert_allclose(weights[valid].mean(), 1.0, rtol=1e-5)
    assert np.ptp(solved) > 0.1


def test_a_window_of_one_is_the_token(corpus):
    _, _, assignments, forget = corpus
    options = {"selected": np.ones((2, E), bool), "target": forget}
    window = calibrate(assignments, unit="window", window=1, **options)
    token = calibrate(assignments, **options)
    np.testing.assert_allclose(window.multipliers, token.multipliers, atol=1e-8)


def test_rows_are_weighed_alone_whatever_batch_they_come_in(corpus):
    indices, valid, assignments, forget = corpus
    calibration = calibrate(assignments, selected=np.ones((2, E), bool), target=forget, unit="row")
    whole = token_weights(jnp.asarray(indices, jnp.int32), calibration, mask=jnp.asarray(valid))
    part = token_weights(jnp.asarray(indices[:, 5:9], jnp.int32), calibration, mask=jnp.asarray(valid[5:9]))
    np.testing.assert_allclose(whole[5:9], part, rtol=1e-6)
    assert all(np.ptp(row[v]) == 0 for row, v in zip(np.asarray(whole), valid, strict=True) if v.any())


def test_flat_token_indices_serve_too(corpus):
    _, _, assignments, forget = corpus
    calibration = calibrate(assignments, selected=np.ones((2, E), bool), target=forget)
    weights = token_weights(jnp.asarray(assignments.indices, jnp.int32), calibration)
    np.testing.assert_allclose(weights, corpus_weights(assignments, calibration), rtol=1e-5)


def test_wrong_shapes_are_named(corpus):
    _, _, assignments, forget = corpus
    calibration = calibrate(assignments, selected=np.ones((2, E), bool), target=forget, unit="row")
    with pytest.raises(ValueError, match=r"need indices \[L, B, S, K\]"):
        token_weights(jnp.zeros((2, 5, 2), jnp.int32), calibration)
    with pytest.raises(ValueError, match="3 layers; the calibration was made for 2"):
        token_weights(jnp.zeros((3, 5, 2), jnp.int32), calibration)


def test_ratio_weights_by_hand():
    # Expert 0 is selected with ratio .6/.2 = 3, expert 1 with .9/.09 = 10, cut at 5; expert 2 has ratio 10 unselected.
    indices = np.array([[[0, 2], [0, 1], [2, 3], [3, 2]]])
    weights = ratio_weights(
        indices,
        selected=np.array([[True, True, False, False]]),
        forget_frequency=np.array([[0.6, 0.9, 0.5, 0.0]]),
        retain_frequency=np.array([[0.2, 0.09, 0.05, 1.0]]),
        max_ratio=5.0,
    )
    raw = np.array([3.0, 4.0, 1.0, 1.0])
    np.testing.assert_allclose(weights, raw / raw.mean())


def test_ratio_weights_never_fall_below_the_uncovered_ones():
    """A selected expert that forget data use less (ratio below one) counts as one."""
    weights = ratio_weights(
        np.array([[[0], [1]]]), selected=np.ones((1, 2), bool), forget_frequency=np.array([[0.1, 0.5]]),
        retain_frequency=np.array([[0.5, 0.5]]),
    )  # fmt: skip
    assert (weights == 1.0).all()


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
