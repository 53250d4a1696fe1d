"""Grouped-query attention with rotary positions, document masks and a key/value cache."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.config import ModelConfig

MASKED = -1e30  # a score that softmax turns into exactly 0; finite, so that no gradient is NaN


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "documents", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for decoding. M = room for tokens."""

    k: jax.Array  # [L, B, M, G, C]
    v: jax.Array  # [L, B, M, G, C]
    documents: jax.Array  # i32 [B, M]; 0 = padding or empty
    index: jax.Array  # i32 scalar: places in use


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """Empty cache with room for `length` tokens in each of `batch_size` rows."""
    shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_size)
    zeros = jnp.zeros(shape, config.dtype)
    return Cache(zeros, zeros, jnp.zeros((batch_size, length), jnp.int32), jnp.zeros((), jnp.int32))


def attention_mask(documents: jax.Array | None, length: int, cache: Cache | None = None) -> jax.Array:
    """bool [B or 1, S, M]: whether query s may read key m: same document, and not later.

    Padding (document 0) reads earlier padding, so that every query reads at least itself.

    Args:
      documents: i32 [B, S] document number of each query; None = all of one document.
      cache: with a cache (already holding these tokens' documents) M is its room; without, M = S.
    """
    query = jnp.arange(length, dtype=jnp.int32)
    if cache is None:
        causal = (query[:, None] >= query[None, :])[None]
        return causal if documents is None else causal & (documents[:, :, None] == documents[:, None, :])
    if documents is None:
        raise ValueError("a cache needs the documents of the new tokens")
    key = jnp.arange(cache.documents.shape[1], dtype=jnp.int32)
    causal = (query[:, None] + (cache.index - length) >= key[None, :])[None]
    return causal & (documents[:, :, None] == cache.documents[:, None, :])


def rotary(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) f32 [B or 1, S, 1, 2, C/2] of rotary embedding at `positions` i32 [B or 1, S].

    The halves of a head are the two coordinates (Hugging Face's layout); sin carries the sign of each half.
    """
    half = config.head_size // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :])[:, :, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B,S,N,C] turned by its position. A flip swaps the halves: XLA vectorises it, unlike a concatenation."""
    halves = x.astype(jnp.float32).reshape(*x.shape[:3], 2, x.shape[3] // 2)
    return (halves * cos + jnp.flip(halves, axis=3) * sin).reshape(x.shape).astype(x.dtype)


def attention(layer: dict, config: ModelConfig, x: jax.Array, *, cos, sin, mask, cache: tuple | None = None):
    """Self-attention of one layer.

    Args:
      layer: q [D,H,C], k and v [D,G,C], o [H,C,D].
      x: [B, S, D], normalised.
      cos, sin: from `rotary`.
      mask: bool [B or 1, S, M] from `attention_mask`.
      cache: (k, v [B, M, G, C] of this layer, i32 place where the new ones are written before all are read), or None
        (M = S).

    Returns:
      (output [B, S, D], (k, v) with the new tokens).
    """
    B, S, _ = x.shape
    G, C = config.num_kv_heads, config.head_size
    q = _rotate(jnp.einsum("bsd,dhc->bshc", x, layer["q"]), cos, sin)
    k = _rotate(jnp.einsum("bsd,dgc->bsgc", x, layer["k"]), cos, sin)
    v = jnp.einsum("bsd,dgc->bsgc", x, layer["v"])
    if cache is not None:
        old_k, old_v, index = cache
        k = jax.lax.dynamic_update_slice_in_dim(old_k, k, index, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(old_v, v, index, axis=1)
    q = (q * jnp.asarray(C**-0.5, q.dtype)).reshape(B, S, G, -1, C).transpose(0, 2, 3, 1, 4)
    attend = _causal_attend if cache is None else _attend
    mixed = attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(B, S, config.num_heads, C)
    return jnp.einsum("bshc,hcd->bsd", mixed, layer["o"]), (k, v)


# Below: q [B,G,R,S,C] (R query heads share one key head; already scaled), k and v [B,G,M,C], mask bool [B or 1,S,M].


def _attend_with_normalizer(q, k, v, mask):
    """(mixed values [B,G,R,S,C], log of the softmax's normaliser f32 [B,G,R,S])."""
    B, G, R, S, C = q.shape
    scores = jnp.einsum("bgxc,bgmc->bgxm", q.reshape(B, G, R * S, C), k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, G, R, S, -1) + jnp.where(mask, 0.0, MASKED)[:, None, None]
    largest = jnp.max(scores, axis=-1, keepdims=True)
    exponential = jnp.exp(scores - largest)
    total = jnp.sum(exponential, axis=-1, keepdims=True)
    flat = exponential.astype(v.dtype).reshape(B, G, R * S, -1)
    mixed = jnp.einsum("bgxm,bgmc->bgxc", flat, v, preferred_element_type=jnp.float32).reshape(B, G, R, S, C)
    return (mixed / total).astype(q.dtype), (largest + jnp.log(total))[..., 0]


def _attend(q, k, v, mask):
    return _attend_with_normalizer(q, k, v, mask)[0]


def _attend_gradient(q, k, v, mask, mixed, normalizer, gradient):
    """Gradients of q, k, v. Scores are computed again, keys first: then only one of the products needs a transpose."""
    B, G, R, S, C = q.shape
    M = k.shape[2]
    dot = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1).reshape(B, G, 1, R * S)
    q, gradient = q.reshape(B, G, R * S, C), gradient.reshape(B, G, R * S, C)
    keep = jnp.broadcast_to(jnp.swapaxes(mask, 1, 2)[:, :, None, :], (mask.shape[0], M, R, S)).reshape(-1, 1, M, R * S)
    scores = jnp.einsum("bgmc,bgxc->bgmx", k, q, preferred_element_type=jnp.float32)
    probability = jnp.where(keep, jnp.exp(scores - normalizer.reshape(B, G, 1, R * S)), 0.0)
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
def _causal_attend(q, k, v, mask):
    """As `_attend`, for a mask that is causal and square. No array of size S x S is kept for the backward pass."""
    return _causal_forward(q, k, v, mask)[0]


def _causal_forward(q, k, v, mask):
    blocks = _query_blocks(q.shape[3])
    parts = [
        _attend_with_normalizer(q[:, :, :, b], k[:, :, : b.stop], v[:, :, : b.stop], mask[:, b, : b.stop])
        for b in blocks
    ]
    mixed = jnp.concatenate([part[0] for part in parts], axis=3)
    normalizer = jnp.concatenate([part[1] for part in parts], axis=3)
    return mixed, (q, k, v, mask, mixed, normalizer)


def _causal_backward(residuals, gradient):
    q, k, v, mask, mixed, normalizer = residuals
    gradients_q, gradient_k, gradient_v = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for b in reversed(_query_blocks(q.shape[3])):
        arrays = q[:, :, :, b], k[:, :, : b.stop], v[:, :, : b.stop], mask[:, b, : b.stop]
        of_q, of_k, of_v = _attend_gradient(*arrays, mixed[:, :, :, b], normalizer[:, :, :, b], gradient[:, :, :, b])
        gradients_q.insert(0, of_q)
        rest = ((0, 0), (0, 0), (0, k.shape[2] - b.stop), (0, 0))
        gradient_k, gradient_v = gradient_k + jnp.pad(of_k, rest), gradient_v + jnp.pad(of_v, rest)
    return jnp.concatenate(gradients_q, axis=3), gradient_k, gradient_v, None


_causal_attend.defvjp(_causal_forward, _causal_backward)
