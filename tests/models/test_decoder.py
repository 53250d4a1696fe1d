"""What must hold of the decoder whatever its parameters. That it computes what its family does is tested in families.

Experts that are forced on a model: its own change nothing, others are weighed as its gate weighs its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.tiny import CONFIG, random_params
from trace_jax.models import decoder
from trace_jax.models.layers import init_cache
from trace_jax.models.loss import token_nll
from trace_jax.models.moe import moe_layer

V, L, E, K = CONFIG.vocab_size, CONFIG.num_layers, CONFIG.num_experts, CONFIG.experts_per_token
PARAMS = random_params(CONFIG)
forward = jax.jit(decoder.forward, static_argnames=("config", "collect", "num_layers", "remat"))


def tokens_of(rows=2, length=9):
    return np.random.default_rng(0).integers(0, V, (rows, length)).astype(np.int32)


def test_layers_written_out_are_those_of_a_scan(monkeypatch):
    """In a scan every family equals transformers (families/test_family_parity)."""
    tokens, documents = tokens_of(), np.array([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2], np.int32)

    def run(unrolled):
        monkeypatch.setattr(decoder, "UNROLLED_LAYERS", unrolled)
        collect = ("logits", "layers", "router")  # a new function: of the old one JAX would keep the program
        return jax.jit(lambda params: decoder.forward(params, CONFIG, tokens, mask=documents, collect=collect))(PARAMS)

    in_a_scan, written_out = map(run, (0, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), written_out, in_a_scan)


def test_gradients_do_not_depend_on_padding():
    tokens, mask = tokens_of(3, 13), np.pad(np.ones((2, 8), np.int32), ((0, 1), (0, 5)))

    @jax.jit
    def gradient(tokens):
        def loss(params):
            hidden = forward(params, CONFIG, tokens, mask=mask, collect=("hidden",)).hidden
            nll = token_nll(params, CONFIG, hidden, jnp.roll(tokens, -1, axis=1))
            return jnp.sum(jnp.where(mask[:, 1:] > 0, nll[:, :-1], 0.0))

        return jax.grad(loss)(PARAMS)

    one, other = (gradient(np.where(mask > 0, tokens, filler).astype(np.int32)) for filler in (3, tokens))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_counts_and_load_are_sums_over_counted_positions():
    tokens, documents = tokens_of(3, 10), np.ones((3, 10), np.int32)
    documents[1, 6:], documents[2] = 0, 0
    counted = documents != 0
    counted[0, 0] = False
    for count_mask, valid in ((None, documents != 0), (counted, counted)):
        collect = ("router", "counts", "load")
        output = forward(PARAMS, CONFIG, tokens, mask=documents, count_mask=count_mask, collect=collect)
        indices, logits = np.asarray(output.router.indices), np.asarray(output.router.logits, np.float64)
        expected = np.array([np.bincount(layer[valid].ravel(), minlength=E) for layer in indices])
        np.testing.assert_array_equal(output.router.counts, expected)
        assert np.all(np.sum(output.router.counts, axis=1) == K * valid.sum())
        probabilities = softmax(logits, axis=-1)
        np.testing.assert_allclose(output.router.load, probabilities[:, valid].sum(axis=1), rtol=1e-5)
        chosen = np.take_along_axis(probabilities, indices, axis=-1)
        assert np.all(np.diff(chosen, axis=-1) <= 0)
        np.testing.assert_allclose(output.router.weights, chosen / chosen.sum(-1, keepdims=True), atol=1e-5)


def test_only_what_is_asked_for_is_returned():
    output = jax.eval_shape(lambda: forward(PARAMS, CONFIG, tokens_of(), collect=("counts",)))
    assert [leaf.shape for leaf in jax.tree.leaves(output)] == [(L, E)] and output.router.counts is not None


# --- experts that are forced on a model

BASE = dataclasses.replace(
    CONFIG, num_layers=3, num_experts=8, experts_per_token=3, dense_layers=(1,), dense_hidden_size=10
)
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
TOKENS = tokens_of(4)
MASK = (np.arange(9)[None] < np.array([9, 7, 9, 3])[:, None]).astype(np.int32)


def config_of(gate, **changes):
    return dataclasses.replace(BASE, **(GATES[gate] | changes))


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
    drawn = np.random.default_rng(2).random((20, config.num_experts))
    chosen = np.argsort(drawn, axis=-1)[:, : config.experts_per_token].astype(np.int32)
    run = jax.jit(lambda *chosen: moe_layer(layer, config, jnp.asarray(x), chosen_TK=chosen[0] if chosen else None))
    free_y, free = run()
    forced_y, forced = run(free.indices)
    np.testing.assert_allclose(forced_y, free_y, atol=1e-6)
    np.testing.assert_array_equal(forced.indices, free.indices)
    np.testing.assert_allclose(forced.weights, free.weights, rtol=1e-6)

    y, router = run(chosen)
    np.testing.assert_array_equal(router.indices, chosen)
    layer = jax.tree.map(lambda array: np.asarray(array, np.float64), layer)
    weights = gate_weights(x @ layer["router"] + layer.get("router_bias", 0), chosen, config)
    np.testing.assert_allclose(router.weights, weights, rtol=2e-5, atol=1e-6)
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
    own = forward(params, config, TOKENS, mask=MASK, experts=np.full_like(indices, -1))
    np.testing.assert_array_equal(own.logits, free.logits)
    part = forward(params, config, TOKENS, mask=MASK, experts=indices, num_layers=2, collect=("hidden",)).hidden
    np.testing.assert_allclose(part, expected.layers[1], rtol=1e-5, atol=1e-5)


EXPERTS = np.zeros((L, 2, 9, K), np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collect": ("logit",)}, "'logit'"),
        ({"collect": "logits"}, "tuple"),
        ({"num_layers": 1}, "no logits"),
        ({"collect": ("hidden",), "num_layers": 3}, "layers 1 to 2"),
        ({"mask": np.ones((2, 8), bool)}, r"mask has shape \(2, 8\)"),
        *(
            ({"experts": wrong}, r"expected integers \(2, 2, 9, 2\)")
            for wrong in (EXPERTS[:1], EXPERTS[:, :1], EXPERTS[..., :1], EXPERTS.astype(np.float32))
        ),
        ({"experts": EXPERTS, "cache": init_cache(CONFIG, 2, 9)}, "with a cache"),
    ],
)
def test_wrong_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        forward(PARAMS, CONFIG, tokens_of(), **arguments)


@pytest.mark.parametrize("wrong", [CONFIG.vocab_size, -1])
def test_tokens_beyond_the_vocabulary_are_refused(wrong):
    tokens = jnp.asarray(tokens_of()).at[1, 3].set(wrong)
    with pytest.raises(ValueError, match=rf"hold the id {wrong}, and the model knows 0 to {CONFIG.vocab_size - 1}\."):
        decoder.forward(PARAMS, CONFIG, tokens)
    with pytest.raises(ValueError, match=f"hold the id {wrong}"):
        decoder.forward(PARAMS, CONFIG, np.asarray(tokens))
