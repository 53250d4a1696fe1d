"""Counts are exact and the same however the corpus is batched, ordered and spread over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.data.rows import sequential_batches
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.routing.calibration import calibrate
from trace_jax.routing.statistics import (
    Assignments,
    DamagedRouting,
    ExpertStatistics,
    expert_assignments,
    expert_routing,
    expert_sensitivity,
    expert_statistics,
)

ONE = tiny.mesh_of(1, 1, 1)


@pytest.fixture(scope="module")
def rows(corpora):
    return corpora["retain"].take(np.arange(14))


@pytest.mark.parametrize(("sizes", "batch_size"), [((1, 1, 1), 8), ((2, 2, 2), 5)])
def test_one_pass_is_exact_at_any_batch_size_and_on_any_mesh(tiny_model, rows, setting, sizes, batch_size):
    """Counts, affinities and every token's experts, against one plain forward pass and numpy."""
    router = forward(
        tiny_model.params, tiny_model.config, jnp.asarray(rows.tokens), mask=jnp.asarray(rows.segments),
        collect=("router",),
    ).router  # fmt: skip
    scores = np.asarray(router.logits, np.float64)[:, rows.valid]  # [L, T, E]
    softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    mesh = tiny.mesh_of(*sizes)
    found, assignments = expert_routing(tiny_model, sequential_batches(rows, batch_size), mesh=mesh)
    assert found.counts.dtype == np.int64 and found.tokens == rows.valid.sum()
    assert np.array_equal(found.counts, np.stack([np.bincount(layer.ravel(), minlength=4) for layer in chosen]))
    # SEUF, eq. 2: g is the gate of chosen experts and 0 elsewhere; its mean over a sequence, then over sequences.
    gates = np.zeros_like(softmax)
    np.put_along_axis(gates, chosen, np.take_along_axis(softmax, chosen, axis=-1), axis=-1)
    gates /= gates.sum(axis=-1, keepdims=True)  # as this model's do
    places = np.stack([np.nonzero(rows.valid)[0], rows.segments[rows.valid]], axis=1)
    sequences = [(places == one).all(axis=1) for one in np.unique(places, axis=0)]
    assert len(sequences) > len(np.unique(places[:, 0]))  # rows of several documents
    by_sequence = np.mean([gates[:, one].mean(axis=1) for one in sequences], axis=0)
    np.testing.assert_allclose(found.affinity, by_sequence, rtol=1e-5)
    np.testing.assert_allclose(found.frequency.sum(axis=1), 2.0, rtol=1e-12)
    assert assignments.indices.dtype == np.uint8 and np.array_equal(assignments.indices, chosen)
    assert assignments.rows.dtype == np.int32 and np.array_equal(assignments.rows, np.nonzero(rows.valid)[0])
    counted = expert_statistics(tiny_model, rows, batch_size=batch_size, mesh=mesh)
    assert np.array_equal(counted.counts, found.counts)
    if mesh.size > 1:  # and so is what is solved from it
        selected, target = np.array([[True, False, False, True]] * 2), setting["forget_statistics"].frequency
        other = expert_assignments(tiny_model, sequential_batches(setting["retain"], batch_size), mesh=mesh)
        solved = [calibrate(a, selected=selected, target=target) for a in (setting["assignments"], other)]
        assert solved[0].multipliers.any()
        np.testing.assert_allclose(solved[1].multipliers, solved[0].multipliers, atol=1e-9)


def test_what_is_saved_of_a_corpus_is_read_back_and_taken_by_rows(tiny_model, rows, tmp_path):
    statistics, assignments = expert_routing(tiny_model, sequential_batches(rows, 8), mesh=ONE)
    statistics.save(tmp_path / "retain.npz", assignments)
    assert [p.name for p in tmp_path.iterdir()] == ["retain.npz"]
    loaded = ExpertStatistics.load(tmp_path / "retain.npz")
    again = Assignments.load(tmp_path / "retain.npz", rows)
    for name in ("counts", "affinity", "tokens", "top_k", "layers"):
        assert np.array_equal(getattr(loaded, name), getattr(statistics, name))
    chosen = np.array([1, 4, 5, 9])  # row 5 has no token
    part = again.take(chosen)
    expected = expert_assignments(tiny_model, sequential_batches(rows.take(chosen), 8), mesh=ONE)
    for name in ("indices", "rows"):
        assert np.array_equal(getattr(again, name), getattr(assignments, name))
        assert np.array_equal(getattr(part, name), getattr(expected, name))


def test_a_corpus_too_small_for_statistics_is_refused(tiny_model):
    small = tiny.make_rows(1)  # 4 experts, 2 per token: 20 tokens are needed
    with pytest.raises(ValueError, match="need at least 20"):
        expert_statistics(tiny_model, sequential_batches(small, 8), mesh=ONE)
    found = expert_statistics(tiny_model, sequential_batches(small, 8), min_activations=1, mesh=ONE)
    assert found.tokens == small.valid.sum()
    nothing = dataclasses.replace(small, valid=np.zeros_like(small.valid))
    batches = sequential_batches(small, 8)
    for passed in (expert_statistics, expert_assignments, expert_sensitivity):
        list(batches)
        with pytest.raises(ValueError, match="an iterator can be read once"):
            passed(tiny_model, batches, mesh=ONE)
        with pytest.raises(TypeError, match="a str came where a Batch was expected; give Rows"):
            passed(tiny_model, iter(["text"]), mesh=ONE)
        with pytest.raises(ValueError, match="has 0 valid tokens"):
            passed(tiny_model, nothing, mesh=ONE)
        with pytest.raises(ValueError, match="hold the id 118, and the model knows 0 to 63"):
            passed(tiny_model, dataclasses.replace(small, tokens=small.tokens + 64), mesh=ONE)


def test_nan_in_the_router_is_an_error_that_names_the_layer(tiny_model, rows):
    broken = tiny.with_router(tiny_model, lambda router: router.at[1, 0, 3].set(jnp.nan))
    with pytest.raises(DamagedRouting, match="router of layer 1 gave NaN"):
        expert_statistics(broken, sequential_batches(rows, 8), mesh=ONE)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_sensitivity_is_the_slope_of_the_loss_by_each_gate(tiny_model, rows, sizes):
    """Finite differences of the summed NLL of what follows, by the weight of one chosen expert at one position, while
    all tokens keep their experts.
    """
    few, config = rows.take(np.arange(4)), tiny_model.config
    mesh = tiny.mesh_of(*sizes)
    found = expert_sensitivity(tiny_model, sequential_batches(few, 3), mesh=mesh)
    shape = len(config.moe_layers), *few.tokens.shape, config.experts_per_token

    run = functools.partial(forward, tiny_model.params, config, jnp.asarray(few.tokens), mask=jnp.asarray(few.segments))
    indices, expected = np.asarray(run(collect=("indices",)).router.indices), np.zeros(found.shape)

    @jax.jit
    def total(added):
        hidden = run(collect=("hidden",), experts=indices, gates_added=added).hidden
        nll = token_nll(tiny_model.params, config, hidden, jnp.roll(few.tokens, -1, axis=1))
        return jnp.where(few.valid, nll, 0.0).sum()

    for place in np.ndindex(shape):
        if few.segments[place[1:3]]:
            step = np.zeros(shape, np.float32)
            step[place] = 0.005
            expected[place[0], indices[place]] += abs(float(total(step) - total(-step))) / 0.01
    np.testing.assert_allclose(found, expected / few.valid.sum(), rtol=0.01)
