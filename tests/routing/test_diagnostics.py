"""Routing compared, on examples that can be checked by hand."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from trace_jax.routing.diagnostics import js_divergence, kl_divergence, load, mismatch, overlap, router_drift
from trace_jax.routing.statistics import Assignments, ExpertStatistics


def statistics(counts, tokens, top_k):
    return ExpertStatistics(np.asarray(counts, np.int64), np.zeros((len(counts), len(counts[0]))), tokens, top_k)


def test_mismatch_by_hand():
    forget = statistics([[8, 2, 10], [5, 5, 10]], 10, 2)
    retain = statistics([[20, 80, 100], [50, 50, 100]], 100, 2)
    found = mismatch(forget, retain)
    np.testing.assert_allclose(found.gap, [1.2, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.largest_ratio, [4.0, 1.0])
    np.testing.assert_allclose(found.above_two, [1 / 3, 0.0])
    np.testing.assert_allclose(found.kl, [0.4 * np.log(4) + 0.1 * np.log(0.25), 0.0], atol=1e-12)
    assert mismatch(statistics([[1, 1]], 2, 1), statistics([[2, 0]], 2, 1)).largest_ratio[0] == np.inf


def test_divergences_equal_scipys():
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(6), (2, 4))
    np.testing.assert_allclose(kl_divergence(p, q), entropy(p, q, axis=1), rtol=1e-10)
    np.testing.assert_allclose(js_divergence(p, q), jensenshannon(p, q, axis=1) ** 2, rtol=1e-10)
    apart = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert kl_divergence(*apart) == np.inf
    np.testing.assert_allclose(js_divergence(*apart), np.log(2))


def test_load_finds_dead_experts_and_unevenness():
    found = load(statistics([[5, 5, 5, 5], [10, 10, 0, 0]], 10, 2))
    np.testing.assert_allclose(found.entropy, [1.0, 0.5])
    np.testing.assert_allclose(found.largest, [1.0, 2.0])
    assert found.dead == ((1, 2), (1, 3))


def test_overlap_by_hand():
    rows, positions = np.zeros(2, np.int32), np.arange(2, dtype=np.int32)
    before = Assignments(np.array([[[0, 1], [2, 3]]]), rows, positions)
    after = Assignments(np.array([[[1, 0], [2, 0]]]), rows, positions)
    found = overlap(before, after)
    np.testing.assert_allclose(found.jaccard, [(1 + 1 / 3) / 2])
    np.testing.assert_allclose(found.unchanged, [0.5])
    np.testing.assert_allclose(found.same_first, [0.5])
    with pytest.raises(ValueError, match="not of the same tokens"):
        overlap(before, Assignments(after.indices, rows + 1, positions))


def test_router_drift_is_relative_to_the_original_router(tiny_model):
    router = tiny_model.params["layers"]["router"]
    moved = tiny_model.replace(
        params={**tiny_model.params, "layers": {**tiny_model.params["layers"], "router": router.at[1].multiply(1.1)}}
    )
    np.testing.assert_allclose(router_drift(tiny_model, moved), [0.0, 0.1], atol=1e-6)
