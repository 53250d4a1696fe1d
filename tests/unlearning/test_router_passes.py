"""What routers read of retain text, and routers realigned to what they read now."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.models.arrays import init_params
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh, to_host
from trace_jax.routing.statistics import expert_assignments, overlap
from trace_jax.unlearning import rivals as grip
from trace_jax.unlearning.config import GripProject
from trace_jax.unlearning.router_passes import read_routers, realign, retain_protection, spread_tokens

ONE, FOUR = (lambda: make_mesh(jax.devices()[:1])), (lambda: make_mesh(jax.devices()[:4], data=2, expert=2))


def test_tokens_are_spread_over_all_valid_ones(retain):
    kept = spread_tokens(retain, 20)
    assert kept.valid.sum() == 20 and len(kept) > 12  # nearly every row
    assert (spread_tokens(retain, 10**6).valid == retain.valid).all()
    every = np.flatnonzero(retain.valid)[np.arange(20) * retain.valid.sum() // 20]
    assert sorted({place // retain.valid.shape[1] for place in every}) == [
        row for row in range(len(retain)) if any((retain.tokens[row] == tokens).all() for tokens in kept.tokens)
    ]


@pytest.mark.parametrize("mesh", [ONE, FOUR])
def test_routers_are_read_at_the_valid_tokens(model, retain, mesh):
    rows = spread_tokens(retain, 20)
    inputs, scores, indices = read_routers(model, rows, mesh=mesh())
    parts = ("router_inputs", "router_logits", "indices")
    out = forward(model.params, model.config, rows.tokens, mask=rows.segments, collect=parts).router
    for found, whole in ((inputs, out.inputs), (scores, out.logits)):
        np.testing.assert_allclose(found, np.asarray(whole)[:, rows.valid], atol=1e-5)
    np.testing.assert_array_equal(indices, np.asarray(out.indices)[:, rows.valid])


def perturbed(model, size):
    """The model with other experts in its first layer and another norm in its second, so that what the second router
    reads has moved: in part by a linear map, which realignment can undo, in part not.
    """
    layers = model.params["layers"]
    other = init_params(model.config, jax.random.key(5))["layers"]["experts"]["down"]
    experts = {**layers["experts"], "down": layers["experts"]["down"] + size * other}
    norms = np.array(layers["mlp_norm"])
    norms[1] *= np.linspace(-1.0, 2.0, norms.shape[1], dtype=np.float32)
    return model.replace(params={**model.params, "layers": {**layers, "experts": experts, "mlp_norm": norms}})


def agreement(model, other, rows):
    """[L], share of tokens with the same experts."""
    found = [expert_assignments(m, sequential_batches(rows, 16)) for m in (model, other)]
    return overlap(*found).unchanged


def test_realignment_brings_retain_routing_back(model, retain):
    current = perturbed(model, 0.25)
    after, table = realign(model, current, retain, tokens=500, ridge=1e-6, mesh=ONE())
    before, now = (agreement(model, m, retain) for m in (current, after))
    assert before[1] < 0.8 and now[1] > before[1] + 0.1
    assert now[0] == before[0] == 1
    assert [row["kept"] for row in table] == [True, True] and [row["layer"] for row in table] == [0, 1]
    assert table[1]["cosine"] > table[1]["cosine_before"]
    parts = jax.tree.map(lambda a, b: bool((to_host(a) == to_host(b)).all()), after.params, current.params)
    assert not parts["layers"].pop("router") and all(jax.tree.leaves(parts))  # nothing else has changed

    # The second layer's by hand: inputs of both models, in float64.
    x, y = (read_routers(m, retain, mesh=ONE())[0][1].astype(np.float64) for m in (model, current))
    square = y.T @ y
    square += 1e-6 * np.trace(square) / len(square) * np.eye(len(square))
    wanted = np.linalg.inv(square) @ y.T @ x @ np.asarray(model.params["layers"]["router"][1], np.float64)
    np.testing.assert_allclose(after.params["layers"]["router"][1], wanted, atol=2e-3)


def test_realignment_is_the_same_on_four_devices(model, retain):
    one, four = (realign(model, perturbed(model, 0.25), retain, tokens=60, ridge=1e-4, mesh=m()) for m in (ONE, FOUR))
    np.testing.assert_allclose(
        one[0].params["layers"]["router"], to_host(four[0].params["layers"]["router"]), atol=1e-3
    )
    assert [row["cosine"] for row in one[1]] == pytest.approx([row["cosine"] for row in four[1]], abs=1e-4)


def test_a_correction_that_does_not_bring_the_scores_back_is_dropped(model, retain, monkeypatch):
    monkeypatch.setattr("trace_jax.unlearning.router_passes.LEAST_COSINE", 0.9999)
    current = perturbed(model, 20.0)
    after, table = realign(model, current, retain, tokens=500, ridge=1e-6, mesh=ONE())
    assert [row["kept"] for row in table] == [True, False] and table[1]["cosine"] < 0.9999
    np.testing.assert_array_equal(after.params["layers"]["router"][1], current.params["layers"]["router"][1])


def test_a_routers_bias_is_realigned_with_it(model, retain):
    config = dataclasses.replace(model.config, router_bias=True)
    bias = np.array([[0.1, 0.2, -0.1, 0.0], [0.0, 0.3, 0.1, -0.2]], np.float32)
    original = Model(config, {**model.params, "layers": {**model.params["layers"], "router_bias": bias}})
    current = original.replace(
        params={**original.params, "layers": {**original.params["layers"], "router_bias": bias + 1.5 * bias[::-1]}}
    )
    after, _ = realign(original, current, retain, tokens=500, ridge=1e-9, mesh=ONE())
    scores = [read_routers(m, retain, mesh=ONE())[1] for m in (original, current, after)]
    assert np.abs(scores[1] - scores[0]).max() > 0.1
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-2)
    np.testing.assert_allclose(after.params["layers"]["router_bias"][0], bias[0], atol=1e-2)


def test_too_few_tokens_to_determine_a_router_are_refused(model, retain):
    with pytest.raises(ConfigError, match="12 retain tokens for routers of 16 inputs"):
        realign(model, model, retain, tokens=12, ridge=1e-6, mesh=ONE())
    assert grip.LEAST_COSINE == 0.95


def test_more_tokens_than_directions_freeze_the_routers_and_it_says_so(model, retain, capsys):
    """Two of four experts a token, about 121 tokens: each expert was chosen by more than the 16 inputs it reads."""
    for tokens, words in ((10**4, "leave the routers 0.0% of their directions; they are frozen"), (8, " of their dir")):
        config = GripProject(tokens=tokens)
        protection, table = retain_protection(model, retain, config, bias=False, seed=0, mesh=ONE())
        said = capsys.readouterr()
        assert words in said.out + said.err and ("frozen" in said.out + said.err) == (tokens > 100)
        assert [row["free"] == 0 for row in table] == [tokens > 100] * 2
        router = model.params["layers"]["router"]
        moved, _ = jax.jit(partial(grip.constrained, mesh=ONE()))(router + 0.1, router, protection, jax.numpy.int32(1))
        assert np.allclose(moved, router, atol=1e-5) == (tokens > 100)
