"""The MoE layer is exact, in value and gradient: as every expert on every token, and in blocks as in general.

(test_decoder loops over tokens.) Blocks are compared over biases, activations, types, empty experts and missing slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import random_params
from trace_jax.models import grouped_matmul
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.moe import count_and_rank, experts, moe_layer, route

T, D, E, F, K = 150, 24, 6, 20, 3
BASE = ModelConfig(
    vocab_size=2, num_layers=1, hidden_size=D, num_experts=E, experts_per_token=K, expert_hidden_size=F,
    grouped_matmul="blocked",
)  # fmt: skip
LAYERS = {
    "blocked": BASE,
    "ragged": dataclasses.replace(BASE, grouped_matmul="ragged"),
    "top 1, not normalised, shared expert": dataclasses.replace(
        BASE, experts_per_token=1, normalize_top_k=False, shared_hidden_size=3
    ),
    "every expert": dataclasses.replace(BASE, experts_per_token=E),
}
EXPERTS = {
    "plain": BASE,
    "biases and limits": dataclasses.replace(BASE, activation="clamped_swiglu", expert_bias=True, swiglu_limit=0.7),
    "bfloat16": dataclasses.replace(BASE, dtype="bfloat16"),
}


def make_layer(config):
    """(router, experts and shared expert, x and a cotangent [T, D])."""
    layer = jax.tree.map(lambda array: array[0], random_params(config)["layers"])
    x, cotangent = (jnp.asarray(np.random.default_rng(i).normal(size=(T, D)), config.dtype) for i in (1, 2))
    return {name: layer[name] for name in ("router", "experts", "shared") if name in layer}, x, cotangent


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


@pytest.mark.parametrize("case", LAYERS)
def test_layer_and_its_gradients_equal_those_of_the_dense_layer(case):
    config = LAYERS[case]
    layer, x, cotangent = make_layer(config)

    def with_gradients(fn):
        def total(layer, x):
            y = fn(layer, config, x)
            return jnp.sum(y * cotangent), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(layer, x)

    got, wanted = with_gradients(lambda *operands: moe_layer(*operands)[0]), with_gradients(every_expert_masked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), got, wanted)
    assert float(jnp.max(jnp.abs(got[0][0]["router"]))) > 1e-2


def test_no_gradient_adds_into_tokens_with_a_scatter():
    layer, x, _ = make_layer(BASE)
    gradient = jax.grad(lambda layer, x: jnp.sum(moe_layer(layer, BASE, x)[0]), argnums=(0, 1))
    text = str(jax.make_jaxpr(gradient)(layer, x))
    for shape in (f"f32[{T},{D}] = scatter-add", f"f32[{K * T},{D}] = scatter-add", f"f32[{T},{E}] = scatter-add"):
        assert shape not in text


def test_equal_scores_go_to_the_lower_expert():
    router = route({"router": jnp.zeros((D, E))}, BASE, jnp.ones((T, D)))
    np.testing.assert_array_equal(router.indices, np.tile([0, 1, 2], (T, 1)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=40, max_size=40))
def test_count_and_rank_are_a_stable_counting_sort(chosen):
    counts, rank = map(np.asarray, count_and_rank(jnp.asarray(chosen, jnp.int32), 7))
    np.testing.assert_array_equal(counts, np.bincount(chosen, minlength=7))
    place = (np.cumsum(counts) - counts)[chosen] + rank
    np.testing.assert_array_equal(np.argsort(place), np.argsort(chosen, kind="stable"))


def make_inputs(config):
    """(experts, x, gates, indices, cotangent), where nobody chooses expert 4."""
    layer, x, cotangent = make_layer(config)
    scores = np.random.default_rng(3).normal(np.array([0, 2, 0, 0, -99, 0]), size=(T, E))
    gates, indices = jax.lax.top_k(jnp.asarray(scores, jnp.float32), K)
    return layer["experts"], x, jax.nn.sigmoid(gates), indices, cotangent


def result(config, cotangent, indices, *operands):
    """(output, gradients of weights, x and gates) of the experts."""

    @jax.jit
    def run(weights, x, gates):
        trained = {"trained": weights.pop("trained")} if "trained" in weights else {}
        y, pull = jax.vjp(lambda w, x, g: experts({**w, **trained}, config, x, indices, g)[0], weights, x, gates)
        return y, *pull(cotangent)

    return run(*operands)


def assert_close(got, wanted):
    def close(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance, rtol=tolerance)

    tolerance = 0.1 if got[0].dtype == jnp.bfloat16 else 2e-5
    jax.tree.map(close, got, wanted)


@pytest.mark.parametrize(("case", "blocks"), [("plain", 4), ("biases and limits", 1), ("bfloat16", 4)])
def test_experts_in_blocks_equal_the_general_path_also_where_some_train(case, blocks, monkeypatch):
    """In value and every gradient; then where some train: only the weights of the others take no gradient."""
    monkeypatch.setattr(grouped_matmul, "MOST_BLOCKS", blocks)
    config, trained = EXPERTS[case], np.array([0, 0, 0, 1, 0, 1], bool)
    weights, *rest, indices, cotangent = make_inputs(config)
    in_blocks = result(config, cotangent, indices, weights, *rest)
    general = dataclasses.replace(config, grouped_matmul="ragged")
    assert_close(in_blocks, result(general, cotangent, indices, weights, *rest))
    of_some = result(config, cotangent, indices, {**weights, "trained": jnp.asarray(trained)}, *rest)
    parts = ((y, {name: w[trained] for name, w in dw.items()}, *others) for y, dw, *others in (of_some, in_blocks))
    assert_close(*parts)


@jax.custom_vjp
def spoilt(x, group_sizes):
    """`x` with NaN in the rows beyond the groups, also in its gradient."""
    return jnp.where((jnp.arange(len(x), dtype=jnp.int32) < jnp.sum(group_sizes))[:, None], x, jnp.nan)


spoilt.defvjp(lambda *operands: (spoilt(*operands), operands[1]), lambda sizes, dx: (spoilt(dx, sizes), None))


@pytest.mark.parametrize("room", [T * K, T * K * 3 // 4])
@pytest.mark.parametrize("case", ["plain", "biases and limits", "bfloat16"])
def test_experts_of_one_device_are_those_experts_whatever_stands_beyond_their_rows(case, room, monkeypatch):
    """With as many places as choices and with fewer, as of a device that has half of the experts: equal to all experts
    where the others weigh nothing. Kernels leave rows beyond the groups undefined, both ways.
    """
    config = dataclasses.replace(EXPERTS[case], grouped_matmul="ragged")
    weights, x, gates, indices, cotangent = make_inputs(config)
    own, plain = (indices >= 1) & (indices < 4), grouped_matmul.grouped_matmul

    def run(weights, x, gates, indices, room, own):
        def fn(w, x, g):
            return experts(w, config, x, indices, jnp.where(own, g, 0), room=room)[0]

        y, pull = jax.vjp(fn, weights, x, gates)
        return y, *pull(cotangent)

    y, of_weights, *rest = jax.jit(run, static_argnums=4)(weights, x, gates, indices, None, own)
    monkeypatch.setattr(
        grouped_matmul, "grouped_matmul",
        lambda x, w, sizes, **how: spoilt(plain(spoilt(x, sizes), w, sizes, **how), sizes),
    )  # fmt: skip
    here = {name: w[1:4] for name, w in weights.items()}
    got = jax.jit(run, static_argnums=4)(here, x, gates, indices - 1, room, True)
    assert_close(got, (y, {name: w[1:4] for name, w in of_weights.items()}, *rest))


def test_with_less_room_than_slots_nothing_is_lost_uncounted():
    weights, x, gates, indices, _ = make_inputs(BASE)
    run, complete = jax.jit(experts, static_argnames=("config", "room")), []
    expected, _ = run(weights, BASE, x, indices, gates)
    for room in (indices.size - 1, indices.size - 52, indices.size - 103):
        y, dropped = run(weights, BASE, x, indices, gates, room=room)
        complete.append(int(dropped) == 0)
        assert np.allclose(y, expected, atol=1e-5) == complete[-1]
    assert complete[0] and not complete[-1]
