"""The Mixture-of-Experts layer: router, dispatch, experts, combine. Dropless and exact.

Tokens are copied to one slot per chosen expert, slots are sorted by expert, experts multiply their slots, and each
token sums its slots by gate weight. Neither direction adds into tokens with a scatter: the gradient of the copy
"slot reads its token" is "token reads its K slots and sums", and the other way round, which the two `custom_vjp`
below say. Both are gathers, which are quick everywhere and deterministic.
"""

import dataclasses

import jax
import jax.numpy as jnp

from trace_jax.models.blocked_experts import blocked_experts, make_blocks
from trace_jax.models.config import ModelConfig
from trace_jax.models.grouped_matmul import (
    block_layout,
    block_size,
    grouped_matmul,
    resolve_implementation,
)
from trace_jax.models.layers import activation, gated_mlp, norm
from trace_jax.parallel.mesh import EXPERT, TENSOR, as_varying, axis_sizes, sum_over, varying_axes

COUNTING_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router of one layer said about T tokens. It means the same for every family (docs/models.md)."""

    inputs: jax.Array  # [T, D] what it was asked about
    logits: jax.Array  # f32 [T, E] raw scores, bias included: before softmax, sigmoid and correction
    probabilities: jax.Array  # f32 [T, E] softmax of the logits, or sigmoids over their sum
    indices: jax.Array  # i32 [T, K] chosen experts by descending score
    weights: jax.Array  # f32 [T, K] what each chosen expert's output is multiplied by
    dropped: jax.Array | None = None  # i32 [] choices of this device's experts that found no room


def route(layer: dict, config: ModelConfig, x_TD: jax.Array, *, chosen_TK: jax.Array | None = None) -> Routing:
    """Scores all experts, chooses K exactly and weighs them; in float32 whatever the type of `x`.

    Args:
      layer: router [D,E]; router_bias [E] and router_correction [E] where the model has them.
      chosen_TK: i32, K different experts of each token that are weighed as if they had been the K best.
    """
    logits = jnp.dot(x_TD.astype(jnp.float32), layer["router"], precision=jax.lax.Precision.HIGHEST)
    if config.router_bias:
        logits = logits + layer["router_bias"][None]
    probabilities = router_probabilities(logits, config)
    scores = jax.nn.sigmoid(logits) if config.router_score == "sigmoid" else probabilities
    if config.router_score == "sparsemixer":
        indices, weights = _sparse_mixer(logits, config.router_jitter, chosen_TK)
    else:
        indices = _best(layer, config, logits, scores) if chosen_TK is None else chosen_TK
        if config.router_score == "softmax_top_k":
            weights = jax.nn.softmax(_chosen(logits, indices), axis=-1)
        else:
            weights = _chosen(scores, indices)
    if config.normalize_top_k:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / (jnp.maximum(total, config.normalize_minimum) if config.normalize_minimum else total)
    if config.routing_scale != 1.0:
        weights = weights * config.routing_scale
    return Routing(x_TD, logits, probabilities, indices, weights)


def _best(layer: dict, config: ModelConfig, logits_TE: jax.Array, scores_TE: jax.Array) -> jax.Array:
    """i32 [T,K]: the K best experts, where a correction and groups have their say."""
    choosing = logits_TE if config.router_score == "softmax_top_k" else scores_TE
    choosing = choosing + layer["router_correction"][None] if config.router_correction else choosing
    return jax.lax.top_k(_best_groups(jax.lax.stop_gradient(choosing), config), config.experts_per_token)[1]


def router_probabilities(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """[..., E]: softmax of the logits, or sigmoids over their sum, as the family scores experts."""
    if config.router_score != "sigmoid":
        return jax.nn.softmax(logits, axis=-1)
    scores = jax.nn.sigmoid(logits)
    return scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-20)


def _chosen(scores_TE: jax.Array, indices_TK: jax.Array) -> jax.Array:
    """[T,K]: scores at indices, by comparison, not by gather: the gradient of a gather would be a scatter."""
    is_chosen = indices_TK[:, :, None] == jnp.arange(scores_TE.shape[1], dtype=jnp.int32)[None, None, :]
    return jnp.sum(jnp.where(is_chosen, scores_TE[:, None, :], 0.0), axis=-1)


def _best_groups(choosing_TE: jax.Array, config: ModelConfig) -> jax.Array:
    """Scores with those outside the best groups at minus infinity. DeepSeek-V2 and V3, arXiv 2412.19437 eq. 16."""
    if config.num_groups == 1:
        return choosing_TE
    grouped = choosing_TE.reshape(choosing_TE.shape[0], config.num_groups, -1)
    best = jax.lax.top_k(grouped, 2 if config.group_score == "top2" else 1)[0].sum(axis=-1)
    groups = jax.lax.top_k(best, config.groups_per_token)[1]
    is_best = jnp.any(groups[:, :, None] == jnp.arange(config.num_groups, dtype=jnp.int32)[None, None, :], axis=1)
    return jnp.where(is_best[:, :, None], grouped, -jnp.inf).reshape(choosing_TE.shape)


def _sparse_mixer(logits_TE: jax.Array, jitter: float, chosen_TK: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(indices, weights) [T,2]: the best expert by a softmax over those close to it; again without it.

    SparseMixer-v2 as Phi-3.5-MoE uses it in evaluation, arXiv 2409.12136. A given expert stands where the best one
    would: those that score more than it are close.
    """
    left, indices, weights = logits_TE, [], []
    for k in range(2):
        index = jnp.argmax(left, axis=-1).astype(jnp.int32)[:, None] if chosen_TK is None else chosen_TK[:, k : k + 1]
        largest = _chosen(logits_TE, index)
        far = (largest - logits_TE) / jnp.maximum(jnp.abs(logits_TE), largest) > 2 * jitter
        probabilities = jax.nn.softmax(jnp.where(jax.lax.stop_gradient(far), -jnp.inf, left), axis=-1)
        indices.append(index)
        weights.append(_chosen(probabilities, index))
        left = jnp.where(index == jnp.arange(left.shape[1], dtype=jnp.int32)[None], -jnp.inf, left)
    return jnp.concatenate(indices, axis=1), jnp.concatenate(weights, axis=1)


def moe_layer(
    layer: dict, config: ModelConfig, x_TD: jax.Array, *, buffer: float = 0.0, chosen_TK: jax.Array | None = None
) -> tuple[jax.Array, Routing]:
    """Output [T,D] of the routed (and shared) experts of one layer, and what the router said.

    Args:
      layer: the arrays of one layer: router [D,E], experts {gate_up [E,D,2,F], down [E,F,D]}, optional shared.
      buffer: see `forward`, `expert_buffer`.
      chosen_TK: see `route`.
    """
    routing = route(layer, config, x_TD, chosen_TK=chosen_TK)
    y, dropped = _experts_of_all_devices(layer["experts"], config, x_TD, routing, buffer)
    if config.shared_hidden_size:
        shared = gated_mlp(layer["shared"], config, x_TD)
        if config.shared_gate:
            shared = shared * jax.nn.sigmoid(x_TD @ layer["shared"]["gate"][:, None])
        y = y + shared
    y = norm(layer, "moe_output_norm", config, y) if config.moe_output_norm else y
    return y, dataclasses.replace(routing, dropped=dropped)


def _experts_of_all_devices(weights: dict, config: ModelConfig, x_TD, routing: Routing, buffer: float):
    """(sum over the chosen experts, wherever they are, [T,D]; choices without room on this device i32 []).

    Devices of the axis "expert" show each other their tokens, compute those of their own experts, and add up the
    parts of each token. Once K is near the number of devices this moves less than sending a token once for each choice.
    """
    size = axis_sizes().get(EXPERT, 1)
    operands = x_TD, routing.indices, routing.weights
    if size == 1:
        y, dropped = experts(weights, config, *operands)
        return sum_over(y, TENSOR), dropped
    operands = as_varying(operands, varying_axes(weights))  # gradients are scattered first, then summed over "tensor"
    operands = (jax.lax.all_gather(a, EXPERT, axis=0, tiled=True) for a in operands)
    here = weights["gate_up"].shape[0]
    x_TD, indices, gates = operands
    worst = indices.shape[0] * min(here, config.experts_per_token)
    room = min(worst, -(-int(buffer * indices.size) // size)) if buffer else worst
    first = jax.lax.axis_index(EXPERT) * here
    y, dropped = experts(weights, config, x_TD, indices - first, gates, room=room)
    dropped = jax.lax.pmax(dropped, TENSOR) if TENSOR in varying_axes(dropped) else dropped  # equal, and known to be
    return sum_over(jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True), TENSOR), dropped


def experts(
    weights: dict,
    config: ModelConfig,
    x_TD: jax.Array,
    indices_TK: jax.Array,
    gates_TK: jax.Array,
    *,
    room: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(sum over the chosen experts of gate times expert [T,D], choices that found no room i32 []).

    Args:
      indices_TK: chosen experts. With `room` given, an index that is no expert of `weights` is another device's.
      room: for how many choices there is room at least; default: all of them.
    """
    implementation, activate = resolve_implementation(config.grouped_matmul), activation(config)
    trained = weights.get("trained")
    weights = {name: array for name, array in weights.items() if name != "trained"}
    # The backward passes below mix tokens with weights: what is equal on some devices must be known to be summed.
    given = (weights, x_TD, indices_TK, gates_TK)
    weights, x_TD, indices_TK, gates_TK = as_varying(given, varying_axes(*given))
    num_experts = weights["gate_up"].shape[0]
    num_slots = indices_TK.size if room is None else room
    size = block_size(num_slots, num_experts) if implementation == "blocked" else 1
    group_sizes, rank = count_and_rank(indices_TK.reshape(-1), num_experts)
    order = _trained_first(trained, num_experts) if implementation == "blocked" else None
    first, block_group = _layout(group_sizes, num_slots, size, order)
    place_TK, dropped = _places(indices_TK, rank, first, block_group.shape[0] * size, some_elsewhere=room is not None)
    slot = _slot_at_place(place_TK, block_group.shape[0] * size)
    if "down_bias" in weights:
        weights = {**weights, "down_bias": _added_once(weights["down_bias"])}
    if implementation == "blocked":
        used = (group_sizes + (size - 1)) // size
        of_trained = None if trained is None else jnp.sum(jnp.where(trained, used, 0))
        blocks = make_blocks(slot, block_group, jnp.sum(used), place_TK, weights, of_trained)
        return blocked_experts(weights, activate, x_TD, gates_TK, blocks), dropped

    if room is not None:  # groups end where the room ends
        group_sizes = jnp.clip(num_slots - (jnp.cumsum(group_sizes) - group_sizes), 0, group_sizes)

    def multiply(x, name):
        w = weights[name].reshape(num_experts, x.shape[-1], -1)
        y = grouped_matmul(x, w, group_sizes, implementation=implementation)
        bias = weights.get(f"{name}_bias")
        return y if bias is None else y + bias.reshape(num_experts, -1)[block_group]

    y_PD = multiply(activate(multiply(_dispatch(x_TD, slot, place_TK), "gate_up")), "down")
    return _combine(y_PD, gates_TK, slot, place_TK), dropped


def _trained_first(trained: jax.Array | None, num_experts: int) -> jax.Array | None:
    """i32 [E]: experts in the order in which they are laid out, those of `trained` bool [E] before the others."""
    if trained is None:
        return None
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    return jax.lax.sort((jnp.where(trained, 0, 1).astype(jnp.int32), expert), num_keys=1)[1]


def _layout(group_sizes, num_slots: int, size: int, order) -> tuple[jax.Array, jax.Array]:
    """`block_layout` with the experts in an order: (first row of each expert, expert of each block)."""
    if order is None:
        return block_layout(group_sizes, num_slots, size)
    first, place = block_layout(group_sizes[order], num_slots, size)
    return jnp.zeros_like(first).at[order].set(first, unique_indices=True), order[place]


def _added_once(bias: jax.Array) -> jax.Array:
    """The bias on the first of the devices whose outputs are summed, zero on the others."""
    if axis_sizes().get(TENSOR, 1) == 1:
        return bias
    return jnp.where(jax.lax.axis_index(TENSOR) == 0, bias, 0)


def _places(indices_TK, rank, first, num_places: int, *, some_elsewhere: bool) -> tuple[jax.Array, jax.Array]:
    """(place of every choice i32 [T,K], choices of own experts that have none i32 []).

    A choice without a place gets a number of its own beyond the last, so that all stay unique.
    """
    flat, num_experts = indices_TK.reshape(-1), first.shape[0]
    if not some_elsewhere:
        return (first[flat] + rank).reshape(indices_TK.shape), jnp.zeros((), jnp.int32)
    own = (flat >= 0) & (flat < num_experts)
    place = first[jnp.where(own, flat, 0)] + rank
    fits = own & (place < num_places)
    beyond = num_places + jnp.arange(flat.size, dtype=jnp.int32)
    return jnp.where(fits, place, beyond).reshape(indices_TK.shape), jnp.sum(own & ~fits, dtype=jnp.int32)


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
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    return empty.at[place_TK.reshape(-1)].set(slots, mode="drop", unique_indices=True)


def _rows_at(y_PD, place_TK):
    """[T,K,D]: the row at each choice's place; zeros where it has none."""
    return y_PD.at[place_TK].get(mode="fill", fill_value=0)


def _rows_of_tokens(x_TD, slot, num_chosen):
    """[P,D]: the row of the token that owns each place's slot; zeros at empty places."""
    return x_TD.at[slot // num_chosen].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _dispatch(x_TD, slot, place_TK):
    return _rows_of_tokens(x_TD, slot, place_TK.shape[1])


def _dispatch_forward(x_TD, slot, place_TK):
    return _dispatch(x_TD, slot, place_TK), place_TK


def _dispatch_backward(place_TK, gradient_PD):
    return jnp.sum(_rows_at(gradient_PD, place_TK), axis=1), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y_PD, gates_TK, slot, place_TK):
    y_TKD = _rows_at(y_PD, place_TK).astype(jnp.float32)
    return jnp.sum(y_TKD * gates_TK[:, :, None], axis=1).astype(y_PD.dtype)


def _combine_forward(y_PD, gates_TK, slot, place_TK):
    return _combine(y_PD, gates_TK, slot, place_TK), (y_PD, gates_TK, slot, place_TK)


def _combine_backward(residuals, gradient_TD):
    y_PD, gates_TK, slot, place_TK = residuals
    y_TKD = _rows_at(y_PD, place_TK).astype(jnp.float32)
    gradient_gates = jnp.sum(y_TKD * gradient_TD.astype(jnp.float32)[:, None, :], axis=2)
    gate_at_place = gates_TK.reshape(-1).at[slot].get(mode="fill", fill_value=0)
    rows = _rows_of_tokens(gradient_TD, slot, gates_TK.shape[1]).astype(jnp.float32)
    return (rows * gate_at_place[:, None]).astype(y_PD.dtype), gradient_gates, None, None


_combine.defvjp(_combine_forward, _combine_backward)
