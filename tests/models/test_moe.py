"""The MoE layer is exact: as every expert on every token, in value and gradient. (test_decoder loops over tokens.)"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_jax.models.architecture import ModelConfig
from trace_jax.models.grouped_matmul import implementations
from trace_jax.models.moe import count_and_rank, moe_layer, route

T, D, E, F = 23, 6, 5, 4
IMPLEMENTATIONS = [name for name in implementations("cpu") if name != "auto"]
BASE = ModelConfig(hidden_size=D, num_experts=E, experts_per_token=2, expert_hidden_size=F, grouped_matmul="blocked")
CASES = {
    **{name: dataclasses.replace(BASE, grouped_matmul=name) for name in IMPLEMENTATIONS},
    "top 1, not normalised, shared expert": dataclasses.replace(
        BASE, experts_per_token=1, normalize_top_k=False, shared_hidden_size=3
    ),
    "every expert": dataclasses.replace(BASE, experts_per_token=E),
}


def make_layer(config, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layer = {"router": normal(D, E), "experts": {"gate_up": normal(E, D, 2, F), "down": normal(E, F, D)}}
    if config.shared_hidden_size:
        width = config.shared_hidden_size
        layer["shared"] = {"gate_up": normal(D, 2, width), "down": normal(width, D)}
    return layer, normal(T, D), normal(T, D)


def every_expert_masked(layer, config, x):
    """The same layer written so that plain autodiff is surely right: all experts on all tokens, times a dense gate."""
    probabilities = jax.nn.softmax(x @ layer["router"], axis=-1)
    _, indices = jax.lax.top_k(probabilities, config.experts_per_token)
    gate = probabilities * jnp.sum(jax.nn.one_hot(indices, E), axis=1)
    if config.normalize_top_k:
        gate = gate / jnp.sum(gate, axis=1, keepdims=True)
    gate_up = jnp.einsum("td,edgf->tegf", x, layer["experts"]["gate_up"])
    hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
    y = jnp.einsum("tef,efd,te->td", hidden, layer["experts"]["down"], gate)
    if config.shared_hidden_size:
        gate_up = jnp.einsum("td,dgf->tgf", x, layer["shared"]["gate_up"])
        y = y + (jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]) @ layer["shared"]["down"]
    return y


@pytest.mark.parametrize("case", CASES)
def test_layer_and_its_gradients_equal_those_of_the_dense_layer(case):
    config = CASES[case]
    layer, x, cotangent = make_layer(config)

    def with_gradients(fn):
        def total(layer, x):
            y = fn(layer, x)
            return jnp.sum(y * cotangent), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(layer, x)

    got = with_gradients(lambda layer, x: moe_layer(layer, config, x)[0])
    wanted = with_gradients(lambda layer, x: every_expert_masked(layer, config, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), got, wanted)
    assert float(jnp.max(jnp.abs(got[0][0]["router"]))) > 1e-2


def test_no_gradient_adds_into_tokens_with_a_scatter():
    layer, x, _ = make_layer(BASE)
    gradient = jax.grad(lambda layer, x: jnp.sum(moe_layer(layer, BASE, x)[0]), argnums=(0, 1))
    text = str(jax.make_jaxpr(gradient)(layer, x))
    for shape in (f"f32[{T},{D}] = scatter-add", f"f32[{2 * T},{D}] = scatter-add", f"f32[{T},{E}] = scatter-add"):
        assert shape not in text


def test_router_stays_float32_in_a_bfloat16_model():
    config = dataclasses.replace(BASE, dtype="bfloat16")
    layer, x, _ = make_layer(config)
    low = jnp.asarray(x, jnp.bfloat16)
    routing = route({"router": jnp.asarray(layer["router"])}, config, low)
    assert routing.logits.dtype == routing.weights.dtype == jnp.float32
    exact = np.asarray(low.astype(jnp.float32), np.float64) @ np.asarray(layer["router"], np.float64)
    np.testing.assert_allclose(routing.logits, exact, rtol=1e-5, atol=1e-5)


def test_equal_scores_go_to_the_lower_expert():
    routing = route({"router": jnp.zeros((D, E))}, BASE, jnp.ones((T, D)))
    np.testing.assert_array_equal(routing.indices, np.tile([0, 1], (T, 1)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=40, max_size=40))
def test_count_and_rank_are_a_stable_counting_sort(chosen):
    counts, rank = count_and_rank(jnp.asarray(chosen, jnp.int32), 7)
    counts, rank = np.asarray(counts), np.asarray(rank)
    np.testing.assert_array_equal(counts, np.bincount(chosen, minlength=7))
    place = (np.cumsum(counts) - counts)[chosen] + rank
    np.testing.assert_array_equal(np.argsort(place), np.argsort(chosen, kind="stable"))
