"""Comparisons of routing equal those by hand and scipy's."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from tests import tiny
from trace_jax.routing.differences import (
    counts_by_row,
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


def test_gaps_divergences_and_entropies_by_hand_and_by_scipy():
    forget, retain = np.array([[0.8, 0.2, 1.0], [0.5, 0.5, 1.0]]), np.array([[0.2, 0.8, 1.0], [0.5, 0.5, 1.0]])
    np.testing.assert_allclose(frequency_gap(forget, retain), [1.2, 0.0], atol=1e-12)
    p, q = np.random.default_rng(0).dirichlet(np.ones(6), (2, 4))
    np.testing.assert_allclose(kl_divergence(p, q), entropy(p, q, axis=1), rtol=1e-10)
    np.testing.assert_allclose(js_divergence(p, q), jensenshannon(p, q, axis=1) ** 2, rtol=1e-10)
    apart = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert kl_divergence(*apart) == np.inf
    np.testing.assert_allclose(js_divergence(*apart), np.log(2))
    shares = smoothed_shares(np.array([[3, 1, 0], [0, 0, 0]]))
    np.testing.assert_allclose(shares, [[7 / 11, 3 / 11, 1 / 11], [1 / 3] * 3])
    kl = kl_divergence(*smoothed_shares(np.array([[4, 0], [0, 4]])))
    np.testing.assert_allclose(kl, 0.9 * np.log(9) + 0.1 * np.log(1 / 9))
    np.testing.assert_allclose(load_entropy(np.array([[0.5] * 4, [1.0, 1.0, 0.0, 0.0]])), [1.0, 0.5])
    np.testing.assert_allclose(load_entropy(np.array([[1.0]])), [1.0])


def test_overlap_by_hand_leaves_out_rows_without_tokens():
    rows = np.array([1, 1, 4])
    before = Assignments(np.array([[[0, 1], [2, 3], [0, 2]]], np.uint8), rows, rows)
    after = Assignments(np.array([[[1, 0], [2, 0], [1, 3]]], np.uint8), rows, rows)
    found, mean = overlap_by_row(before, after), overlap(before, after)
    assert found["tokens"].tolist() == [2, 1]
    np.testing.assert_allclose(found["jaccard"], [[1 + 1 / 3], [0]])
    np.testing.assert_allclose(found["unchanged"], [[1], [0]])
    np.testing.assert_allclose([mean["jaccard"], mean["unchanged"]], [[(1 + 1 / 3) / 3], [1 / 3]])
    assert counts_by_row(before, 4).tolist() == [[[1, 1, 1, 1]], [[1, 0, 1, 0]]]
    with pytest.raises(ValueError, match="not of the same tokens"):
        overlap(before, Assignments(after.indices, rows + 1, rows))


def test_router_drift_is_relative_to_the_original_router(tiny_model):
    moved = tiny.with_router(tiny_model, lambda router: router.at[1].multiply(1.1))
    np.testing.assert_allclose(router_drift(tiny_model, moved)[0], [0.0, 0.1], atol=1e-6)
    one = tiny.with_router(tiny_model, lambda router: router.at[0, :, 2].multiply(3.0))
    np.testing.assert_allclose(router_drift(tiny_model, one)[1], [[0, 0, 2, 0], [0, 0, 0, 0]], atol=1e-6)
