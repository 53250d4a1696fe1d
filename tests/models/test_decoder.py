"""The decoder against a slow reference in numpy, and what must hold of it whatever its parameters."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.models import decoder
from trace_jax.models.arrays import init_params
from trace_jax.models.attention import init_cache
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll

V, L, E, K = 31, 2, 6, 2
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=12,
    num_layers=L,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    num_experts=E,
    experts_per_token=K,
    expert_hidden_size=5,
)
VARIANTS = {
    "plain": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "shared expert, weights not normalised": dataclasses.replace(CONFIG, shared_hidden_size=7, normalize_top_k=False),
    "one head per key, top 1": dataclasses.replace(CONFIG, num_kv_heads=4, experts_per_token=1, normalize_top_k=False),
    "every expert": dataclasses.replace(CONFIG, experts_per_token=E),
}
run = jax.jit(forward, static_argnames=("config", "collect", "num_layers"))


def make(config=CONFIG, rows=2, length=9, seed=0):
    params = init_params(config, jax.random.key(seed))
    # Norm weights other than one, so that forgetting to multiply by them is seen.
    for name in ("attention_norm", "mlp_norm"):
        params["layers"][name] = params["layers"][name] * jax.random.uniform(
            jax.random.key(7), (L, 12), minval=0.5, maxval=2
        )
    return params, jax.random.randint(jax.random.key(seed + 1), (rows, length), 0, V)


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
            layer = jax.tree.map(lambda a: a[index], params["layers"])  # noqa: B023
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
    config = VARIANTS[name]
    params, tokens = make(config)
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


def test_jit_changes_nothing():
    params, tokens = make()
    np.testing.assert_allclose(run(params, CONFIG, tokens).logits, forward(params, CONFIG, tokens).logits, atol=1e-5)


@pytest.mark.parametrize("length", [9, 130])  # one block of queries, and two
def test_no_token_sees_a_later_one(length):
    params, tokens = make(rows=1, length=length)

    @jax.jit
    def gradient(embedded, position):
        def logits(embedded):
            every_token_its_own = {**params, "embed": embedded}
            return jnp.sum(
                forward(every_token_its_own, CONFIG, jnp.arange(length, dtype=jnp.int32)[None]).logits[0, position]
            )

        return jax.grad(logits)(embedded)

    def influence(position):
        """How much the logits at `position` depend on each token's embedding, [S]."""
        return np.abs(gradient(params["embed"][tokens[0]], position)).sum(axis=1)

    for position in (0, length // 2, length - 1):
        effect = influence(position)
        assert np.all(effect[position + 1 :] == 0)
        assert np.all(effect[: position + 1] > 0)


def test_packed_documents_equal_separate_rows():
    params, tokens = make(rows=1, length=130)
    ends = [0, 30, 31, 110, 130]
    documents = np.zeros((1, 130), np.int32)
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        documents[0, start:end] = number + 1
    packed = run(params, CONFIG, tokens, mask=jnp.asarray(documents)).logits[0]
    for start, end in itertools.pairwise(ends):
        np.testing.assert_allclose(packed[start:end], run(params, CONFIG, tokens[:, start:end]).logits[0], atol=1e-5)


def test_padding_changes_nothing_for_real_tokens():
    params, tokens = make(rows=2, length=12)
    alone = run(params, CONFIG, tokens[:, :8]).logits
    for left in (0, 4):
        padded = jnp.zeros((2, 12), jnp.int32).at[:, left : left + 8].set(tokens[:, :8])
        mask = np.zeros((2, 12), bool)
        mask[:, left : left + 8] = True
        for filler in (0, V - 1):
            filled = jnp.where(jnp.asarray(mask), padded, filler)
            got = run(params, CONFIG, filled, mask=jnp.asarray(mask)).logits[:, left : left + 8]
            np.testing.assert_allclose(got, alone, atol=1e-5)


def test_gradients_do_not_depend_on_padding():
    params, tokens = make(rows=2, length=8)
    targets = jnp.roll(tokens, -1, axis=1)

    def gradient(tokens, targets, mask):
        def loss(params):
            hidden = forward(params, CONFIG, tokens, mask=mask, collect=("hidden",)).hidden
            return jnp.sum(jnp.where(mask, token_nll(params, CONFIG, hidden, targets), 0.0))

        return jax.jit(jax.grad(loss))(params)

    plain = gradient(tokens, targets, jnp.ones((2, 8), bool))
    wide = [jnp.pad(a, ((0, 1), (0, 5)), constant_values=3) for a in (tokens, targets)]
    padded = gradient(*wide, jnp.pad(jnp.ones((2, 8), bool), ((0, 1), (0, 5))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), padded, plain)


def test_a_pass_can_stop_at_a_layer():
    params, tokens = make()
    layers = run(params, CONFIG, tokens, collect=("layers",)).layers
    for depth in range(1, L + 1):
        output = run(params, CONFIG, tokens, collect=("hidden", "counts"), num_layers=depth)
        np.testing.assert_allclose(output.hidden, layers[depth - 1], atol=1e-5)
        assert output.router.counts.shape == (depth, E)
    # Layers above take no part: their parameters get no gradient.
    gradient = jax.grad(lambda p: jnp.sum(forward(p, CONFIG, tokens, collect=("hidden",), num_layers=1).hidden))(params)
    assert all(np.all(np.asarray(a[1:]) == 0) for a in jax.tree.leaves(gradient["layers"]))
    assert float(jnp.max(jnp.abs(gradient["layers"]["q"][:1]))) > 0


def test_counts_and_load_are_sums_over_counted_positions():
    params, tokens = make(rows=3, length=10)
    documents = np.ones((3, 10), np.int32)
    documents[1, 6:] = 0
    documents[2] = 0
    counted = documents != 0
    counted[0, 0] = False
    collect = ("router", "counts", "load")
    for mask in (None, counted):
        valid = counted if mask is not None else documents != 0
        count_mask = None if mask is None else jnp.asarray(mask)
        output = run(params, CONFIG, tokens, mask=jnp.asarray(documents), count_mask=count_mask, collect=collect)
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
    params, tokens = make()
    output = run(params, CONFIG, tokens, collect=("counts",))
    router = output.router
    assert router.counts is not None and output.cache is None
    assert all(
        part is None
        for part in (output.logits, output.hidden, output.layers, router.logits, router.indices, router.load)
    )


def test_a_cache_gives_the_same_as_one_pass():
    params, tokens = make(rows=2, length=10)
    documents = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]], jnp.int32)
    whole = run(params, CONFIG, tokens, mask=documents).logits
    cache, parts = init_cache(CONFIG, 2, 12), []
    for start, end in ((0, 4), (4, 5), (5, 10)):
        output = run(params, CONFIG, tokens[:, start:end], mask=documents[:, start:end], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    assert int(cache.index) == 10


def test_bfloat16_keeps_router_and_logits_in_float32():
    # Every expert is chosen: rounding then can't change which are.
    config = dataclasses.replace(CONFIG, dtype="bfloat16", shared_hidden_size=4, experts_per_token=E)
    params = init_params(config, jax.random.key(0))
    _, tokens = make()

    def loss(params):
        output = forward(params, config, tokens, collect=("logits", "hidden", "router", "load"))
        return jnp.sum(token_nll(params, config, output.hidden, tokens)), output

    (value, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert output.hidden.dtype == jnp.bfloat16
    assert (
        value.dtype == output.logits.dtype == output.router.logits.dtype == output.router.weights.dtype == jnp.float32
    )
    assert jax.tree.map(lambda a: a.dtype, gradient) == jax.tree.map(lambda a: a.dtype, params)
    exact = forward(
        jax.tree.map(lambda a: a.astype(jnp.float32), params), dataclasses.replace(config, dtype="float32"), tokens
    )
    np.testing.assert_allclose(output.logits, exact.logits, atol=0.15)


def test_wrong_requests_are_named():
    params, tokens = make()
    with pytest.raises(ValueError, match="'logit'"):
        forward(params, CONFIG, tokens, collect=("logit",))
    with pytest.raises(ValueError, match="tuple"):
        forward(params, CONFIG, tokens, collect="logits")
    with pytest.raises(ValueError, match="no logits"):
        forward(params, CONFIG, tokens, num_layers=1)
    with pytest.raises(ValueError, match="layers 1 to 2"):
        forward(params, CONFIG, tokens, collect=("hidden",), num_layers=3)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 8\)"):
        forward(params, CONFIG, tokens, mask=jnp.ones((2, 8), bool))
