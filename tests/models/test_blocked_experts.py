"""The loop over blocks against the general path, over biases, activations, types, empty experts and missing slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.models import grouped_matmul
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.moe import experts

T, D, E, F, K = 150, 24, 6, 20, 3
BASE = ModelConfig(hidden_size=D, num_experts=E, experts_per_token=K, expert_hidden_size=F)
CASES = {
    "plain": BASE,
    "biases and limits": dataclasses.replace(BASE, activation="clamped_swiglu", expert_bias=True, swiglu_limit=0.7),
    "bfloat16": dataclasses.replace(BASE, dtype="bfloat16"),
}


def make_inputs(config):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"gate_up": (E, D, 2, F), "down": (E, F, D)}
    if config.expert_bias:
        shapes |= {"gate_up_bias": (E, 2, F), "down_bias": (E, D)}
    weights = {name: (jax.random.normal(next(keys), s) * 0.3).astype(config.dtype) for name, s in shapes.items()}
    x, cotangent = (jax.random.normal(next(keys), (T, D)).astype(config.dtype) for _ in range(2))
    scores = jax.random.normal(next(keys), (T, E)) + jnp.asarray(
        [[0.0, 2.0, 0.0, 0.0, -99.0, 0.0]]
    )  # expert 4 is empty
    gates, indices = jax.lax.top_k(scores, K)
    return weights, x, jax.nn.sigmoid(gates), indices, cotangent


def result(config, cotangent, indices, *operands):
    """(output, gradients of weights, x and gates) of the experts."""

    @jax.jit
    def run(weights, x, gates):
        trained = {"trained": weights.pop("trained")} if "trained" in weights else {}
        y, pull = jax.vjp(lambda w, x, g: experts({**w, **trained}, config, x, indices, g)[0], weights, x, gates)
        return y, *pull(cotangent)

    return run(*operands)


def close(got, wanted, tolerance):
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("case", "blocks"), [("plain", 4), ("biases and limits", 4), ("bfloat16", 1)])
def test_output_and_every_gradient_equal_those_of_every_expert_on_every_token(case, blocks, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "MOST_BLOCKS", blocks)
    weights, x, gates, indices, cotangent = make_inputs(CASES[case])
    got, wanted = (
        result(dataclasses.replace(CASES[case], grouped_matmul=name), cotangent, indices, weights, x, gates)
        for name in ("blocked", "ragged")
    )
    tolerance = 0.1 if case == "bfloat16" else 2e-5
    jax.tree.map(lambda a, b: close(a, b, tolerance), got, wanted)


def test_slots_without_a_place_count_as_zero_and_take_no_gradient():
    weights, x, gates, _, cotangent = make_inputs(CASES["biases and limits"])
    place = jnp.arange(T * K, dtype=jnp.int32).reshape(T, K)
    here = jnp.arange(T) < 70
    slot = jnp.where(place.reshape(-1) < 70 * K, place.reshape(-1), T * K)
    group = jnp.repeat(jnp.arange(E, dtype=jnp.int32), T * K // E // 15)

    def activate(gate_up):
        return gate_up[..., :F] * gate_up[..., F:]

    def total(gates):
        places = jnp.where(here[:, None], place, T * K)
        blocks = grouped_matmul.make_blocks(slot, group, jnp.int32(70 * K // 15), places, weights)
        return jnp.sum(grouped_matmul.blocked_experts(activate, weights, x, gates, blocks) * cotangent)

    gradient = jax.grad(total)(gates)
    assert np.all(gradient[70:] == 0)
    assert np.all(gradient[:70] != 0)
    y, _ = jax.vjp(total, gates.at[70:].set(99.0))
    np.testing.assert_allclose(y, total(gates), rtol=1e-6)


def test_with_less_room_than_slots_nothing_is_lost_uncounted():
    weights, x, gates, indices, _ = make_inputs(BASE)
    blocked, complete = dataclasses.replace(BASE, grouped_matmul="blocked"), []
    expected = jax.jit(lambda: experts(weights, blocked, x, indices, gates)[0])()
    for room in (indices.size - 1, indices.size - 52, indices.size - 103):
        y, dropped = jax.jit(lambda room=room: experts(weights, blocked, x, indices, gates, room=room))()
        complete.append(int(dropped) == 0)
        assert np.allclose(y, expected, atol=1e-5) == complete[-1]
    assert complete[0] and not complete[-1]


@pytest.mark.parametrize(("case", "blocks"), [("biases and limits", 1), ("bfloat16", 4)])
def test_of_experts_that_do_not_train_only_the_weights_take_no_gradient(case, blocks, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "MOST_BLOCKS", blocks)
    weights, x, gates, indices, cotangent = make_inputs(CASES[case])
    config, trained = dataclasses.replace(CASES[case], grouped_matmul="blocked"), np.array([0, 0, 0, 1, 0, 1], bool)
    y, of_weights, *others = result(config, cotangent, indices, {**weights, "trained": trained}, x, gates)
    expected, of_all, *all_others = result(config, cotangent, indices, weights, x, gates)
    tolerance = 0.1 if case == "bfloat16" else 2e-5
    jax.tree.map(lambda a, b: close(a, b, tolerance), (y, *others), (expected, *all_others))
    for name, wanted in of_all.items():
        close(of_weights[name][trained], wanted[trained], tolerance)
