"""The decoder: embedding, L layers of attention and experts under one scan, final norm, output head.

What the router decided is returned, never recorded on the side; what isn't asked for is never computed.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.attention import Cache, attention, attention_mask, rotary
from trace_jax.models.config import ModelConfig
from trace_jax.models.moe import Routing, moe_layer
from trace_jax.parallel.mesh import as_varying, varying_axes

ROUTER_PARTS = ("router_logits", "indices", "weights", "counts", "load")
UNROLLED_LAYERS = 4
COLLECT = ("logits", "hidden", "layers", "router", *ROUTER_PARTS)


@partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "indices", "weights", "counts", "load"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class RouterOutput:
    """The routers of all layers; parts that weren't asked for are None."""

    logits: jax.Array | None = None  # f32 [L, B, S, E] raw scores
    indices: jax.Array | None = None  # i32 [L, B, S, K] chosen experts by descending score
    weights: jax.Array | None = None  # f32 [L, B, S, K] gate weight of each chosen expert
    counts: jax.Array | None = None  # i32 [L, E] how often each expert was chosen over `count_mask`
    load: jax.Array | None = None  # f32 [L, E] sum of softmax probabilities over `count_mask`


@partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "hidden", "layers", "router", "cache"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What `forward` was asked for; the rest is None."""

    logits: jax.Array | None = None  # f32 [B, S, V]
    hidden: jax.Array | None = None  # [B, S, D]
    layers: jax.Array | None = None  # [L, B, S, D] output of every layer
    router: RouterOutput = RouterOutput()
    cache: Cache | None = None


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """x [..., D] over its root mean square, times weight [D]; computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return x32.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def output_head(params: dict, config: ModelConfig) -> jax.Array:
    """[D, V]: the matrix that turns final hidden states into logits."""
    return params["embed"].T if config.tie_embeddings else params["head"]


def forward(
    params: dict,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    count_mask: jax.Array | None = None,
    collect: tuple[str, ...] = ("logits",),
    num_layers: int | None = None,
    cache: Cache | None = None,
    positions: jax.Array | None = None,
) -> ModelOutput:
    """Runs the decoder on `tokens` i32 [B, S].

    Args:
      mask: [B, S] bool (False = padding) or i32 document numbers (0 = padding). A token attends to the earlier tokens
        of its document in its row, and its rotary position is their number. None: all real, one document a row.
      count_mask: bool [B, S], the positions that "counts" and "load" sum over; default: what isn't padding.
      collect: what to return, of "logits" f32 [B,S,V]; "hidden" [B,S,D] after the final norm (what the loss takes);
        "layers" [L,B,S,D]; "router_logits", "indices", "weights" (together: "router"); "counts"; "load".
      num_layers: run the first `num_layers` layers only; "hidden" is then that layer's output, without final norm,
        and there are no logits.
      cache: keys and values of earlier tokens (`init_cache`); the result's `cache` also holds the new ones.
      positions: i32 [B, S] rotary positions, where the ones that follow from `mask` aren't wanted.

    Raises:
      ValueError: an unknown name in `collect`, logits of a part of the layers, or shapes that don't fit.
    """
    wanted = _check(config, tokens, mask, count_mask, collect, num_layers)
    B, S = tokens.shape
    documents = None if mask is None else mask.astype(jnp.int32)
    if cache is not None:
        documents = jnp.ones((B, S), jnp.int32) if documents is None else documents
        new_documents = jax.lax.dynamic_update_slice_in_dim(cache.documents, documents, cache.index, axis=1)
        cache = dataclasses.replace(cache, documents=new_documents, index=cache.index + S)
    allowed = attention_mask(documents, S, cache)
    if positions is None:
        positions = jnp.sum(allowed.astype(jnp.int32), axis=-1) - 1
    if count_mask is None:
        count_mask = jnp.ones((B, S), bool) if documents is None else documents != 0
    cos, sin = rotary(positions, config)

    def layer_step(x, layer_and_cache):
        layer, layer_cache = layer_and_cache
        if cache is not None:
            layer_cache = (*layer_cache, cache.index - S)
        normed = rms_norm(x, layer["attention_norm"], config.norm_epsilon)
        mixed, keys_values = attention(layer, config, normed, cos=cos, sin=sin, mask=allowed, cache=layer_cache)
        x = x + mixed
        normed = rms_norm(x, layer["mlp_norm"], config.norm_epsilon)
        y, routing = moe_layer(layer, config, normed.reshape(B * S, -1))
        x = x + y.reshape(x.shape)
        out = _router_parts(routing, wanted, count_mask)
        if "layers" in wanted:
            out["layers"] = x
        if cache is not None:
            out["cache"] = keys_values
        return x, out

    layers, caches = params["layers"], None if cache is None else (cache.k, cache.v)
    if num_layers is not None:
        layers, caches = jax.tree.map(lambda a: a[:num_layers], (layers, caches))
    x = as_varying(params["embed"][tokens], varying_axes(params, tokens, mask, cache))
    # Few layers are unrolled: then what the backward pass keeps isn't copied into and out of stacks.
    depth = layers["router"].shape[0]
    x, out = jax.lax.scan(layer_step, x, (layers, caches), unroll=depth if depth <= UNROLLED_LAYERS else 1)
    if num_layers is None:
        x = rms_norm(x, params["final_norm"], config.norm_epsilon)
    if cache is not None:
        cache = _with_layers(cache, *out["cache"])
    logits = None
    if "logits" in wanted:
        logits = jnp.einsum("bsd,dv->bsv", x, output_head(params, config), preferred_element_type=jnp.float32)
    router = RouterOutput(logits=out.get("router_logits"), **{name: out.get(name) for name in ROUTER_PARTS[1:]})
    return ModelOutput(logits, x if "hidden" in wanted else None, out.get("layers"), router, cache)


def _check(config, tokens, mask, count_mask, collect, num_layers) -> frozenset:
    """The names in `collect` with "router" spelt out, or a ValueError that says what is wrong."""
    if isinstance(collect, str):
        raise ValueError(f"collect is the text {collect!r}; expected a tuple of names, such as ({collect!r},).")
    unknown = [name for name in collect if name not in COLLECT]
    if unknown:
        raise ValueError(f"collect names {unknown[0]!r}; known: {', '.join(COLLECT)}.")
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}; expected [B, S].")
    for name, array in (("mask", mask), ("count_mask", count_mask)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} has shape {array.shape}; expected that of tokens, {tokens.shape}.")
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_layers:
            raise ValueError(f"num_layers is {num_layers}; this model has layers 1 to {config.num_layers}.")
        if "logits" in collect:
            raise ValueError('a part of the layers has no logits; ask for collect=("hidden",).')
    wanted = frozenset(collect)
    return wanted | {"router_logits", "indices", "weights"} if "router" in wanted else wanted


def _router_parts(routing: Routing, wanted: frozenset, count_mask: jax.Array) -> dict:
    """The parts of one layer's routing that were asked for; counts and load are sums over the count mask."""
    B, S = count_mask.shape
    num_experts = routing.logits.shape[-1]
    parts = {}
    for name, value in (("router_logits", routing.logits), ("indices", routing.indices), ("weights", routing.weights)):
        if name in wanted:
            parts[name] = value.reshape(B, S, -1)
    counted = count_mask.reshape(-1)
    if "counts" in wanted:
        chosen = routing.indices[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None, :]
        parts["counts"] = jnp.sum((chosen & counted[:, None, None]).astype(jnp.int32), axis=(0, 1))
    if "load" in wanted:
        parts["load"] = jnp.sum(jnp.where(counted[:, None], routing.probabilities, 0.0), axis=0)
    return parts


def _with_layers(cache: Cache, k: jax.Array, v: jax.Array) -> Cache:
    """`cache` with the first layers' keys and values replaced (all of them unless the pass stopped early)."""
    if k.shape[0] < cache.k.shape[0]:
        k, v = cache.k.at[: k.shape[0]].set(k), cache.v.at[: v.shape[0]].set(v)
    return dataclasses.replace(cache, k=k, v=v)
