"""Every switch of the decoder, in three models: parameters, gradients, caches, devices and types agree.

That a switch means what its family says is tested against transformers in tests/models/families.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny import mesh_of, random_params
from trace_jax.config import ConfigError
from trace_jax.models import architecture, decoder, layers, loss
from trace_jax.models.architecture import ModelConfig, Rope, flatten, init_params, unflatten
from trace_jax.models.layers import init_cache
from trace_jax.models.loss import token_kl, token_nll
from trace_jax.models.sharding import on_mesh, param_specs, placed_params
from trace_jax.parallel.mesh import BATCH_AXES

BASE = ModelConfig(
    vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, num_experts=8,
    experts_per_token=3, expert_hidden_size=9,
)  # fmt: skip
# Sizes that no mesh divides; with each a mesh.
MODELS = {
    "latent": {
        "attention": "latent", "latent_size": 6, "query_latent_size": 5, "rotary_size": 4, "value_size": 6,
        "attention_bias": "all", "rope_interleaved": True, "num_layers": 3, "dense_layers": (0,),
        "dense_hidden_size": 10, "shared_hidden_size": 7, "router_score": "sigmoid", "router_correction": True,
        "num_groups": 4, "groups_per_token": 2, "group_score": "top2", "normalize_minimum": 1e-20, "routing_scale": 2.5,
    },
    "windows": {
        "num_experts": 7, "num_heads": 3, "num_kv_heads": 1, "sinks": True, "windows": (3, 0), "layer_ropes": (1, -1),
        "ropes": (Rope(), Rope(theta=100.0, divisors=(1.0, 3.0), amplitude=1.2)), "rotary_size": 4, "qk_norm": "head",
        "activation": "clamped_swiglu", "swiglu_limit": 0.5, "expert_bias": True, "router_bias": True,
        "router_score": "softmax_top_k", "normalize_top_k": False, "attention_bias": "all", "attention_gate": True,
        "norm_placement": "both", "embedding_scale": 5.6, "shared_gate": True, "shared_hidden_size": 8,
        "mlp_bias": True,
    },
    "mixer": {
        "num_experts": 7, "num_heads": 6, "num_kv_heads": 3, "norm": "layer", "head_bias": True, "tie_embeddings": True,
        "router_score": "sparsemixer", "experts_per_token": 2, "normalize_top_k": False, "router_jitter": 0.3,
        "norm_placement": "post", "qk_norm": "full", "clip_qkv": 1.5, "residual_scale": 0.3, "logits_divisor": 3.0,
        "attention_scale": 0.1, "moe_output_norm": True, "attention_bias": "qkv", "grouped_matmul": "ragged",
    },
}  # fmt: skip
MESHES = {"latent": (1, 2, 4), "windows": (1, 4, 2), "mixer": (2, 2, 2)}
TOKENS = np.random.default_rng(2).integers(0, BASE.vocab_size, (8, 12)).astype(np.int32)
DOCUMENTS = (np.arange(12)[None] < np.array([12, 12, 12, 9, 5, 1, 12, 8])[:, None]).astype(np.int32)
DOCUMENTS[0, 5:], DOCUMENTS[1, :2] = 2, 0
COLLECT = ("logits", "hidden", "layers", "router", "router_inputs", "counts")
forward = jax.jit(decoder.forward, static_argnames=("config", "collect", "num_layers"))


@pytest.fixture(autouse=True, scope="module")
def scanned():
    """Layers in a scan compile sooner than layers written out; that both are the same is tested in test_decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "UNROLLED_LAYERS", 1)
        yield


def config_of(name, **changes):
    return dataclasses.replace(BASE, **(MODELS[name] | changes))


@functools.cache
def case(name):
    """(configuration, parameters, output for all tokens) of a model."""
    config = config_of(name)
    params = random_params(config)
    return config, params, forward(params, config, TOKENS, mask=DOCUMENTS, collect=COLLECT)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient_and_on_a_mesh_the_same(name, monkeypatch):
    """Of one model with experts that are forced on it."""
    (config, params, output), mesh, forced = case(name), mesh_of(*MESHES[name]), name == "windows"
    drawn = np.random.default_rng(0).random((8, config.num_layers, 12, config.num_experts))
    chosen = np.argsort(drawn, axis=-1)[..., : config.experts_per_token].astype(np.int32)
    if name == "mixer":
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 7 * config.vocab_size)
        monkeypatch.setattr(loss, "HEAD_PER_CHUNK", 2**30)

    def losses(params, other, tokens, documents, chosen, total):
        experts = chosen.swapaxes(0, 1) if forced else None
        collect = ("hidden", "counts", "load")
        out = decoder.forward(params, config, tokens, mask=documents, collect=collect, experts=experts)
        nll = token_nll(params, config, out.hidden, jnp.roll(tokens, -1, axis=1))
        hidden = decoder.forward(other, config, tokens, mask=documents, collect=("hidden",)).hidden
        kl = token_kl(other, hidden, params, out.hidden, config)
        value = total(jnp.where(documents > 0, nll + kl, 0.0).sum()) + 0.1 * (total(out.router.load) ** 2).sum()
        return value, total(out.router.counts)

    def gradient(params, *rows, total=lambda x: jax.lax.psum(x, BATCH_AXES)):
        other = jax.tree.map(lambda x: 0.9 * x, params)
        return jax.value_and_grad(losses, has_aux=True)(params, other, *rows, total)

    rows = TOKENS, DOCUMENTS, chosen
    (value, counts), wanted = jax.jit(functools.partial(gradient, total=lambda x: x))(params, *rows)
    wanted = flatten(wanted)
    assert {path for path, g in wanted.items() if not np.any(np.asarray(g))} <= {"layers/router_correction"}
    assert np.array_equal(counts, output.router.counts) != forced
    out_specs = ((P(), P()), unflatten(param_specs(config, mesh)))
    spread = jax.jit(on_mesh(gradient, config, mesh, out_specs=out_specs))
    (value_there, counts_there), there = spread(placed_params(params, config, mesh), *rows)
    np.testing.assert_array_equal(counts_there, counts)
    np.testing.assert_allclose(value_there, value, rtol=1e-5)
    for path, leaf in flatten(there).items():
        scale = max(1.0, float(np.abs(wanted[path]).max()))
        np.testing.assert_allclose(leaf, wanted[path], atol=3e-5 * scale, err_msg=path)


def test_the_written_gradient_of_attention_is_the_derived_one():
    rng, S = np.random.default_rng(0), 130  # two blocks of queries
    q, k, v, weight = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 2, 3, S, 4), (2, 2, S, 4), (2, 2, S, 5), (2, 2, 3, S, 5))
    )
    sinks, documents = rng.normal(size=(2, 3)).astype(np.float32), rng.integers(1, 3, (2, S)).astype(np.int32)
    mask = layers.attention_mask(documents, S, documents, 0)

    def gradients(attend):
        return jax.jit(jax.grad(lambda q, k, v, s: (attend(q, k, v, mask, s) * weight).sum(), argnums=(0, 1, 2, 3)))

    written = gradients(layers._causal_attend)(q, k, v, sinks)
    derived = gradients(lambda q, k, v, mask, s: layers._attend_with_normalizer(q, [(k, v, mask)], s)[0])(
        q, k, v, sinks
    )
    for mine, other in zip(written, derived, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_one_pass(name):
    config, params, output = case(name)
    cache, parts = init_cache(config, 8, 14), []
    for piece in (slice(0, 6), slice(6, 12)):
        part = forward(params, config, TOKENS[:, piece], mask=DOCUMENTS[:, piece], cache=cache)
        cache, parts = part.cache, [*parts, part.logits]
    real = DOCUMENTS > 0
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[real], np.asarray(output.logits)[real], atol=2e-5)
    assert int(cache.index) == 12


@pytest.mark.parametrize("name", MODELS)
def test_a_bfloat16_model_stays_bfloat16_and_close_and_its_router_is_float32(name):
    """What routers read, times their weights, are their scores."""
    _, params, exact = case(name)
    low = config_of(name, dtype="bfloat16")
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, random_params(low))
    output = forward(params, low, TOKENS, mask=DOCUMENTS, collect=(*COLLECT, "load"))
    assert output.hidden.dtype == output.router.inputs.dtype == jnp.bfloat16
    parts = output.logits, output.router.logits, output.router.weights, output.router.load
    assert {part.dtype for part in parts} == {jnp.dtype("float32")}
    inputs, layers = jax.tree.map(lambda x: np.asarray(x, np.float64), (output.router.inputs, params["layers"]))
    assert inputs.shape == (len(low.moe_layers), 8, 12, 16)
    scores = np.einsum("lbsd,lde->lbse", inputs, layers["router"])
    scores = scores + (layers["router_bias"][:, None, None] if low.router_bias else 0)
    np.testing.assert_allclose(output.router.logits, scores, rtol=1e-5, atol=1e-5)
    difference = np.abs(np.asarray(output.logits - exact.logits))[DOCUMENTS > 0]
    assert np.median(difference) < 0.05 * float(np.std(exact.logits)) + 0.02


@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_and_other_documents_change_nothing(name):
    config, params, output = case(name)

    def logits(tokens, documents):
        return np.asarray(forward(params, config, tokens, mask=documents, collect=COLLECT).logits)

    changed = np.where(np.arange(12)[None] < 9, TOKENS, (TOKENS + 1) % 37)
    np.testing.assert_array_equal(logits(changed, DOCUMENTS)[:, :9], np.asarray(output.logits)[:, :9])
    alone, documents = np.zeros_like(TOKENS), np.zeros_like(DOCUMENTS)
    alone[0, :7], documents[0, :7] = TOKENS[0, 5:], 1
    alone[1, :10], documents[1, :10] = TOKENS[1, 2:], 1
    separate = logits(alone, documents)
    np.testing.assert_allclose(separate[0, :7], output.logits[0, 5:], atol=2e-5)
    np.testing.assert_allclose(separate[1, :10], output.logits[1, 2:], atol=2e-5)


def test_a_partial_pass_is_the_beginning_of_the_whole_through_dense_layers():
    config, params, complete = case("latent")
    assert complete.layers.shape[0] == 3 and complete.router.counts.shape == (2, 8)
    part = forward(params, config, TOKENS, mask=DOCUMENTS, collect=("hidden", "counts"), num_layers=2)
    np.testing.assert_allclose(part.hidden, complete.layers[1], atol=1e-5)
    np.testing.assert_array_equal(part.router.counts, complete.router.counts[:1])


def test_first_values_have_the_declared_shapes_and_types():
    for config in (config_of("windows"), config_of("mixer", dtype="bfloat16")):
        trees = init_params(config, jax.random.key(0)), architecture.abstract_params(config)
        got, declared = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in trees)
        assert got == declared and got["layers"]["router"][1] == jnp.float32


def test_first_values_depend_on_the_seed_alone_and_projections_on_the_number_of_inputs():
    a, b, c = (init_params(BASE, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embed"], c["embed"])
    assert not np.array_equal(a["layers"]["q"], a["layers"]["o"].reshape(a["layers"]["q"].shape))
    assert np.all(np.asarray(a["final_norm"]) == 1)
    np.testing.assert_allclose(np.std(a["layers"]["experts"]["gate_up"]), 16**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(a["layers"]["experts"]["down"]), (9 * 2 * 2) ** -0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_layers": (2,), "dense_hidden_size": 8}, "beyond the 2 layers"),
        ({"dense_layers": (0,)}, "need a dense_hidden_size"),
        ({"windows": (3, 3, 3)}, "3 entries for 2 layers"),
        ({"layer_ropes": (0, 1)}, "not among the 1"),
        ({"num_groups": 3}, "must divide num_experts 8"),
        ({"num_groups": 2, "groups_per_token": 3}, "only 2 groups"),
        ({"num_groups": 8, "groups_per_token": 2}, "fewer than experts_per_token 3"),
        ({"router_score": "sparsemixer"}, "chooses 2 experts"),
        ({"rotary_size": 10}, "at most head_size"),
        ({"latent_size": 8}, "latent_size"),
        ({"experts_per_token": 20}, "only 8 experts"),
        ({"num_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"head_size": 7}, "even number"),
    ],
)
def test_switches_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)
