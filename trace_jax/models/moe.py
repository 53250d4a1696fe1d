"""The Mixture-of-Experts layer: router, dispatch, experts, combine. Dropless and exact.

Tokens are copied to one slot per chosen expert, slots are sorted by expert, experts multiply their slots, and each
token sums its slots by gate weight. Neither direction adds into tokens with a scatter: the gradient of the copy
"slot reads its token" is "token reads its K slots and sums", and the other way round, which the two `custom_vjp`
below say. Both are gathers, which are quick everywhere and deterministic.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.config import ModelConfig
from trace_jax.models.grouped_matmul import (
    block_layout,
    block_matmul,
    block_size,
    grouped_matmul,
    resolve_implementation,
)

COUNTING_BLOCK = 128


@partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "probabilities", "indices", "weights"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router of one layer said about T tokens."""

    logits: jax.Array  # f32 [T, E] raw scores
    probabilities: jax.Array  # f32 [T, E] softmax over all experts
    indices: jax.Array  # i32 [T, K] chosen experts by descending score
    weights: jax.Array  # f32 [T, K] what each chosen expert's output is multiplied by


def route(router_DE: jax.Array, config: ModelConfig, x_TD: jax.Array) -> Routing:
    """Scores, softmax over all experts, exact top K, in float32 whatever the type of `x`."""
    logits = jnp.dot(x_TD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    probabilities = jax.nn.softmax(logits, axis=-1)
    indices = jax.lax.top_k(jax.lax.stop_gradient(probabilities), config.experts_per_token)[1]
    # Chosen weights by comparison, not by gather: the gradient of a gather would be a scatter.
    chosen = indices[:, :, None] == jnp.arange(config.num_experts, dtype=jnp.int32)[None, None, :]
    weights = jnp.sum(jnp.where(chosen, probabilities[:, None, :], 0.0), axis=-1)
    if config.normalize_top_k:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits, probabilities, indices, weights)


def gated_mlp(weights: dict, x: jax.Array) -> jax.Array:
    """SwiGLU of x [T,D] with gate_up [D,2,F] and down [F,D]."""
    gate_up = weights["gate_up"]
    return _swiglu(x @ gate_up.reshape(gate_up.shape[0], -1)) @ weights["down"]


def moe_layer(layer: dict, config: ModelConfig, x_TD: jax.Array) -> tuple[jax.Array, Routing]:
    """Output [T,D] of the routed (and shared) experts of one layer, and what the router said.

    Args:
      layer: the arrays of one layer: router [D,E], experts {gate_up [E,D,2,F], down [E,F,D]}, optional shared.
    """
    routing = route(layer["router"], config, x_TD)
    y = experts(layer["experts"], x_TD, routing.indices, routing.weights, implementation=config.grouped_matmul)
    if config.shared_hidden_size:
        y = y + gated_mlp(layer["shared"], x_TD)
    return y, routing


def experts(
    weights: dict, x_TD: jax.Array, indices_TK: jax.Array, gates_TK: jax.Array, *, implementation: str
) -> jax.Array:
    """Sum over the chosen experts of gate times expert: [T,D]."""
    implementation = resolve_implementation(implementation)
    num_experts, D = weights["gate_up"].shape[:2]
    gate_up = weights["gate_up"].reshape(num_experts, D, -1)
    num_slots = indices_TK.size
    size = block_size(num_slots, num_experts) if implementation == "blocked" else 1
    group_sizes, rank = count_and_rank(indices_TK.reshape(-1), num_experts)
    first, block_group = block_layout(group_sizes, num_slots, size)
    place_TK = (first[indices_TK.reshape(-1)] + rank).reshape(indices_TK.shape)
    slot = _slot_at_place(place_TK, block_group.shape[0] * size)
    x_PD = _dispatch(x_TD, slot, place_TK)
    if implementation == "blocked":
        hidden = _swiglu(block_matmul(x_PD.reshape(-1, size, D), gate_up, block_group))
        y_PD = block_matmul(hidden, weights["down"], block_group).reshape(-1, D)
    else:
        hidden = _swiglu(grouped_matmul(x_PD, gate_up, group_sizes, implementation=implementation))
        y_PD = grouped_matmul(hidden, weights["down"], group_sizes, implementation=implementation)
    return _combine(y_PD, gates_TK, slot, place_TK)


@jax.custom_vjp
def _swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2F] -> [..., F]. The backward pass keeps the input only."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_backward(gate_up, gradient):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return (jnp.concatenate([gradient * up * (sigmoid + silu - silu * sigmoid), gradient * silu], axis=-1),)


_swiglu.defvjp(lambda gate_up: (_swiglu(gate_up), gate_up), _swiglu_backward)


def count_and_rank(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """For `expert` i32 [N]: slots per expert i32 [E], and each slot's rank among the slots of its expert i32 [N].

    This is all of a counting sort but the copy; no comparison sort is needed.
    """
    chosen = expert[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    running = _running_sum(chosen)
    return running[-1], jnp.sum(jnp.where(chosen, running, 0), axis=1) - 1


def _running_sum(x: jax.Array) -> jax.Array:
    """Cumulative sum of bool [N,E] along N, i32: within blocks by a triangular matmul (exact), then over blocks."""
    N, num_experts = x.shape
    size = min(COUNTING_BLOCK, N)
    blocks = jnp.pad(x, ((0, -N % size), (0, 0))).astype(jnp.float32).reshape(-1, size, num_experts)
    triangle = jnp.tril(jnp.ones((size, size), jnp.float32))
    inside = jnp.einsum("st,nte->nse", triangle, blocks, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    before = jnp.cumsum(inside[:, -1], axis=0) - inside[:, -1]
    return (inside + before[:, None, :]).reshape(-1, num_experts)[:N]


def _slot_at_place(place_TK: jax.Array, num_places: int) -> jax.Array:
    """i32 [P]: which slot (t*K + k) sits at each place; T*K where none does."""
    num_slots = place_TK.size
    empty = jnp.full((num_places,), num_slots, jnp.int32)
    return empty.at[place_TK.reshape(-1)].set(jnp.arange(num_slots, dtype=jnp.int32), unique_indices=True)


def _rows_of_tokens(x_TD, slot, num_chosen):
    """[P,D]: the row of the token that owns each place's slot; zeros at empty places."""
    return x_TD.at[slot // num_chosen].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _dispatch(x_TD, slot, place_TK):
    return _rows_of_tokens(x_TD, slot, place_TK.shape[1])


def _dispatch_forward(x_TD, slot, place_TK):
    return _dispatch(x_TD, slot, place_TK), place_TK


def _dispatch_backward(place_TK, gradient_PD):
    return jnp.sum(gradient_PD[place_TK], axis=1), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y_PD, gates_TK, slot, place_TK):
    y_TKD = y_PD[place_TK].astype(jnp.float32)
    return jnp.sum(y_TKD * gates_TK[:, :, None], axis=1).astype(y_PD.dtype)


def _combine_forward(y_PD, gates_TK, slot, place_TK):
    return _combine(y_PD, gates_TK, slot, place_TK), (y_PD, gates_TK, slot, place_TK)


def _combine_backward(residuals, gradient_TD):
    y_PD, gates_TK, slot, place_TK = residuals
    gradient_gates = jnp.sum(y_PD[place_TK].astype(jnp.float32) * gradient_TD.astype(jnp.float32)[:, None, :], axis=2)
    gate_at_place = gates_TK.reshape(-1).at[slot].get(mode="fill", fill_value=0)
    rows = _rows_of_tokens(gradient_TD, slot, gates_TK.shape[1]).astype(jnp.float32)
    return (rows * gate_at_place[:, None]).astype(y_PD.dtype), gradient_gates, None, None


_combine.defvjp(_combine_forward, _combine_backward)
