"""Module by module against transformers, so that a failure of test_family_parity names its place.

Each module of ours is fed with what the same module of transformers was fed with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import LENGTH
from transformers_reference import MASK, TOKENS, by_expert, run

from trace_jax.models.attention import attention, attention_mask
from trace_jax.models.decoder import forward
from trace_jax.models.layers import gated_mlp, norm, rotary
from trace_jax.models.moe import experts, moe_layer, route

# Between them: every kind of norm, rotary embedding, attention, router and expert.
FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "phimoe", "afmoe", "ernie4_5_moe", "hunyuan_v1_moe", "glm4_moe")
LAYER = 1  # has experts in all of them


@pytest.fixture(scope="session")
def pair(tiny_model, imported):
    """pair(model_type): (our model, what transformers computed)."""
    return functools.cache(lambda model_type: (imported(model_type), run(tiny_model(model_type))))


@pytest.fixture(params=FAMILIES)
def both(request, pair):
    return pair(request.param)


def layer_of(model, layer=LAYER):
    row = model.config.moe_layers.index(layer)
    return jax.tree.map(lambda array: array[row], model.params["layers"])


def call_of(reference, *names, layer=LAYER):
    """The call of the module of that name (or one of those names) in the layer."""
    return next(
        reference.calls[f"model.layers.{layer}.{n}"] for n in names if f"model.layers.{layer}.{n}" in reference.calls
    )


def flat(array):
    return jnp.asarray(array.reshape(-1, array.shape[-1]))


def assert_close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(ours).reshape(theirs.shape), theirs, rtol=0, atol=tolerance)


def turns(model):
    return rotary(jnp.arange(LENGTH, dtype=jnp.int32)[None], model.config)


def test_norm(both):
    model, reference = both
    call = reference.calls["model.norm"]
    assert_close(norm(model.params, "final_norm", model.config, jnp.asarray(call.inputs[0])), call.output)


def test_rope(both):
    model, reference = both
    cos, sin = reference.calls["model.rotary_emb"].output
    ours = np.asarray(turns(model)[0][:, 0, :, 0])  # [2, S, halves, W/2]
    half = ours.shape[-1]
    assert_close(ours[0, :, 0], cos[0, :, :half])
    assert_close(ours[1, :, 1], sin[0, :, :half])
    assert_close(ours[1, :, 0], -sin[0, :, :half])


def test_attention(both):
    model, reference = both
    config, call = model.config, call_of(reference, "self_attn")
    mask = attention_mask(jnp.asarray(MASK.astype(np.int32)), LENGTH)
    place = jnp.arange(LENGTH, dtype=jnp.int32)
    if config.windows and config.windows[LAYER]:
        mask = mask & (place[:, None] - place[None] < config.windows[LAYER])[None]
    turn = turns(model)[config.layer_ropes[LAYER] if config.layer_ropes else 0]
    ours, _ = attention(layer_of(model), config, jnp.asarray(call.inputs[0]), rope_table=turn, mask=mask)
    assert_close(ours[MASK], call.output[0][MASK])


def test_router(both):
    model, reference = both
    call = call_of(reference, "mlp.router", "mlp.gate")
    logits, weights, indices = (part.reshape(MASK.size, -1) for part in call.output)
    ours = route(layer_of(model), model.config, flat(call.inputs[0]))
    assert_close(ours.logits, logits)
    for mine, theirs in zip(by_expert(ours.indices, ours.weights), by_expert(indices, weights), strict=True):
        assert_close(mine, theirs)
    assert_close(ours.probabilities.sum(axis=1), np.ones(MASK.size))


def test_experts(both):
    model, reference = both
    call = call_of(reference, "mlp.experts")
    x, indices, weights = (flat(part) for part in call.inputs[:3])
    ours = experts(layer_of(model)["experts"], model.config, x, indices.astype(jnp.int32), weights)[0]
    assert_close(ours, call.output)


def test_feed_forward(both):
    model, reference = both
    call = call_of(reference, "mlp")
    theirs = call.output[0] if isinstance(call.output, tuple) else call.output
    assert_close(moe_layer(layer_of(model), model.config, flat(call.inputs[0]))[0], theirs)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_dense_feed_forward(model_type, pair):
    model, reference = pair(model_type)
    call, layer = call_of(reference, "mlp", layer=0), jax.tree.map(lambda array: array[0], model.params["dense"])
    assert_close(gated_mlp(layer["mlp"], model.config, flat(call.inputs[0])), call.output)


def test_block(both):
    model, reference = both
    ours = forward(
        model.params, model.config, jnp.asarray(TOKENS), mask=jnp.asarray(MASK), num_layers=1, collect=("hidden",)
    ).hidden
    assert_close(ours[MASK], reference.layers[0][MASK])
