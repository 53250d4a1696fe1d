"""Counts are exact and the same however the corpus is batched, ordered and spread over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.data.batches import sequential_batches
from trace_jax.models.decoder import forward
from trace_jax.parallel.mesh import make_mesh
from trace_jax.routing.calibration import calibrate
from trace_jax.routing.statistics import (
    Assignments,
    DamagedRouting,
    ExpertStatistics,
    expert_assignments,
    expert_routing,
    expert_statistics,
)


@pytest.fixture(scope="module")
def rows(corpora):
    return corpora["retain"].take(np.arange(14))


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [((1, 1, 1), 14), ((1, 1, 1), 5), ((8, 1, 1), 4), ((2, 2, 2), 5), ((1, 4, 1), 7)]
)
def test_one_pass_is_exact_at_any_batch_size_and_on_any_mesh(tiny_model, rows, sizes, batch_size):
    """Counts, softmax sums and every token's experts, against one plain forward pass and numpy."""
    router = forward(
        tiny_model.params, tiny_model.config, jnp.asarray(rows.tokens), mask=jnp.asarray(rows.segments),
        collect=("router",),
    ).router  # fmt: skip
    scores = np.asarray(router.logits, np.float64)[:, rows.valid]  # [L, T, E]
    softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    mesh = make_mesh(jax.devices()[: np.prod(sizes)], data=sizes[0], expert=sizes[1], tensor=sizes[2])
    found, assignments = expert_routing(tiny_model, sequential_batches(rows, batch_size), mesh=mesh)
    assert found.counts.dtype == np.int64 and found.tokens == rows.valid.sum()
    assert np.array_equal(found.counts, np.stack([np.bincount(layer.ravel(), minlength=4) for layer in chosen]))
    np.testing.assert_allclose(found.gate_mass, softmax.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.frequency.sum(axis=1), 2.0, rtol=1e-12)
    assert assignments.indices.dtype == np.uint8 and np.array_equal(assignments.indices, chosen)
    for place, expected in zip((assignments.rows, assignments.positions), np.nonzero(rows.valid), strict=True):
        assert place.dtype == np.int32 and np.array_equal(place, expected)
    counted = expert_statistics(tiny_model, sequential_batches(rows, batch_size), mesh=mesh)
    assert np.array_equal(counted.counts, found.counts)


def test_order_and_padding_change_no_count(tiny_model, rows):
    shuffled = rows.take(np.random.default_rng(1).permutation(len(rows)))
    one, other = (expert_statistics(tiny_model, sequential_batches(r, 7)) for r in (rows, shuffled))
    assert np.array_equal(one.counts, other.counts)
    fewer = dataclasses.replace(rows, valid=rows.valid & (np.arange(rows.valid.shape[1]) % 2 == 0))
    found = expert_statistics(tiny_model, sequential_batches(fewer, 7))
    assert found.tokens == fewer.valid.sum() < rows.valid.sum()
    assert (found.counts.sum(axis=1) == 2 * found.tokens).all()


def test_what_is_kept_of_a_corpus_is_read_back_whole_and_by_rows(tiny_model, rows, tmp_path):
    statistics, assignments = expert_routing(tiny_model, sequential_batches(rows, 7))
    statistics.save(tmp_path / "retain.npz", assignments)
    assert [p.name for p in tmp_path.iterdir()] == ["retain.npz"]
    loaded, again = (
        ExpertStatistics.load(tmp_path / "retain.npz"),
        Assignments.load(tmp_path / "retain.npz", rows.valid),
    )
    for name in ("counts", "gate_mass", "tokens", "top_k", "layers"):
        assert np.array_equal(getattr(loaded, name), getattr(statistics, name))
    chosen = np.array([1, 4, 5, 9])  # row 5 has no token
    part, expected = again.take(chosen), expert_assignments(tiny_model, sequential_batches(rows.take(chosen), 7))
    for name in ("indices", "rows", "positions"):
        assert np.array_equal(getattr(again, name), getattr(assignments, name))
        assert np.array_equal(getattr(part, name), getattr(expected, name))


def test_calibration_is_the_same_on_any_mesh(tiny_model, setting):
    selected, target = np.array([[True, False, False, True]] * 2), setting["forget_statistics"].frequency
    mesh = make_mesh(jax.devices(), data=2, expert=2, tensor=2)
    other = expert_assignments(tiny_model, sequential_batches(setting["retain"], 7), mesh=mesh)
    found = [calibrate(a, selected=selected, target=target) for a in (setting["assignments"], other)]
    assert found[0].multipliers.any()
    np.testing.assert_allclose(found[1].multipliers, found[0].multipliers, atol=1e-9)


def test_a_corpus_too_small_for_statistics_is_refused(tiny_model):
    small = tiny.make_rows(1)  # 4 experts, 2 per token: 20 tokens are needed
    with pytest.raises(ValueError, match="need at least 20"):
        expert_statistics(tiny_model, sequential_batches(small, 4))
    assert expert_statistics(tiny_model, sequential_batches(small, 4), min_activations=1).tokens == small.valid.sum()
    for empty in (expert_statistics, expert_assignments):
        with pytest.raises(ValueError, match="has 0 valid tokens"):
            empty(tiny_model, [])


def test_nan_in_the_router_is_an_error_that_names_the_layer(tiny_model, rows):
    router = tiny_model.params["layers"]["router"].at[1, 0, 3].set(jnp.nan)
    broken = tiny_model.replace(
        params={**tiny_model.params, "layers": {**tiny_model.params["layers"], "router": router}}
    )
    with pytest.raises(DamagedRouting, match="router of layer 1 gave NaN"):
        expert_statistics(broken, sequential_batches(rows, 14))
