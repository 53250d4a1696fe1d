"""What layers are made of: norms (in float32), rotary position embedding, the gated feed-forward part, and attention.

Attention is causal, grouped-query or multi-head latent, with document masks, windows, sinks and a cache. The first
dimensions of a head turn with position; in latent attention the last.
"""

import dataclasses
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.models.architecture import ModelConfig, Rope
from trace_jax.parallel.mesh import TENSOR, as_varying, share, sum_over, varying_axes

MASKED = -1e30  # a score that softmax turns into exactly 0; finite, so that no gradient is NaN


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, *, width: int | None = None) -> jax.Array:
    """x [..., D] over its root mean square, times weight [D]. `width`: of x on all devices, if split."""
    x32 = x.astype(jnp.float32)
    if width is None or width == x.shape[-1]:
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    else:
        mean = sum_over(jnp.sum(jnp.square(x32), axis=-1, keepdims=True), TENSOR) / width
    x32 = x32 * jax.lax.rsqrt(mean + epsilon)
    return x32.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def norm(params: dict, name: str, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The model's kind of norm of x [..., D], with the weights [D] called `name` in `params`."""
    if config.norm == "rms":
        return rms_norm(x, params[name], config.norm_epsilon)
    weight, bias = (params[n].reshape((1,) * (x.ndim - 1) + params[n].shape) for n in (name, f"{name}_bias"))
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_epsilon)
    return x32.astype(x.dtype) * weight + bias


def rotary(positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Cosines and sines at `positions` i32 [B or 1, S]: f32 [N, 2, B or 1, S, 1, 2, W/2], for each of `config.ropes`
    and, last, for none (`layer_ropes` = -1), which turns nothing. W dimensions turn; both coordinates of a pair stand
    in halves, and the sine carries the sign of each half.
    """
    tables = [_table(positions, rope, config.rotary_width) for rope in config.ropes]
    still = jnp.stack([jnp.ones_like(tables[0][0]), jnp.zeros_like(tables[0][0])])
    return jnp.stack([*tables, still])


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """Radians per position of each of the width/2 pairs, f32."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inverse = 1.0 / (np.float32(rope.theta) ** exponent)
    return inverse / np.asarray(rope.divisors, np.float32) if rope.divisors else inverse


def _table(positions: jax.Array, rope: Rope, width: int) -> jax.Array:
    angle = positions.astype(jnp.float32)[:, :, None] * frequencies(rope, width)[None, None, :]
    amplitude = jnp.float32(rope.amplitude)
    if rope.long_amplitude:
        is_long = jnp.max(positions) >= rope.original_length
        amplitude = jnp.where(is_long, jnp.float32(rope.long_amplitude), amplitude)
    cos, sin = (amplitude * f(angle)[:, :, None, None, :] for f in (jnp.cos, jnp.sin))
    return jnp.stack([jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)])


def rotate(x: jax.Array, table: jax.Array, *, interleaved: bool) -> jax.Array:
    """x [B,S,N,C] with its first W dimensions turned by `table` [2,B,S,1,2,W/2].

    Interleaved pairs come out in halves: queries and keys alike, so that their products are the same. A flip swaps the
    halves: XLA vectorises it, unlike a concatenation.
    """
    width = 2 * table.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    halves = turned.reshape(*turned.shape[:3], *((width // 2, 2) if interleaved else (2, width // 2)))
    halves = (jnp.swapaxes(halves, 3, 4) if interleaved else halves).astype(jnp.float32)
    turned = (halves * table[0] + jnp.flip(halves, axis=3) * table[1]).reshape(turned.shape).astype(x.dtype)
    return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def gated_mlp(weights: dict, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Gated feed-forward of x [T,D] with gate_up [D,2,F], down [F,D] and, where there are, their biases."""
    gate_up = x @ weights["gate_up"].reshape(x.shape[1], -1)
    if "gate_up_bias" in weights:
        gate_up = gate_up + weights["gate_up_bias"].reshape(1, -1)
    y = sum_over(activation(config)(gate_up) @ weights["down"], TENSOR)
    return y + weights["down_bias"][None] if "down_bias" in weights else y


def activation(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """The function [..., 2F] (gates, then ups) -> [..., F] of a feed-forward part."""
    if config.activation == "swiglu":
        return _swiglu
    return partial(_clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit)


def _clamped_swiglu(gate_up: jax.Array, *, alpha: float, limit: float) -> jax.Array:
    """GPT-OSS: both sides are limited, the gate from above only, and 1 is added to the ups."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(gate * alpha)


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding needs of the tokens so far, with room for M. Latent attention keeps the latent and the rotated key
    that all heads share as one key of width R + W, and no values: they are part of the latent.
    """

    k: jax.Array  # [L, B, G, M, C] or [L, B, 1, M, R + W]
    v: jax.Array | None  # [L, B, G, M, C] or None
    documents: jax.Array  # i32 [B, M]; 0 = padding or empty
    positions: jax.Array  # i32 [B, M]
    index: jax.Array  # i32 scalar: places in use


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """Empty cache with room for `length` tokens in each of `batch_size` rows (on a mesh: those of a device)."""
    heads, width = share(config.num_kv_heads, "kv_heads"), config.head_size
    if config.attention == "latent":
        heads, width = 1, config.latent_size + config.rotary_width
    k = jnp.zeros((config.num_layers, batch_size, heads, length, width), config.dtype)
    places = jnp.zeros((batch_size, length), jnp.int32)
    return Cache(k, None if config.attention == "latent" else k, places, places, jnp.zeros((), jnp.int32))


def attention_mask(documents, length: int, key_documents, start: jax.Array | int, branches=None) -> jax.Array:
    """bool [B or 1, S, M]: whether query s may read key m: same document, and not later.

    Padding (document 0) reads earlier padding, so that every query reads at least itself. `documents` i32 [B, S] are
    the queries'; `key_documents` i32 [B, M] hold them from `start` on. Both are None where all are of one document.
    With `branches` i32 [B, S], of queries that are the keys, keys of another branch than 0 are read in their own alone.
    """
    query = jnp.arange(length, dtype=jnp.int32) + start
    key = jnp.arange(length if key_documents is None else key_documents.shape[1], dtype=jnp.int32)
    allowed = (query[:, None] >= key[None, :])[None]
    if key_documents is not None:
        allowed = allowed & (documents[:, :, None] == key_documents[:, None, :])
    if branches is not None:
        allowed = allowed & ((branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :]))
    return allowed


def attention(layer: dict, config: ModelConfig, x: jax.Array, *, rope_table: jax.Array, mask: jax.Array, cache=None):
    """One layer's (self-attention [B, S, D] of normalised x, (k, v) of these tokens for its cache).

    `rope_table` is its entry of `rotary`, `mask` bool [B or 1, S, M] what queries may read, and `cache` its (k, v or
    None, i32 place where these go), or None (M = S).
    """
    mix = _latent_attention if config.attention == "latent" else _grouped_attention
    mixed, keys_values = mix(layer, config, x, rope_table, mask, cache)
    if config.attention_gate:
        mixed = mixed * jax.nn.sigmoid(jnp.einsum("bsd,dhc->bshc", x, layer["attention_gate"]))
    y = sum_over(jnp.einsum("bshc,hcd->bsd", mixed, layer["o"]), TENSOR)
    return (y + layer["o_bias"][None, None] if config.attention_bias == "all" else y), keys_values


def _grouped_attention(layer, config: ModelConfig, x, rope_table, mask, cache):
    """(mixed values [B,S,H,C], (k, v) of the new tokens [B,G,S,C])."""
    x = as_varying(x, varying_axes(layer["q"]) & varying_axes(layer["k"]))  # one sum of three gradients, not three
    q, k, v = (_projection(layer, config, x, name) for name in ("q", "k", "v"))
    q, k = (rotate(a, rope_table, interleaved=config.rope_interleaved) for a in (q, k))
    if config.qk_norm == "head_after_rope":
        q, k = (rms_norm(a, layer[f"{n}_norm"], config.norm_epsilon) for a, n in ((q, "q"), (k, "k")))
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    new, own = (k, v), partial(_read_by_own_heads, config=config, num_heads=q.shape[2])
    cache = None if cache is None else (own(cache[0]), own(cache[1]), cache[2])
    return _attend(layer, config, q, own(k), own(v), mask, cache), new


def _read_by_own_heads(kv, config: ModelConfig, num_heads: int):
    """Keys or values [B,G,M,C] of the heads that this device's queries read; one per query head if not all do so alike.
    Heads split evenly need nothing. Where there are fewer key heads than devices, each device has all of them.
    """
    if num_heads == config.num_heads or kv.shape[1] < config.num_kv_heads:
        return kv
    head = jax.lax.axis_index(TENSOR) * num_heads + jnp.arange(num_heads, dtype=jnp.int32)
    return kv[:, jnp.minimum(head, config.num_heads - 1) // (config.num_heads // config.num_kv_heads)]


def _projection(layer, config: ModelConfig, x, name: str):
    """Query, key or value heads [B,S,N,C] before the rotary embedding: bias, norm, limit, in this order."""
    y = jnp.einsum("bsd,dhc->bshc", x, layer[name])
    if config.attention_bias != "none":
        y = y + layer[f"{name}_bias"][None, None]
    if name != "v" and config.qk_norm == "head":
        y = rms_norm(y, layer[f"{name}_norm"], config.norm_epsilon)
    if name != "v" and config.qk_norm == "full":
        heads = config.num_heads if name == "q" else config.num_kv_heads
        flat, width = y.reshape(*y.shape[:2], -1), heads * config.head_size
        y = rms_norm(flat, layer[f"{name}_norm"].reshape(-1), config.norm_epsilon, width=width).reshape(y.shape)
    return jnp.clip(y, -config.clip_qkv, config.clip_qkv) if config.clip_qkv else y


def _latent_attention(layer, config: ModelConfig, x, rope_table, mask, cache):
    """(mixed values [B,S,H,value_width], (latents and shared keys [B,1,S,R+W], None)). DeepSeek-V2, arXiv 2405.04434.

    Without a cache keys and values are formed for every head. With one, queries are brought into the latent space
    instead (the paper's absorbed form), so that no head's keys are ever kept.
    """
    R, nope_dims, epsilon = config.latent_size, config.head_size - config.rotary_width, config.latent_epsilon

    def down(name):
        y = jnp.einsum("bsd,dr->bsr", x, layer[name])
        return y + layer[f"{name}_bias"][None, None] if config.attention_bias == "all" else y

    if config.query_latent_size:
        q = jnp.einsum("bsr,rhc->bshc", rms_norm(down("q_down"), layer["q_down_norm"], epsilon), layer["q_up"])
    else:
        q = jnp.einsum("bsd,dhc->bshc", x, layer["q"])
    kv = down("kv_down")
    latent = rms_norm(kv[..., :R], layer["kv_down_norm"], epsilon)[:, :, None]
    k_rope = rotate(kv[:, :, None, R:], rope_table, interleaved=config.rope_interleaved)
    q_rope = rotate(q[..., nope_dims:], rope_table, interleaved=config.rope_interleaved)
    k_up, v_up = layer["kv_up"][..., :nope_dims], layer["kv_up"][..., nope_dims:]
    if cache is None:
        k, v = (jnp.einsum("bsr,rhc->bshc", latent[:, :, 0], up) for up in (k_up, v_up))
        shared = jnp.broadcast_to(k_rope, (*k.shape[:3], k_rope.shape[-1]))
        q = jnp.concatenate([q[..., :nope_dims], q_rope], axis=-1)
        k, v = (a.transpose(0, 2, 1, 3) for a in (jnp.concatenate([k, shared], axis=-1), v))
        return _attend(layer, config, q, k, v, mask, None), (None, None)
    q = jnp.concatenate([jnp.einsum("bshc,rhc->bshr", q[..., :nope_dims], k_up), q_rope], axis=-1)
    new = jnp.concatenate([latent, k_rope], axis=-1).transpose(0, 2, 1, 3)
    mixed = _attend(layer, config, q, new, new[..., :R], mask, (cache[0], cache[0][..., :R], cache[2]))
    return jnp.einsum("bshr,rhc->bshc", mixed, v_up), (new, None)


def _attend(layer, config: ModelConfig, q, k, v, mask, cache):
    """Mixed values [B,S,H,Cv] of q [B,S,H,C], k [B,G,S,C], v [B,G,S,Cv], and the k and v [B,G,M,...] of a cache."""
    B, S, H, _ = q.shape
    G, scale = k.shape[1], config.attention_scale or config.head_size**-0.5
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q = q.reshape(B, S, G, H // G, -1).transpose(0, 2, 3, 1, 4)
    sinks = layer["sinks"].astype(jnp.float32).reshape(G, H // G) if config.sinks else None
    if cache is None:
        mixed = _causal_attend(*as_varying((q, k, v, mask, sinks), varying_axes(q)))
    else:  # beside the keys in the cache their own, which aren't there yet: it needn't be copied to hold them
        (cached_k, cached_v, start), place = cache, jnp.arange(mask.shape[2], dtype=jnp.int32)
        own_mask = jax.lax.dynamic_slice_in_dim(mask, start, S, axis=2)
        parts = [(cached_k, cached_v, mask & (place < start)[None, None]), (k, v, own_mask)]
        mixed = _attend_with_normalizer(q, parts, sinks)[0]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, S, H, -1)


# Below: q [B,G,R,S,C] (R query heads share one key head; already scaled), k [B,G,M,C], v [B,G,M,Cv], mask bool
# [B or 1,S,M], sinks f32 [G,R] or None: a head's logit that takes part in the softmax and has no value.


def _attend_with_normalizer(q, parts, sinks):
    """(mixed values [B,G,R,S,Cv], log of the softmax's normaliser f32 [B,G,R,S]), over the keys of all `parts`
    (k, v, mask) together.
    """
    B, G, R, S, C = q.shape
    rows, scores = q.reshape(B, G, R * S, C), []
    for k, _, mask in parts:
        products = jnp.einsum("bgxc,bgmc->bgxm", rows, k, preferred_element_type=jnp.float32)
        scores.append(products.reshape(B, G, R, S, -1) + jnp.where(mask, 0.0, MASKED)[:, None, None])
    largest = reduce(jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in scores])
    if sinks is not None:
        largest = jnp.maximum(largest, sinks[None, :, :, None, None])
    exponentials = [jnp.exp(part - largest) for part in scores]
    total = reduce(jnp.add, [jnp.sum(part, axis=-1, keepdims=True) for part in exponentials])
    if sinks is not None:
        total = total + jnp.exp(sinks[None, :, :, None, None] - largest)
    flat = [part.astype(q.dtype).reshape(B, G, R * S, -1) for part in exponentials]
    product = partial(jnp.einsum, "bgxm,bgmc->bgxc", preferred_element_type=jnp.float32)
    mixed = reduce(jnp.add, [product(part, v) for part, (_, v, _) in zip(flat, parts, strict=True)])
    return (mixed.reshape(B, G, R, S, -1) / total).astype(q.dtype), (largest + jnp.log(total))[..., 0]


def _attend_gradient(q, k, v, mask, normalizer, dot, gradient):
    """Gradients of q, k, v; `dot` f32 [B,G,R,S] is the product of the gradient with the mixed values. Scores are
    computed again, keys first: then only one of the products needs a transpose.
    """
    B, G, R, S, C = q.shape
    M = k.shape[2]
    dot, normalizer = dot.reshape(B, G, 1, R * S), normalizer.reshape(B, G, 1, R * S)
    q, gradient = q.reshape(B, G, R * S, C), gradient.reshape(B, G, R * S, -1)
    keep = jnp.broadcast_to(jnp.swapaxes(mask, 1, 2)[:, :, None, :], (mask.shape[0], M, R, S)).reshape(-1, 1, M, R * S)
    scores = jnp.einsum("bgmc,bgxc->bgmx", k, q, preferred_element_type=jnp.float32)
    probability = jnp.where(keep, jnp.exp(scores - normalizer), 0.0)
    gradient_v = jnp.einsum("bgmx,bgxc->bgmc", probability.astype(v.dtype), gradient)
    of_probability = jnp.einsum("bgmc,bgxc->bgmx", v, gradient, preferred_element_type=jnp.float32)
    of_scores = (probability * (of_probability - dot)).astype(q.dtype)
    gradient_k = jnp.einsum("bgmx,bgxc->bgmc", of_scores, q)
    gradient_q = jnp.einsum("bgmx,bgmc->bgxc", of_scores, k)
    return gradient_q.reshape(B, G, R, S, C), gradient_k, gradient_v


def _query_blocks(length: int) -> list[slice]:
    """Queries in up to 4 blocks: a block reads keys up to its own end only, which skips most of what's not causal."""
    size = -(-length // max(1, min(4, length // 64)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@jax.custom_vjp
def _causal_attend(q, k, v, mask, sinks):
    """As `_attend_with_normalizer`, for a mask that is causal and square. Nothing S x S is kept for backward."""
    return _causal_forward(q, k, v, mask, sinks)[0]


def _causal_forward(q, k, v, mask, sinks):
    parts = [
        _attend_with_normalizer(q[:, :, :, b], [(k[:, :, : b.stop], v[:, :, : b.stop], mask[:, b, : b.stop])], sinks)
        for b in _query_blocks(q.shape[3])
    ]
    mixed, normalizer = (jnp.concatenate(arrays, axis=3) for arrays in zip(*parts, strict=True))
    return mixed, (q, k, v, mask, sinks, mixed, normalizer)


def _causal_backward(residuals, gradient):
    q, k, v, mask, sinks, mixed, normalizer = residuals
    # As a product of matrices: XLA on a CPU takes eight times as long for the sum over so short an axis.
    dot = jnp.einsum("bgrsc,bgrsc->bgrs", gradient, mixed, preferred_element_type=jnp.float32)
    gradients_q, gradient_k, gradient_v = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for b in reversed(_query_blocks(q.shape[3])):
        arrays = q[:, :, :, b], k[:, :, : b.stop], v[:, :, : b.stop], mask[:, b, : b.stop]
        of_q, of_k, of_v = _attend_gradient(*arrays, normalizer[:, :, :, b], dot[:, :, :, b], gradient[:, :, :, b])
        gradients_q.insert(0, of_q)
        rest = ((0, 0), (0, 0), (0, k.shape[2] - b.stop), (0, 0))
        gradient_k, gradient_v = gradient_k + jnp.pad(of_k, rest), gradient_v + jnp.pad(of_v, rest)
    of_sinks = None
    if sinks is not None:
        of_sinks = -jnp.sum(jnp.exp(sinks[None, :, :, None] - normalizer) * dot, axis=(0, 3))
    return jnp.concatenate(gradients_q, axis=3), gradient_k, gradient_v, None, of_sinks


_causal_attend.defvjp(_causal_forward, _causal_backward)
