"""Counts are exact and the same however the corpus is batched, ordered and spread over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.data.batches import sequential_batches
from trace_jax.models.decoder import forward
from trace_jax.parallel.mesh import make_mesh
from trace_jax.routing.calibration import calibrate
from trace_jax.routing.selection import select_experts
from trace_jax.routing.statistics import ExpertStatistics, expert_assignments, expert_statistics


@pytest.fixture(scope="module")
def rows(random_rows):
    return random_rows(0, rows=14)


@pytest.fixture(scope="module")
def reference(tiny_model, rows):
    """(chosen experts [T, L, K], softmax sums [L, E]) of the valid tokens, by one plain forward pass and numpy."""
    router = forward(
        tiny_model.params, tiny_model.config, jnp.asarray(rows.tokens), mask=jnp.asarray(rows.segments),
        collect=("router",),
    ).router  # fmt: skip
    scores = np.asarray(router.logits, np.float64)[:, rows.valid]  # [L, T, E]
    softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.argsort(-scores, axis=-1)[..., :2], softmax.sum(1)


def mesh_of(data, expert=1, tensor=1):
    return make_mesh(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)


MESHES = [((1,), 14), ((1,), 5), ((8,), 4), ((2, 4), 7), ((2, 2, 2), 5), ((1, 8), 7)]


@pytest.mark.parametrize("sizes,batch_size", MESHES)
def test_counts_are_exact_at_any_batch_size_and_on_any_mesh(tiny_model, rows, reference, sizes, batch_size):
    indices, gate_mass = reference
    mesh = mesh_of(*sizes)
    found = expert_statistics(tiny_model, sequential_batches(rows, batch_size), mesh=mesh)
    expected = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in indices])
    assert found.counts.dtype == np.int64
    assert np.array_equal(found.counts, expected)
    assert found.tokens == rows.valid.sum()
    np.testing.assert_allclose(found.gate_mass, gate_mass, rtol=1e-5)
    np.testing.assert_allclose(found.frequency.sum(axis=1), 2.0, rtol=1e-12)


def test_the_order_of_rows_changes_no_count(tiny_model, rows):
    shuffled = rows.take(np.random.default_rng(1).permutation(len(rows)))
    one, other = (expert_statistics(tiny_model, sequential_batches(r, 7)) for r in (rows, shuffled))
    assert np.array_equal(one.counts, other.counts)


def test_padding_and_masked_positions_are_not_counted(tiny_model, rows):
    fewer = dataclasses.replace(rows, valid=rows.valid & (np.arange(rows.valid.shape[1]) % 2 == 0))
    found = expert_statistics(tiny_model, sequential_batches(fewer, 7))
    assert found.tokens == fewer.valid.sum() < rows.valid.sum()
    assert (found.counts.sum(axis=1) == 2 * found.tokens).all()


@pytest.mark.parametrize("sizes,batch_size", [((1,), 14), ((2, 2, 2), 5)])
def test_assignments_are_the_top_k_of_every_valid_token_in_row_order(tiny_model, rows, reference, sizes, batch_size):
    mesh = mesh_of(*sizes)
    found = expert_assignments(tiny_model, sequential_batches(rows, batch_size), mesh=mesh)
    assert found.indices.dtype == np.uint8
    assert np.array_equal(found.indices, reference[0])
    row, position = np.nonzero(rows.valid)
    assert np.array_equal(found.rows, row)
    assert np.array_equal(found.positions, position)


def test_calibration_is_the_same_on_any_mesh(tiny_model, rows, random_rows):
    found = []
    for sizes in ((1,), (2, 4), (2, 2, 2)):
        forget, retain = (
            expert_statistics(tiny_model, sequential_batches(r, 7), mesh=mesh_of(*sizes))
            for r in (random_rows(5), rows)
        )
        chosen = select_experts(forget, retain, rule="difference", top=2)
        assignments = expert_assignments(tiny_model, sequential_batches(rows, 7), mesh=mesh_of(*sizes))
        found.append(calibrate(assignments, selected=chosen, target=forget.frequency))
    assert (found[0].multipliers > 0).any()
    for other in found[1:]:
        np.testing.assert_allclose(other.multipliers, found[0].multipliers, atol=1e-9)


def test_statistics_are_the_same_after_saving(tiny_model, rows, tmp_path):
    found = expert_statistics(tiny_model, sequential_batches(rows, 7))
    found.save(tmp_path / "forget.npz")
    loaded = ExpertStatistics.load(tmp_path / "forget.npz")
    assert np.array_equal(loaded.counts, found.counts)
    assert np.array_equal(loaded.gate_mass, found.gate_mass)
    assert (loaded.tokens, loaded.top_k) == (found.tokens, found.top_k)
    assert [p.name for p in tmp_path.iterdir()] == ["forget.npz"]


def test_a_corpus_too_small_for_statistics_is_refused(tiny_model, random_rows):
    small = random_rows(0, rows=1)  # 8 experts, 2 per token: 40 tokens are needed
    assert small.valid.sum() < 40
    with pytest.raises(ValueError, match="need at least 40"):
        expert_statistics(tiny_model, sequential_batches(small, 4))
    assert expert_statistics(tiny_model, sequential_batches(small, 4), min_activations=1).tokens == small.valid.sum()
    with pytest.raises(ValueError, match="has 0 valid tokens"):
        expert_statistics(tiny_model, [], min_activations=0)
    with pytest.raises(ValueError, match="no valid token"):
        expert_assignments(tiny_model, [])


def test_nan_in_the_router_is_an_error_that_names_the_layer(tiny_model, rows):
    router = tiny_model.params["layers"]["router"].at[1, 0, 3].set(jnp.nan)
    broken = tiny_model.replace(
        params={**tiny_model.params, "layers": {**tiny_model.params["layers"], "router": router}}
    )
    with pytest.raises(ValueError, match="router of layer 1 gave NaN"):
        expert_statistics(broken, sequential_batches(rows, 14))
    with pytest.raises(ValueError, match="router of layer 1 gave NaN"):
        expert_assignments(broken, sequential_batches(rows, 14))
