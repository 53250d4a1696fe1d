"""Experts that are forced on a model: its own change nothing, others are weighed as its gate weighs its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny import mesh_of, random_params
from trace_jax.models import decoder
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.layers import init_cache
from trace_jax.models.moe import moe_layer
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.mesh import BATCH_AXES

BASE = ModelConfig(
    vocab_size=40, hidden_size=12, num_layers=3, num_heads=2, num_kv_heads=1, head_size=8, num_experts=8,
    experts_per_token=3, expert_hidden_size=6, dense_layers=(1,), dense_hidden_size=10,
)  # fmt: skip
GATES = {
    "softmax, normalised": {},
    "softmax, best groups": {"num_groups": 4, "groups_per_token": 2, "normalize_top_k": False, "routing_scale": 16.0},
    "softmax over the chosen": {"router_score": "softmax_top_k", "router_bias": True, "normalize_top_k": False},
    "sigmoid, corrected": {
        "router_score": "sigmoid", "router_correction": True, "num_groups": 4, "groups_per_token": 2,
        "group_score": "top2", "normalize_minimum": 0.5, "routing_scale": 2.5,
    },
    "sigmoid, not normalised": {"router_score": "sigmoid", "normalize_top_k": False},
    "sparse mixer": {
        "router_score": "sparsemixer", "experts_per_token": 2, "normalize_top_k": False, "router_jitter": 0.3
    },
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, BASE.vocab_size, (4, 9)).astype(np.int32)
MASK = (np.arange(9)[None] < np.array([9, 7, 9, 3])[:, None]).astype(np.int32)
forward = jax.jit(decoder.forward, static_argnames=("config", "collect", "num_layers", "remat"))


def config_of(gate, **changes):
    return dataclasses.replace(BASE, **(GATES[gate] | changes))


def other_experts(config, shape, seed=2):
    """i32 [..., K], K different experts each, at random."""
    drawn = np.random.default_rng(seed).random((*shape, config.num_experts))
    return np.argsort(drawn, axis=-1)[..., : config.experts_per_token].astype(np.int32)


def gate_weights(logits, indices, config):
    """f64 [N, K] from logits f64 [N, E]: what each family's gate makes of these experts, one token at a time."""
    weights = np.zeros(indices.shape)
    for n, (scores, chosen) in enumerate(zip(logits, indices, strict=True)):
        if config.router_score == "sparsemixer":
            left = list(range(len(scores)))
            for k, e in enumerate(chosen):
                apart = (scores[e] - scores) / np.maximum(np.abs(scores), scores[e])
                close = [j for j in left if apart[j] <= 2 * config.router_jitter]
                weights[n, k] = np.exp(scores[e]) / np.exp(scores[close]).sum()
                left.remove(e)
        elif config.router_score == "sigmoid":
            weights[n] = 1 / (1 + np.exp(-scores[chosen]))
        else:
            among = scores[chosen] if config.router_score == "softmax_top_k" else scores
            weights[n] = np.exp(scores[chosen]) / np.exp(among).sum()
        if config.normalize_top_k:
            weights[n] /= max(weights[n].sum(), config.normalize_minimum)
    return weights * config.routing_scale


@pytest.mark.parametrize("gate", GATES)
def test_own_experts_change_nothing_and_others_get_the_weights_that_the_gate_gives_them(gate):
    config, x = config_of(gate), np.random.default_rng(3).normal(size=(20, BASE.hidden_size)).astype(np.float32)
    layer = jax.tree.map(lambda array: array[1], random_params(config, noise=0.5)["layers"])
    chosen = other_experts(config, (20,))
    run = jax.jit(lambda *chosen: moe_layer(layer, config, jnp.asarray(x), chosen_TK=chosen[0] if chosen else None))
    free_y, free = run()
    forced_y, forced = run(free.indices)
    np.testing.assert_allclose(forced_y, free_y, atol=1e-6)
    np.testing.assert_array_equal(forced.indices, free.indices)
    np.testing.assert_allclose(forced.weights, free.weights, rtol=1e-6)

    y, routing = run(chosen)
    np.testing.assert_array_equal(routing.indices, chosen)
    layer = jax.tree.map(lambda array: np.asarray(array, np.float64), layer)
    weights = gate_weights(x @ layer["router"] + layer.get("router_bias", 0), chosen, config)
    np.testing.assert_allclose(routing.weights, weights, rtol=2e-5, atol=1e-6)
    gate_up, down = (layer["experts"][name][chosen] for name in ("gate_up", "down"))  # [T, K, ...]
    gates, ups = np.moveaxis(np.einsum("td,tkdgf->tkgf", x, gate_up), 2, 0)
    wanted = np.einsum("tk,tkf,tkfd->td", weights, gates / (1 + np.exp(-gates)) * ups, down)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


def test_every_layer_gets_its_own_experts():
    """A model that uses expert 5 in one layer and 2 in the other is one whose experts are all copies of those."""
    config = config_of("softmax, normalised", experts_per_token=1)
    params = random_params(config, noise=0.5)
    indices = np.broadcast_to(np.array([5, 2], np.int32)[:, None, None, None], (2, *TOKENS.shape, 1))
    copies = jax.tree.map(lambda a: jnp.stack([a[0, [5] * 8], a[1, [2] * 8]]), params["layers"]["experts"])
    copied = {**params, "layers": {**params["layers"], "experts": copies}}
    collect = ("logits", "layers")
    expected = forward(copied, config, TOKENS, mask=MASK, collect=collect)
    forced = forward(params, config, TOKENS, mask=MASK, experts=indices, remat="layer", collect=collect)
    np.testing.assert_allclose(forced.logits, expected.logits, rtol=1e-5, atol=1e-5)
    free = forward(params, config, TOKENS, mask=MASK, collect=collect)
    assert np.abs(np.asarray(free.logits - expected.logits)).max() > 0.1
    part = forward(params, config, TOKENS, mask=MASK, experts=indices, num_layers=2, collect=("hidden",)).hidden
    np.testing.assert_allclose(part, expected.layers[1], rtol=1e-5, atol=1e-5)


def test_a_mesh_gives_the_same():
    """Seven experts and six wide, which the mesh doesn't divide: all are padded."""
    config = config_of("softmax over the chosen", num_experts=7, experts_per_token=2)
    params, indices, mesh = random_params(config, noise=0.5), other_experts(config, (4, 2, 9)), mesh_of(1, 2, 2)

    def run(params, tokens, mask, indices):
        collect, indices = ("logits", "router"), indices.swapaxes(0, 1)
        out = decoder.forward(params, config, tokens, mask=mask, collect=collect, experts=indices)
        return out.logits, out.router.indices.swapaxes(0, 1), out.router.weights.swapaxes(0, 1)

    expected = jax.jit(run)(params, TOKENS, MASK, indices)
    spread = jax.jit(on_mesh(run, config, mesh, out_specs=P(BATCH_AXES)))
    there = spread(placed_params(params, config, mesh), TOKENS, MASK, indices)
    np.testing.assert_array_equal(there[1], indices)
    for one, other in zip(expected, there, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


def test_experts_that_do_not_fit_are_refused():
    config = config_of("softmax, normalised")
    params, indices = random_params(config), other_experts(config, (2, *TOKENS.shape))
    for wrong in (indices[:1], indices[:, :3], indices[..., :2], indices.astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected integers \(2, 4, 9, 3\)"):
            decoder.forward(params, config, TOKENS, experts=wrong)
    with pytest.raises(ValueError, match="with a cache"):
        decoder.forward(params, config, TOKENS, experts=indices, cache=init_cache(config, 4, 9))
