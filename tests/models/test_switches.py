"""Every switch of the decoder, five models at a time: gradients, caches, devices and types agree.

That a switch means what its family says is tested against transformers in tests/models/families.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from trace_jax.config import ConfigError
from trace_jax.models import attention, decoder
from trace_jax.models.arrays import count_params, init_params, unflatten
from trace_jax.models.attention import init_cache
from trace_jax.models.config import ModelConfig, Rope
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import on_mesh, param_specs, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh

BASE = ModelConfig(
    vocab_size=50, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_size=16, num_experts=8,
    experts_per_token=3, expert_hidden_size=16,
)  # fmt: skip
MODELS = {
    "latent": {
        "attention": "latent", "latent_size": 12, "query_latent_size": 10, "rotary_size": 6, "value_size": 8,
        "attention_bias": "all", "rope_interleaved": True, "dense_layers": (0, 2), "dense_hidden_size": 24,
        "shared_hidden_size": 16, "router_score": "sigmoid", "router_correction": True, "num_groups": 4,
        "groups_per_token": 2, "group_score": "top2", "normalize_minimum": 1e-20, "routing_scale": 2.5,
    },
    "sinks": {
        "sinks": True, "windows": (3, 0, 3, 0), "activation": "clamped_swiglu", "expert_bias": True,
        "swiglu_limit": 0.5, "router_bias": True, "router_score": "softmax_top_k", "normalize_top_k": False,
        "attention_bias": "all",
    },
    "mixer": {
        "norm": "layer", "head_bias": True, "router_score": "sparsemixer", "experts_per_token": 2,
        "normalize_top_k": False, "router_jitter": 0.3, "ropes": (Rope(long_amplitude=1.5, original_length=8),),
    },
    "gated": {
        "norm_placement": "both", "attention_gate": True, "layer_ropes": (0, -1, 0, 1), "windows": (3, 0, 3, 0),
        "ropes": (Rope(), Rope(theta=100.0, divisors=(1.0, 2.0, 3.0, 4.0), amplitude=1.2)), "rotary_size": 8,
        "qk_norm": "head", "embedding_scale": 5.6, "shared_gate": True, "shared_hidden_size": 8, "mlp_bias": True,
    },
    "scaled": {
        "norm_placement": "post", "qk_norm": "full", "clip_qkv": 1.5, "residual_scale": 0.3, "logits_divisor": 3.0,
        "attention_scale": 0.1, "moe_output_norm": True, "tie_embeddings": True, "attention_bias": "qkv",
    },
}  # fmt: skip


forward = jax.jit(decoder.forward, static_argnames=("config", "collect", "num_layers"))


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    """Layers in a scan compile sooner than layers written out; that both are the same is tested in test_decoder."""
    monkeypatch.setattr(decoder, "UNROLLED_LAYERS", 1)


def config_of(name, **changes):
    return dataclasses.replace(BASE, **(MODELS[name] | changes))


def parameters(config):
    """Random values everywhere, also where training starts from ones or zeros."""
    specs = init_params(config, jax.random.key(0))
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * noise.standard_normal(x.shape), x.dtype), specs)


TOKENS = jax.random.randint(jax.random.key(2), (4, 12), 0, BASE.vocab_size)
MASK = jnp.asarray(np.arange(12)[None] < np.array([12, 9, 5, 1])[:, None])


def loss(params, config, tokens, mask):
    hidden = forward(params, config, tokens, mask=mask, collect=("hidden",)).hidden
    return jnp.sum(jnp.where(mask, token_nll(params, config, hidden, tokens), 0.0))


def named_leaves(tree):
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", MODELS)
def test_the_written_gradient_of_attention_is_the_derived_one_and_reaches_every_parameter(name, monkeypatch):
    config, params = config_of(name), parameters(config_of(name))
    written = named_leaves(jax.jit(jax.grad(loss), static_argnums=1)(params, config, TOKENS, MASK))
    monkeypatch.setattr(attention, "_causal_attend", lambda *arrays: attention._attend_with_normalizer(*arrays)[0])
    derived = named_leaves(jax.jit(lambda p: jax.grad(loss)(p, config, TOKENS, MASK))(params))
    for path, gradient in written.items():
        np.testing.assert_allclose(gradient, derived[path], rtol=1e-4, atol=1e-4, err_msg=path)
    assert {path for path, g in written.items() if not np.any(np.asarray(g))} <= {"layers/router_correction"}


@pytest.mark.parametrize("name", MODELS)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_one_pass(name):
    config, params = config_of(name), parameters(config_of(name))
    if name == "mixer":  # its amplitude depends on how far the whole call reaches
        config = dataclasses.replace(config, ropes=(Rope(),))
    whole = forward(params, config, TOKENS, mask=MASK).logits
    cache, parts = init_cache(config, 4, 15), []
    for piece in (slice(0, 5), slice(5, 6), slice(6, 12)):
        output = forward(params, config, TOKENS[:, piece], mask=MASK[:, piece], cache=cache)
        cache, parts = output.cache, [*parts, output.logits]
    real = np.asarray(MASK)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[real], np.asarray(whole)[real], atol=2e-5)


@pytest.mark.parametrize("name", ["latent", "sinks", "gated"])
def test_loss_and_gradient_are_the_same_on_four_devices(name):
    config, params = config_of(name), parameters(config_of(name))

    def gradient(params, tokens, mask):
        return jax.value_and_grad(lambda p: jax.lax.psum(loss(p, config, tokens, mask), BATCH_AXES))(params)

    def on(mesh):
        out_specs = (PartitionSpec(), unflatten(param_specs(config, mesh)))
        run = jax.jit(on_mesh(gradient, config, mesh, out_specs=out_specs))
        return run(placed_params(params, config, mesh), TOKENS, MASK)

    one, four = on(make_mesh(jax.devices()[:1])), on(make_mesh(jax.devices()[:4], expert=2, tensor=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, four)


@pytest.mark.parametrize("name", MODELS)
def test_a_bfloat16_model_stays_bfloat16_and_close(name):
    config = config_of(name)
    exact = forward(parameters(config), config, TOKENS, mask=MASK).logits
    low = config_of(name, dtype="bfloat16")
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), parameters(config), init_params(low, jax.random.key(0)))
    output = forward(params, low, TOKENS, mask=MASK, collect=("logits", "hidden", "router"))
    assert output.hidden.dtype == jnp.bfloat16 and output.router.weights.dtype == jnp.float32
    difference = np.abs(np.asarray(output.logits - exact))[np.asarray(MASK)]
    assert np.median(difference) < 0.05 * float(jnp.std(exact)) + 0.02


@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_and_other_documents_change_nothing(name):
    config, params = config_of(name), parameters(config_of(name))
    documents = jnp.asarray([[1] * 5 + [2] * 7])
    before = forward(params, config, TOKENS[:1], mask=documents).logits
    alone = forward(params, config, TOKENS[:1, 5:9]).logits
    if name != "mixer":
        np.testing.assert_allclose(before[:, 5:9], alone, atol=2e-5)
    changed = forward(params, config, TOKENS[:1].at[:, 9].add(1) % 50, mask=documents).logits
    np.testing.assert_array_equal(before[:, :9], changed[:, :9])


def test_a_partial_pass_is_the_beginning_of_the_whole_through_dense_layers():
    config, params = config_of("latent"), parameters(config_of("latent"))
    whole = forward(params, config, TOKENS, collect=("layers", "counts"))
    assert whole.layers.shape[0] == 4 and whole.router.counts.shape == (2, 8)
    for layers, routers in ((1, 0), (3, 1)):
        part = forward(params, config, TOKENS, collect=("hidden", "counts"), num_layers=layers)
        np.testing.assert_allclose(part.hidden, whole.layers[layers - 1], atol=1e-5)
        if routers:
            np.testing.assert_array_equal(part.router.counts, whole.router.counts[:routers])


def test_a_window_hides_what_lies_further_back():
    config = dataclasses.replace(BASE, num_layers=1, windows=(3,))
    params = parameters(config)
    before = forward(params, config, TOKENS[:1]).logits
    after = forward(params, config, TOKENS[:1].at[:, 2].add(1) % 50).logits
    moved = np.abs(np.asarray(before - after)).max(axis=(0, 2)) > 0
    assert moved.tolist() == [False] * 2 + [True] * 3 + [False] * 7


def test_an_expert_group_left_out_is_never_chosen():
    config = config_of("latent", num_groups=2, groups_per_token=1)
    indices = forward(parameters(config), config, TOKENS, collect=("indices",)).router.indices
    groups = np.asarray(indices) // 4
    assert (groups == groups[..., :1]).all()
    assert len(np.unique(groups)) == 2


def test_active_parameters_leave_out_the_experts_that_are_not_chosen():
    config = config_of("latent")
    total, active = count_params(config)
    assert total - active == 2 * (8 - 3) * (3 * 32 * 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_layers": (4,), "dense_hidden_size": 8}, "beyond the 4 layers"),
        ({"dense_layers": (0,)}, "need a dense_hidden_size"),
        ({"windows": (3, 3)}, "2 entries for 4 layers"),
        ({"layer_ropes": (0, 0, 0, 1)}, "not among the 1"),
        ({"num_groups": 3}, "must divide num_experts 8"),
        ({"num_groups": 8, "groups_per_token": 2}, "fewer than experts_per_token 3"),
        ({"router_score": "sparsemixer"}, "chooses 2 experts"),
        ({"rotary_size": 18}, "at most head_size"),
        ({"latent_size": 8}, "latent_size"),
    ],
)
def test_switches_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)
