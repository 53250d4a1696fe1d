"""Routing compared, on examples that can be checked by hand."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from trace_jax.routing.diagnostics import (
    counts_by_row,
    expert_drift,
    frequency_gap,
    js_divergence,
    kl_divergence,
    load_entropy,
    overlap,
    overlap_by_row,
    router_drift,
    smoothed_shares,
)
from trace_jax.routing.statistics import Assignments


def test_gap_by_hand():
    forget, retain = np.array([[0.8, 0.2, 1.0], [0.5, 0.5, 1.0]]), np.array([[0.2, 0.8, 1.0], [0.5, 0.5, 1.0]])
    np.testing.assert_allclose(frequency_gap(forget, retain), [1.2, 0.0], atol=1e-12)


def test_divergences_equal_scipys():
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(6), (2, 4))
    np.testing.assert_allclose(kl_divergence(p, q), entropy(p, q, axis=1), rtol=1e-10)
    np.testing.assert_allclose(js_divergence(p, q), jensenshannon(p, q, axis=1) ** 2, rtol=1e-10)
    apart = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert kl_divergence(*apart) == np.inf
    np.testing.assert_allclose(js_divergence(*apart), np.log(2))


def test_smoothed_shares_are_never_zero_and_sum_to_one():
    np.testing.assert_allclose(
        smoothed_shares(np.array([[3, 1, 0], [0, 0, 0]])), [[7 / 11, 3 / 11, 1 / 11], [1 / 3] * 3]
    )
    kl = kl_divergence(*smoothed_shares(np.array([[4, 0], [0, 4]])))
    np.testing.assert_allclose(kl, 0.9 * np.log(9) + 0.1 * np.log(1 / 9))


def test_load_entropy_by_hand():
    np.testing.assert_allclose(load_entropy(np.array([[0.5] * 4, [1.0, 1.0, 0.0, 0.0]])), [1.0, 0.5])
    np.testing.assert_allclose(load_entropy(np.array([[1.0]])), [1.0])


def test_overlap_by_hand():
    rows, positions = np.zeros(2, np.int32), np.arange(2, dtype=np.int32)
    before = Assignments(np.array([[[0, 1], [2, 3]]]), rows, positions)
    after = Assignments(np.array([[[1, 0], [2, 0]]]), rows, positions)
    found = overlap(before, after)
    np.testing.assert_allclose(found.jaccard, [(1 + 1 / 3) / 2])
    np.testing.assert_allclose(found.unchanged, [0.5])
    with pytest.raises(ValueError, match="not of the same tokens"):
        overlap(before, Assignments(after.indices, rows + 1, positions))


def test_rows_without_tokens_are_left_out_of_sums_by_row():
    rows, positions = np.array([1, 1, 4]), np.array([0, 1, 0])
    before = Assignments(np.array([[[0, 1], [2, 3], [0, 2]]], np.uint8), rows, positions)
    after = Assignments(np.array([[[1, 0], [2, 0], [1, 3]]], np.uint8), rows, positions)
    found = overlap_by_row(before, after)
    assert found.tokens.tolist() == [2, 1]
    np.testing.assert_allclose(found.jaccard, [[1 + 1 / 3], [0]])
    np.testing.assert_allclose(found.unchanged, [[1], [0]])
    assert counts_by_row(before, 4).tolist() == [[[1, 1, 1, 1]], [[1, 0, 1, 0]]]


def test_router_drift_is_relative_to_the_original_router(tiny_model):
    router = tiny_model.params["layers"]["router"]
    moved = tiny_model.replace(
        params={**tiny_model.params, "layers": {**tiny_model.params["layers"], "router": router.at[1].multiply(1.1)}}
    )
    np.testing.assert_allclose(router_drift(tiny_model, moved), [0.0, 0.1], atol=1e-6)
    one = tiny_model.replace(
        params={
            **tiny_model.params,
            "layers": {**tiny_model.params["layers"], "router": router.at[0, :, 2].multiply(3.0)},
        }
    )
    expected = np.zeros(router.shape[::2])
    expected[0, 2] = 2.0
    np.testing.assert_allclose(expert_drift(tiny_model, one), expected, atol=1e-6)
