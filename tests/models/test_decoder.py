"""The decoder against a slow reference in numpy, and what must hold of it whatever its parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_params
from trace_jax.models import decoder
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll

V, L, E, K = 31, 2, 6, 2
CONFIG = ModelConfig(
    vocab_size=V, hidden_size=12, num_layers=L, num_heads=4, num_kv_heads=2, head_size=4, num_experts=E,
    experts_per_token=K, expert_hidden_size=5,
)  # fmt: skip
VARIANTS = {
    "plain": CONFIG,
    "tied, shared expert, one head per key, weights not normalised": dataclasses.replace(
        CONFIG, tie_embeddings=True, shared_hidden_size=7, num_kv_heads=4, experts_per_token=1, normalize_top_k=False
    ),
    "every expert": dataclasses.replace(CONFIG, experts_per_token=E),
}
PARAMS = random_params(CONFIG)
run = jax.jit(forward, static_argnames=("config", "collect", "num_layers"))


def tokens_of(rows=2, length=9, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length)).astype(np.int32)


def reference(params, config, tokens, documents):
    """The decoder in float64 loops over rows, tokens and heads: logits, layer outputs and chosen experts."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    H, G, C = config.num_heads, config.num_kv_heads, config.head_size

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2) + config.norm_epsilon) * weight

    def rope(x, position):
        angle = position / config.ropes[0].theta ** (np.arange(C // 2) * 2 / C)
        pairs = (x[: C // 2] + 1j * x[C // 2 :]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    def mlp(gate_up, down, x):
        gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
        return (gate / (1 + np.exp(-gate)) * up) @ down

    def experts(layer, x):
        scores = np.exp(x @ layer["router"])
        scores = scores / scores.sum()
        chosen = np.argsort(-scores, kind="stable")[: config.experts_per_token]
        weights = scores[chosen] / (scores[chosen].sum() if config.normalize_top_k else 1)
        y = sum(
            w * mlp(layer["experts"]["gate_up"][e], layer["experts"]["down"][e], x)
            for w, e in zip(weights, chosen, strict=True)
        )
        return y + (mlp(layer["shared"]["gate_up"], layer["shared"]["down"], x) if "shared" in layer else 0), chosen

    def attention(layer, x, seen, s):
        positions = {m: sum(n in seen[m] for n in range(m)) for m in seen[s]}
        heads = []
        for h in range(H):
            g = h // (H // G)
            q = rope(x[s] @ layer["q"][:, h], positions[s])
            scores = np.array([q @ rope(x[m] @ layer["k"][:, g], positions[m]) for m in seen[s]]) / np.sqrt(C)
            p = np.exp(scores - scores.max())
            heads.append((p / p.sum()) @ np.array([x[m] @ layer["v"][:, g] for m in seen[s]]))
        return sum(heads[h] @ layer["o"][h] for h in range(H))

    logits, outputs, chosen = [], [], []
    head = params["embed"].T if config.tie_embeddings else params["head"]
    for row, document in zip(np.asarray(tokens), np.asarray(documents), strict=True):
        S = len(row)
        seen = {s: [m for m in range(s + 1) if document[m] == document[s]] for s in range(S)}
        x = params["embed"][row]
        row_outputs, row_chosen = [], []
        for index in range(config.num_layers):
            layer = jax.tree.map(lambda a, index=index: a[index], params["layers"])
            normed = np.array([norm(v, layer["attention_norm"]) for v in x])
            x = x + np.array([attention(layer, normed, seen, s) for s in range(S)])
            parts = [experts(layer, norm(v, layer["mlp_norm"])) for v in x]
            x = x + np.array([part[0] for part in parts])
            row_outputs.append(x)
            row_chosen.append([part[1] for part in parts])
        logits.append(np.array([norm(v, params["final_norm"]) for v in x]) @ head)
        outputs.append(row_outputs)
        chosen.append(row_chosen)
    return np.array(logits), np.array(outputs).swapaxes(0, 1), np.array(chosen).swapaxes(0, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_slow_reference(name, monkeypatch):
    config, tokens = VARIANTS[name], tokens_of()
    params = random_params(config)
    documents = np.ones((2, 9), np.int32)
    documents[0, 4:] = 2
    documents[1, 7:] = 0
    logits, layers, indices = reference(params, config, tokens, documents)
    for unrolled in (0, 4) if name == "plain" else (4,):  # a scan over layers, and a loop written out
        monkeypatch.setattr(decoder, "UNROLLED_LAYERS", unrolled)
        fresh = jax.jit(forward, static_argnames=("config", "collect"))
        output = fresh(params, config, tokens, mask=jnp.asarray(documents), collect=("logits", "layers", "indices"))
        np.testing.assert_array_equal(output.router.indices, indices)
        np.testing.assert_allclose(output.layers, layers, atol=2e-5)
        np.testing.assert_allclose(output.logits, logits, atol=5e-5)


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
        output = run(PARAMS, CONFIG, tokens, mask=documents, count_mask=count_mask, collect=collect)
        indices, logits = np.asarray(output.router.indices), np.asarray(output.router.logits, np.float64)
        expected = np.array([np.bincount(layer[valid].ravel(), minlength=E) for layer in indices])
        np.testing.assert_array_equal(output.router.counts, expected)
        assert np.all(np.sum(output.router.counts, axis=1) == K * valid.sum())
        softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(output.router.load, softmax[:, valid].sum(axis=1), rtol=1e-5)
        chosen = np.take_along_axis(softmax, indices, axis=-1)
        assert np.all(np.diff(chosen, axis=-1) <= 0)
        np.testing.assert_allclose(output.router.weights, chosen / chosen.sum(-1, keepdims=True), atol=1e-5)


def test_only_what_is_asked_for_is_returned():
    output = jax.eval_shape(lambda: forward(PARAMS, CONFIG, tokens_of(), collect=("counts",)))
    assert [leaf.shape for leaf in jax.tree.leaves(output)] == [(L, E)] and output.router.counts is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collect": ("logit",)}, "'logit'"),
        ({"collect": "logits"}, "tuple"),
        ({"num_layers": 1}, "no logits"),
        ({"collect": ("hidden",), "num_layers": 3}, "layers 1 to 2"),
        ({"mask": np.ones((2, 8), bool)}, r"mask has shape \(2, 8\)"),
    ],
)
def test_wrong_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        forward(PARAMS, CONFIG, tokens_of(), **arguments)
