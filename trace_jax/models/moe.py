"""The Mixture-of-Experts layer: router, dispatch, experts, combine. Dropless and exact.

Tokens are copied to one slot per chosen expert, slots are sorted by expert, experts multiply their slots, and each
token sums its slots by gate weight. Neither direction adds into tokens with a scatter: the gradient of the copy
"slot reads its token" is "token reads its K slots and sums", and the other way round, which the two `custom_vjp`
below say. Both are gathers, which are quick everywhere and deterministic.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trace_jax.models import grouped_matmul as grouped
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.layers import activation, gated_mlp, norm
from trace_jax.parallel.mesh import EXPERT, TENSOR, as_varying, axis_sizes, sum_over, varying_axes

LIKELY = 2.0, 4.0  # times the balanced load of a device's experts: room that is enough, and where it is not
RARE = "more_than_likely"  # what these are called in a program
ONE_OF = "one_of_"  # with a number: how a program calls what reads the weights of one of so many layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterOutput:
    """What routers decided, the same for every family (docs/models.md); what wasn't asked for is None.

    Of one layer [T, ...]; of `forward` the L layers that have a router (`config.moe_layers`), [L, B, S, ...].
    """

    inputs: Any = None  # [..., D] what the router reads, after the norm, in the model's type
    logits: Any = None  # f32 [..., E] raw scores, bias included: before softmax, sigmoid and correction
    indices: Any = None  # i32 [..., K] chosen experts by descending score
    weights: Any = None  # f32 [..., K] what each chosen expert's output is multiplied by
    counts: Any = None  # i32 [L, E] how often each expert was chosen over `count_mask`
    load: Any = None  # f32 [L, E] sum of router probabilities over `count_mask`; of one layer these, [T, E]
    dropped: Any = None  # i32 [L] choices that found no room in `expert_buffer` on this device


def route(layer: dict, config: ModelConfig, x_TD: jax.Array, *, chosen_TK: jax.Array | None = None) -> RouterOutput:
    """Scores all experts, chooses K exactly (or `chosen_TK` i32, K different ones of each token, as if they had been
    the best; where these are -1 it chooses) and weighs them; in float32 whatever the type of `x`.
    """
    logits = jnp.dot(x_TD.astype(jnp.float32), layer["router"], precision=jax.lax.Precision.HIGHEST)
    if config.router_bias:
        logits = logits + layer["router_bias"][None]
    probabilities = router_probabilities(logits, config)
    scores = jax.nn.sigmoid(logits) if config.router_score == "sigmoid" else probabilities
    if config.router_score == "sparsemixer":
        indices, weights = _sparse_mixer(logits, config.router_jitter, chosen_TK)
    else:
        over_chosen = config.router_score == "softmax_top_k"
        choosing = logits if over_chosen else scores
        choosing = choosing + layer["router_correction"][None] if config.router_correction else choosing
        choosing = _best_groups(jax.lax.stop_gradient(choosing), config)
        indices = _unless(chosen_TK, jax.lax.top_k(choosing, config.experts_per_token)[1])
        weights = jax.nn.softmax(_chosen(logits, indices), axis=-1) if over_chosen else _chosen(scores, indices)
    if config.normalize_top_k:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / (jnp.maximum(total, config.normalize_minimum) if config.normalize_minimum else total)
    if config.routing_scale != 1.0:
        weights = weights * config.routing_scale
    return RouterOutput(x_TD, logits, indices, weights, load=probabilities)


def _unless(chosen: jax.Array | None, own: jax.Array) -> jax.Array:
    """What is chosen for each token; its router's own choice where that is -1, or nothing."""
    return own if chosen is None else jnp.where(chosen < 0, own, chosen)


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
        best = jnp.argmax(left, axis=-1).astype(jnp.int32)[:, None]
        index = _unless(None if chosen_TK is None else chosen_TK[:, k : k + 1], best)
        largest = _chosen(logits_TE, index)
        far = (largest - logits_TE) / jnp.maximum(jnp.abs(logits_TE), largest) > 2 * jitter
        probabilities = jax.nn.softmax(jnp.where(jax.lax.stop_gradient(far), -jnp.inf, left), axis=-1)
        indices.append(index)
        weights.append(_chosen(probabilities, index))
        left = jnp.where(index == jnp.arange(left.shape[1], dtype=jnp.int32)[None], -jnp.inf, left)
    return jnp.concatenate(indices, axis=1), jnp.concatenate(weights, axis=1)


def moe_layer(
    layer: dict, config: ModelConfig, x_TD: jax.Array, *, buffer: float = 0.0,
    chosen_TK: jax.Array | None = None, added_TK: jax.Array | None = None,
) -> tuple[jax.Array, RouterOutput]:  # fmt: skip
    """Output [T,D] of the routed (and shared) experts of one layer, and what the router decided.

    Devices of the axis "expert" show each other their tokens, compute those of their own experts, and add up the
    parts of each token. Once K is near the number of devices this moves less than sending a token once for each choice.
    `buffer` is the `expert_buffer` of `forward`, `chosen_TK` as for `route`, `added_TK` what is added to gate weights.
    """
    router = route(layer, config, x_TD, chosen_TK=chosen_TK)
    router = router if added_TK is None else dataclasses.replace(router, weights=router.weights + added_TK)
    weights, operands, size = layer["experts"], (x_TD, router.indices, router.weights), axis_sizes().get(EXPERT, 1)
    if size == 1:
        y, dropped = experts(weights, config, *operands)
    else:
        operands = as_varying(operands, varying_axes(weights))  # gradients are scattered, then summed over "tensor"
        rows, indices, gates = (jax.lax.all_gather(a, EXPERT, axis=0, tiled=True) for a in operands)
        here = weights["down"].shape[-3]
        rooms = rooms_of(config, len(indices), here, size, buffer)
        operands = rows, indices - jax.lax.axis_index(EXPERT) * here, gates
        if buffer or len(rooms) == 1 or grouped.resolve_implementation(config.grouped_matmul) == "blocked":
            y, dropped = experts(weights, config, *operands, room=rooms[0] if buffer else rooms[-1])
        else:
            weights = {name: array for name, array in weights.items() if name != "trained"}
            operands = as_varying((weights, *operands), varying_axes((weights, *operands)))
            y, dropped = _roomy_experts(config, rooms, *operands), jnp.zeros((), jnp.int32)
        dropped = jax.lax.pmax(dropped, TENSOR) if TENSOR in varying_axes(dropped) else dropped  # equal, known to be
        y = jax.lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True)
    y = sum_over(y, TENSOR)
    if config.shared_hidden_size:
        shared = gated_mlp(layer["shared"], config, x_TD)
        if config.shared_gate:
            shared = shared * jax.nn.sigmoid(x_TD @ layer["shared"]["gate"][:, None])
        y = y + shared
    y = norm(layer, "moe_output_norm", config, y) if config.moe_output_norm else y
    return y, dataclasses.replace(router, dropped=dropped)


def rooms_of(config: ModelConfig, tokens: int, here: int, devices: int, buffer: float) -> tuple[int, ...]:
    """For how many choices of `tokens` tokens a device may make room, whose own experts are `here`: what is likely (or
    the `buffer`), and at last the worst case.
    """
    worst, balanced = tokens * min(here, config.experts_per_token), tokens * config.experts_per_token / devices
    likely = (min(worst, math.ceil(times * balanced)) for times in ((buffer,) if buffer else LIKELY))
    return tuple(sorted({worst, *likely}))


def experts(weights: dict, config: ModelConfig, x_TD, indices_TK, gates_TK, *, room: int | None = None) -> tuple:
    """(sum over the chosen experts of gate times expert [T,D], choices that found no room i32 []).

    "trained" bool [E] in `weights` says which experts take a gradient (default: all); "layer" i32 [], that the others
    are stacks of layers [L,E,...] and which of them this is: none is copied out of the stack. `room` says for how many
    choices there is room at least (default: all), and that an index that is no expert of `weights` is another device's.
    """
    implementation, activate = grouped.resolve_implementation(config.grouped_matmul), activation(config)
    trained, layer = weights.get("trained"), weights.get("layer")
    weights = {name: array for name, array in weights.items() if name not in ("trained", "layer")}
    # The backward passes below mix tokens with weights: what is equal on some devices must be known to be summed.
    operands = weights, x_TD, indices_TK, gates_TK
    weights, x_TD, indices_TK, gates_TK = as_varying(operands, varying_axes(operands))
    num_experts, num_slots = weights["down"].shape[-3], indices_TK.size if room is None else room
    size = grouped.block_size(num_slots, num_experts) if (blocked := implementation == "blocked") else 1
    group_sizes, rank = count_and_rank(indices_TK.reshape(-1), num_experts)
    if blocked and trained is not None:  # experts that train are laid out before the others
        expert = jnp.arange(num_experts, dtype=jnp.int32)
        order = jax.lax.sort((jnp.where(trained, 0, 1).astype(jnp.int32), expert), num_keys=1)[1]
        starts, group = grouped.block_layout(group_sizes[order], num_slots, size)
        first, block_group = jnp.zeros_like(starts).at[order].set(starts, unique_indices=True), order[group]
    else:
        first, block_group = grouped.block_layout(group_sizes, num_slots, size)
    num_places = block_group.shape[0] * size
    place_TK, dropped = _places(indices_TK, rank, first, num_places, some_elsewhere=room is not None)
    slots = jnp.arange(place_TK.size, dtype=jnp.int32)
    slot = jnp.full((num_places,), place_TK.size, jnp.int32)  # slot t*K + k at each place; T*K where there is none
    slot = slot.at[place_TK.reshape(-1)].set(slots, mode="drop", unique_indices=True)
    if "down_bias" in weights and axis_sizes().get(TENSOR, 1) > 1:  # of the devices that are summed, on the first
        weights = {**weights, "down_bias": jnp.where(jax.lax.axis_index(TENSOR) == 0, weights["down_bias"], 0)}
    if layer is not None:
        weights = {name: stack.reshape(-1, *stack.shape[2:]) for name, stack in weights.items()}
        block_group = block_group + layer * num_experts
    if blocked:
        used = (group_sizes + (size - 1)) // size
        of_trained = None if trained is None else jnp.sum(jnp.where(trained, used, 0))
        blocks = grouped.make_blocks(slot, block_group, jnp.sum(used), place_TK, weights, of_trained)
        return grouped.blocked_experts(activate, weights, x_TD, gates_TK, blocks), dropped

    if room is not None:  # groups end where the room ends
        group_sizes = jnp.clip(num_slots - (jnp.cumsum(group_sizes) - group_sizes), 0, group_sizes)

    num_groups = weights["down"].shape[0]
    if layer is not None:  # those of other layers have no rows
        every = as_varying(jnp.zeros((num_groups,), jnp.int32), varying_axes(group_sizes))
        group_sizes = jax.lax.dynamic_update_slice(every, group_sizes, (layer * num_experts,))

    def multiply(x, name):
        w = weights[name].reshape(num_groups, x.shape[-1], -1)
        with jax.named_scope(f"{ONE_OF}{num_groups // num_experts}"):
            y = grouped.grouped_matmul(x, w, group_sizes, implementation=implementation)
        if (bias := weights.get(f"{name}_bias")) is None:
            return y
        filled = jnp.arange(num_places, dtype=jnp.int32) < jnp.sum(group_sizes)  # beyond, gradients are undefined
        return y + jnp.where(filled[:, None], bias.reshape(num_groups, -1)[block_group], 0)

    y_PD = multiply(activate(multiply(_dispatch(x_TD, slot, place_TK), "gate_up")), "down")
    return _combine(y_PD, gates_TK, slot, place_TK), dropped


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _roomy_experts(config: ModelConfig, rooms: tuple[int, ...], weights: dict, x_TD, indices_TK, gates_TK):
    """[T,D] of `experts` in the smallest of `rooms` that holds the choices that are here. Backward the hidden values
    are computed again, so that no room is kept.
    """
    return _in_room(
        lambda room: experts(weights, config, x_TD, indices_TK, gates_TK, room=room)[0], rooms, weights, indices_TK
    )


def _in_room(fn: Callable, rooms: tuple[int, ...], weights: dict, indices_TK):
    used = jnp.sum((indices_TK >= 0) & (indices_TK < weights["down"].shape[-3]), dtype=jnp.int32)
    first, *rare = (partial(fn, room) for room in rooms)
    too_small = sum((used > room).astype(jnp.int32) for room in rooms[:-1])
    return jax.lax.switch(too_small, [first, *map(jax.named_scope(RARE), rare)])


def _roomy_experts_backward(config, rooms, operands, gradient_TD):
    weights, x_TD, indices_TK, gates_TK = operands

    def gradients(room):
        def run(weights, x_TD, gates_TK):
            return experts(weights, config, x_TD, indices_TK, gates_TK, room=room)[0]

        return jax.vjp(run, weights, x_TD, gates_TK)[1](gradient_TD)

    of_weights, of_x, of_gates = _in_room(gradients, rooms, weights, indices_TK)
    return of_weights, of_x, None, of_gates


_roomy_experts.defvjp(lambda *operands: (_roomy_experts(*operands), operands[2:]), _roomy_experts_backward)


def _places(indices_TK, rank, first, num_places: int, *, some_elsewhere: bool) -> tuple[jax.Array, jax.Array]:
    """(place of every choice i32 [T,K], choices of own experts that have none i32 []); those without one get unique
    numbers beyond the last.
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
    """For `expert` i32 [N]: slots per expert i32 [E], and each slot's rank among those of its expert i32 [N], all of
    a counting sort but the copy. The running sum over N is a triangular matmul within blocks (exact), then a sum over
    blocks.
    """
    chosen = expert[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    N, size = len(expert), min(128, len(expert))
    blocks = jnp.pad(chosen, ((0, -N % size), (0, 0))).astype(jnp.float32).reshape(-1, size, num_experts)
    triangle = jnp.tril(jnp.ones((size, size), jnp.float32))
    inside = jnp.einsum("st,nte->nse", triangle, blocks, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    before = jnp.cumsum(inside[:, -1], axis=0) - inside[:, -1]
    running = (inside + before[:, None, :]).reshape(-1, num_experts)[:N]
    return running[-1], jnp.sum(jnp.where(chosen, running, 0), axis=1) - 1


def _sums_of_tokens(rows_PD, scale_P, place_TK):
    """[T,D]: for each token the sum of the rows at its places times their scales, added up in float32 by choice.

    Where there are fewer places than choices, because most are other devices', only the rows that are here move: into
    the order of tokens, where each adds to itself those that follow it and are of its token.
    """
    (P, _), (T, K) = rows_PD.shape, place_TK.shape
    here = place_TK < P
    if P >= T * K:
        place = jnp.where(here, place_TK, 0)
        parts = rows_PD[place].astype(jnp.float32) * scale_P[place][:, :, None]
        return jnp.sum(jnp.where(here[:, :, None], parts, 0), axis=1).astype(rows_PD.dtype)
    counts, choices = jnp.sum(here, axis=1, dtype=jnp.int32), jnp.arange(T * K, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts
    rank = (first[:, None] + jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1).reshape(-1)
    rank = jnp.where(here.reshape(-1), rank, P + K + choices)
    choice = jnp.full((P + K,), T * K, jnp.int32).at[rank].set(choices, mode="drop", unique_indices=True)
    token, place = choice // K, place_TK.reshape(-1).at[choice].get(mode="fill", fill_value=0)
    rows, scale, total = rows_PD[place], scale_P[place], jnp.zeros((), jnp.float32)
    own = token[: P + 1]  # the last is no token's, so its total is zero
    for window in (slice(following, following + P + 1) for following in range(K)):
        part = rows[window].astype(jnp.float32) * scale[window, None]
        total = total + jnp.where(((token[window] == own) & (own < T))[:, None], part, 0)
    return total.astype(rows_PD.dtype)[jnp.where(counts > 0, first, P)]


def _rows_of_tokens(x_TD, slot, num_chosen):
    """[P,D]: the row of the token that owns each place's slot; at empty places any."""
    return x_TD[jnp.minimum(slot // num_chosen, x_TD.shape[0] - 1)]


@jax.custom_vjp
def _dispatch(x_TD, slot, place_TK):
    return _rows_of_tokens(x_TD, slot, place_TK.shape[1])


def _dispatch_backward(place_TK, gradient_PD):
    return _sums_of_tokens(gradient_PD, jnp.ones_like(gradient_PD[:, 0], jnp.float32), place_TK), None, None


_dispatch.defvjp(lambda *operands: (_dispatch(*operands), operands[2]), _dispatch_backward)


def _gates_at(slot, gates_TK):
    """f32 [P]; zero at empty places."""
    return gates_TK.reshape(-1).at[slot].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _combine(y_PD, gates_TK, slot, place_TK):
    return _sums_of_tokens(y_PD, _gates_at(slot, gates_TK), place_TK)


def _combine_backward(residuals, gradient_TD):
    y_PD, gates_TK, slot, place_TK = residuals
    rows = _rows_of_tokens(gradient_TD, slot, gates_TK.shape[1]).astype(jnp.float32)
    of_gates = jnp.sum(y_PD.astype(jnp.float32) * rows, axis=1).at[place_TK].get(mode="fill", fill_value=0)
    return (rows * _gates_at(slot, gates_TK)[:, None]).astype(y_PD.dtype), of_gates, None, None


_combine.defvjp(lambda *operands: (_combine(*operands), operands), _combine_backward)
