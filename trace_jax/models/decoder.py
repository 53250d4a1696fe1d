"""The decoder: embedding, layers of attention and experts under scans, final norm, output head.

What the router decided is returned, never recorded on the side; what isn't asked for is never computed.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from trace_jax.models.architecture import ModelConfig
from trace_jax.models.grouped_matmul import KERNELS, flat, resolve_implementation
from trace_jax.models.layers import Cache, attention, attention_mask, gated_mlp, norm, rotary
from trace_jax.models.moe import RouterOutput, moe_layer
from trace_jax.models.sharding import as_they_lie, assembled, rematerialized
from trace_jax.parallel.mesh import TENSOR, as_varying, axis_sizes, sum_over, varying_axes

UNROLLED_LAYERS = 4
ROOM = 29 << 29  # bytes that every device has which large models are planned for, 14.5 of 16 GiB
_OF_TOKENS = ("router_inputs", "router_logits", "indices", "weights")
COLLECT = ("logits", "hidden", "layers", "router", *_OF_TOKENS, "counts", "load", "dropped")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What `forward` was asked for; the rest is None."""

    logits: jax.Array | None  # f32 [B, S, V]
    hidden: jax.Array | None  # [B, S, D]
    layers: jax.Array | None  # [L, B, S, D] output of every layer
    router: RouterOutput
    cache: Cache | None


def output_operands(params: dict, config: ModelConfig, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(hidden [..., D'], matrix [D', V]) whose product is the logits of final hidden states [..., D]; on a mesh, this
    device's share, whose last columns are padding where it doesn't divide. A bias of the head is one more row.
    """
    names = ("embed" if config.tie_embeddings else "head", "head_bias")
    params = assembled({name: params[name] for name in names if name in params}, config)
    matrix = params["embed"].T if config.tie_embeddings else params["head"]
    if config.logits_divisor != 1.0:
        hidden = (hidden.astype(jnp.float32) / config.logits_divisor).astype(hidden.dtype)
    if config.head_bias:
        hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
        matrix = jnp.concatenate([matrix, params["head_bias"][None]], axis=0)
    return hidden, matrix


def _logits(params: dict, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """f32 [..., V]: logits of final hidden states [..., D]."""
    operands = output_operands(params, config, hidden)
    logits = jnp.einsum("...d,dv->...v", *operands, preferred_element_type=jnp.float32)
    devices = axis_sizes().get(TENSOR, 1)
    if devices == 1:
        return logits
    # Each device puts its share in its place, and the sum of all is known to be equal on them.
    width = logits.shape[-1]
    every = as_varying(jnp.zeros((*logits.shape[:-1], width * devices), jnp.float32), varying_axes(logits))
    every = jax.lax.dynamic_update_slice_in_dim(every, logits, jax.lax.axis_index(TENSOR) * width, axis=-1)
    return jax.lax.psum(every, TENSOR)[..., : config.vocab_size]


def _embeddings(params: dict, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """[B, S, D], of tokens."""
    table = assembled({"embed": params["embed"]}, config)["embed"]
    if axis_sizes().get(TENSOR, 1) == 1:
        x = table[tokens]
    else:
        local = tokens - jax.lax.axis_index(TENSOR) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        x = sum_over(jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0), TENSOR)
    return x * jnp.asarray(config.embedding_scale, x.dtype) if config.embedding_scale != 1.0 else x


def forward(
    params: dict,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    branches: jax.Array | None = None,
    count_mask: jax.Array | None = None,
    collect: tuple[str, ...] = ("logits",),
    num_layers: int | None = None,
    cache: Cache | None = None,
    positions: jax.Array | None = None,
    remat: str = "none",
    expert_buffer: float = 0.0,
    experts: jax.Array | None = None,
    gates_added: jax.Array | None = None,
) -> ModelOutput:
    """Runs the decoder on `tokens` i32 [B, S].

    Args:
      mask: [B, S] bool (False = padding) or i32 document numbers (0 = padding). A token attends to the earlier tokens
        of its document in its row, and its rotary position is their number. None: all real, one document a row.
      branches: i32 [B, S], continuations of one text in a row, beside each other: tokens of branch 0 are read by all
        that follow in their document, others by their own branch alone. Not with a cache.
      count_mask: bool [B, S], the positions that "counts" and "load" sum over; default: what isn't padding.
      collect: what to return, of "logits" f32 [B,S,V]; "hidden" [B,S,D] after the final norm (what the loss takes);
        "layers" [L,B,S,D]; "router_logits", "indices", "weights" (together: "router"); "router_inputs" [L,B,S,D];
        "counts"; "load"; "dropped".
      num_layers: run the first `num_layers` layers only; "hidden" is then that layer's output, without final norm,
        and there are no logits.
      cache: keys and values of earlier tokens (`init_cache`); the result's `cache` also holds the new ones.
      positions: i32 [B, S] rotary positions, where the ones that follow from `mask` aren't wanted.
      remat: what the backward pass computes again (`rematerialized`).
      experts: i32 [L, B, S, K], K different experts of every token in every layer of `config.moe_layers` that it uses
        in place of the K best, or -1 K times, where it keeps these. Their gate weights are what the router makes of its
        own scores of these experts.
      gates_added: f32 [L, B, S, K], added to the gate weights of the chosen experts, for a gradient by them.
      expert_buffer: room for the tokens of a device's experts, as a multiple of the balanced load; 0 = for the worst
        case. It matters where experts are split over devices only. What finds no room is counted in "dropped".

    On every device of a mesh (inside `jax.shard_map`, see `on_mesh`), tokens are the device's rows, and outputs theirs.

    Raises:
      ValueError: an unknown name in `collect`, logits of a part of the layers, shapes that don't fit, `experts` with a
        cache, or, outside of `jax.jit`, tokens that the model doesn't know.

    Example:
      >>> tokens = jax.numpy.asarray(retain.tokens[:2])
      >>> out = tj.forward(model.params, model.config, tokens, collect=("logits", "indices"))
      >>> out.logits.shape, out.router.indices.shape
      ((2, 32, 320), (2, 2, 32, 2))
    """
    _check(config, tokens, mask, count_mask, collect, num_layers, experts, cache)
    wanted, (B, S) = {*collect, *(_OF_TOKENS[1:] if "router" in collect else ())}, tokens.shape
    documents, start = None if mask is None else mask.astype(jnp.int32), 0
    key_documents = documents
    if cache is not None:
        documents, start = jnp.ones((B, S), jnp.int32) if documents is None else documents, cache.index
        key_documents = jax.lax.dynamic_update_slice_in_dim(cache.documents, documents, start, axis=1)
    allowed = attention_mask(documents, S, key_documents, start, branches)
    if positions is None:
        positions = jnp.sum(allowed.astype(jnp.int32), axis=-1) - 1
    key_positions = positions
    if cache is not None:
        key_positions = jnp.broadcast_to(positions, (B, S))
        key_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, key_positions, start, axis=1)
    if count_mask is None:
        count_mask = jnp.ones((B, S), bool) if documents is None else documents != 0
    # Window and rotary embedding differ between layers too: numbers that the scan reads. Rope -1 is the last: none.
    rope_tables, per_layer = rotary(positions, config), {}
    if config.windows:
        per_layer["window"] = np.asarray([window or np.iinfo(np.int32).max for window in config.windows], np.int32)
    if config.layer_ropes:
        per_layer["rope"] = np.asarray(config.layer_ropes, np.int32)
    distance = positions[:, :, None] - key_positions[:, None, :]
    in_stacks = {} if cache is None else _experts_in_stacks(params, config, cache, S)

    def layer_step(stack, x, inputs):
        layer, layer_cache, numbers, chosen, added = inputs
        layer = assembled(layer, config, f"{stack}/")
        if "layer" in numbers:
            layer["experts"] = {**in_stacks, "layer": numbers["layer"]}
        rope_table = rope_tables[numbers["rope"]] if config.layer_ropes else rope_tables[0]
        readable = allowed & (distance < numbers["window"]) if config.windows else allowed
        layer_cache = None if cache is None else (*layer_cache, start)
        mix = partial(attention, layer, config, rope_table=rope_table, mask=readable, cache=layer_cache)

        def feed_forward(x):
            flat = x.reshape(B * S, -1)
            if "mlp" in layer:
                return gated_mlp(layer["mlp"], config, flat).reshape(x.shape), None
            chosen_TK, added_TK = (None if a is None else a.reshape(B * S, -1) for a in (chosen, added))
            y, router = moe_layer(layer, config, flat, buffer=expert_buffer, chosen_TK=chosen_TK, added_TK=added_TK)
            return y.reshape(x.shape), _collected(router, config, wanted, count_mask)

        x, keys_values = _residual(layer, config, x, "attention", mix)
        x, router = _residual(layer, config, x, "mlp", feed_forward)
        return x, (router, x if "layers" in wanted else None, None if cache is None else keys_values)

    # The residual stream is equal on the devices of "tensor", and known to be, because every part of it is a sum.
    x, outs = as_varying(_embeddings(params, config, tokens), frozenset(axis_sizes()) - {TENSOR}), []
    kinds = ["dense" if layer in config.dense_layers else "layers" for layer in range(num_layers or config.num_layers)]
    for stack, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):  # runs of one kind
        first, *others = run
        before, depth = kinds[:first].count(stack), 1 + len(others)
        layers, inside = slice(first, first + depth), slice(before, before + depth)
        arrays = {name: part for name, part in params[stack].items() if not (in_stacks and name == "experts")}
        arrays = jax.tree.map(lambda a: a[inside], arrays)  # noqa: B023
        caches = None if cache is None else jax.tree.map(lambda a: a[layers], (cache.k, cache.v))  # noqa: B023
        numbers = {name: jnp.asarray(values[layers]) for name, values in per_layer.items()}
        if in_stacks and stack == "layers":
            numbers["layer"] = jnp.arange(before, before + depth, dtype=jnp.int32)
        chosen = None if experts is None or stack == "dense" else jnp.asarray(experts, jnp.int32)[inside]
        # Few layers are unrolled: then what the backward pass keeps isn't copied into and out of stacks.
        step = rematerialized(partial(layer_step, stack), remat, arrays, config, f"{stack}/")
        added = None if gates_added is None or stack == "dense" else gates_added[inside]
        inputs = arrays, caches, numbers, chosen, added
        x, out = jax.lax.scan(step, x, inputs, unroll=depth if depth <= UNROLLED_LAYERS else 1)
        outs.append(out)
    (routers, outputs, new), join = zip(*outs, strict=True), partial(jax.tree.map, lambda *a: jnp.concatenate(a))
    if num_layers is None:
        x = norm(params, "final_norm", config, x)  # vectors are not cut
    logits = _logits(params, config, x) if "logits" in wanted else None
    if cache is not None:
        # Layers only read the cache, and it is written once, after them: so XLA writes in place and copies nothing.
        write = partial(jax.lax.dynamic_update_slice, start_indices=(0, 0, 0, start, 0))
        k, v = jax.tree.map(write, (cache.k, cache.v), join(*new))
        places = {"documents": key_documents, "positions": key_positions, "index": start + S}
        cache = dataclasses.replace(cache, k=k, v=v, **places)
    router = join(*([router for router in routers if router is not None] or [RouterOutput()]))
    return ModelOutput(logits, x if "hidden" in wanted else None, join(*outputs), router, cache)


def _experts_in_stacks(params: dict, config: ModelConfig, cache: Cache, length: int) -> dict:
    """All layers' experts, to be read where they lie: a token uses few, a copy of a layer has all. Empty where a device
    doesn't compute with them as they lie; for kernels also among many tokens, which other layers' groups would slow.
    """
    implementation = resolve_implementation(config.grouped_matmul)
    if implementation != "blocked" and (implementation not in KERNELS or length > 1):
        return {}
    stacks = as_they_lie(params["layers"]["experts"], config, "layers/experts/")
    if implementation == "blocked":
        return stacks
    # TPUs copy `gate_up` into the layout that the kernel reads, once before many tokens.
    held = (params, cache, {name: stack for name, stack in stacks.items() if name.startswith("gate_up")})
    if implementation == "mosaic" and sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(held)) > ROOM:
        return {}
    return {name: flat(name, stack) for name, stack in stacks.items()}


def _residual(layer: dict, config: ModelConfig, x: jax.Array, name: str, part):
    """(x + scale * part(x), what else the part returns), with the norms called `name` around the part."""
    before = x if config.norm_placement == "post" else norm(layer, f"{name}_norm", config, x)
    y, more = part(before)
    if config.norm_placement != "pre":
        y = norm(layer, f"{name}_post_norm", config, y)
    return x + (y * jnp.asarray(config.residual_scale, y.dtype) if config.residual_scale != 1.0 else y), more


def _check(config, tokens, mask, count_mask, collect, num_layers, experts, cache) -> None:
    """Raises a ValueError that says what of the arguments of `forward` is wrong."""
    if isinstance(collect, str):
        raise ValueError(f"collect is the text {collect!r}; expected a tuple of names, such as ({collect!r},).")
    if unknown := [name for name in collect if name not in COLLECT]:
        raise ValueError(f"collect names {unknown[0]!r}; known: {', '.join(COLLECT)}.")
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}; expected [B, S].")
    if not isinstance(tokens, jax.core.Tracer):
        config.check_tokens(np.asarray(tokens))
    for name, array in (("mask", mask), ("count_mask", count_mask)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} has shape {array.shape}; expected that of tokens, {tokens.shape}.")
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_layers:
            raise ValueError(f"num_layers is {num_layers}; this model has layers 1 to {config.num_layers}.")
        if "logits" in collect:
            raise ValueError('a part of the layers has no logits; ask for collect=("hidden",).')
    if experts is not None:
        if cache is not None:
            raise ValueError("experts are given together with a cache; routing can be forced on whole texts only.")
        expected = (len(config.moe_layers), *tokens.shape, config.experts_per_token)
        if experts.shape != expected or not jnp.issubdtype(experts.dtype, jnp.integer):
            got = f"experts is {experts.dtype} of shape {experts.shape}"
            raise ValueError(f"{got}; expected integers {expected}: [layers that have a router, B, S, K].")


def _collected(router: RouterOutput, config: ModelConfig, wanted: set[str], count_mask: jax.Array) -> RouterOutput:
    """What was asked for of one layer's routing, by row and position; counts and load are sums over the count mask."""
    counted = count_mask.reshape(-1, 1)
    names = [name.removeprefix("router_") for name in _OF_TOKENS if name in wanted]
    parts = {name: getattr(router, name).reshape(*count_mask.shape, -1) for name in names}
    if "counts" in wanted:
        chosen = router.indices[:, :, None] == jnp.arange(config.num_experts, dtype=jnp.int32)[None, None, :]
        parts["counts"] = jnp.sum((chosen & counted[:, :, None]).astype(jnp.int32), axis=(0, 1))
    if "load" in wanted:
        parts["load"] = jnp.sum(jnp.where(counted, router.load, 0.0), axis=0)
    return RouterOutput(**parts, dropped=router.dropped if "dropped" in wanted else None)
