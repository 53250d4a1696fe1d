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
    """(cos, sin) f32 [B or 1, S, C/2] of rotary embedding at `positions` i32 [B or 1, S]."""
    half = config.head_size // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B,S,N,C] turned by its position; the halves of a head are the two coordinates (Hugging Face's layout)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(layer: dict, config: ModelConfig, x: jax.Array, *, cos, sin, mask, cache=None, index=None):
    """Self-attention of one layer.

    Args:
      layer: q [D,H,C], k and v [D,G,C], o [H,C,D].
      x: [B, S, D], normalised.
      cos, sin: f32 [B or 1, S, C/2].
      mask: bool [B or 1, S, M] from `attention_mask`.
      cache: (k, v) [B, M, G, C] of this layer, written at `index` before they are read; or None (M = S).

    Returns:
      (output [B, S, D], (k, v) with the new tokens).
    """
    B, S, _ = x.shape
    G, C = config.num_kv_heads, config.head_size
    q = _rotate(jnp.einsum("bsd,dhc->bshc", x, layer["q"]), cos, sin)
    k = _rotate(jnp.einsum("bsd,dgc->bsgc", x, layer["k"]), cos, sin)
    v = jnp.einsum("bsd,dgc->bsgc", x, layer["v"])
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, index, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, index, axis=1)
    q = q.reshape(B, S, G, config.num_heads // G, C)
    scores = jnp.einsum("bsgrc,bmgc->bgrsm", q, k, preferred_element_type=jnp.float32) * C**-0.5
    probabilities = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgrsm,bmgc->bsgrc", probabilities, v).reshape(B, S, config.num_heads, C)
    return jnp.einsum("bshc,hcd->bsd", mixed, layer["o"]), (k, v)
