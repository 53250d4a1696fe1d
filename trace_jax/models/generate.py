"""Greedy decoding with a key/value cache: one compile per shape."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trace_jax.models.attention import init_cache
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward, output_logits


def generate(
    params: dict,
    config: ModelConfig,
    prompt: jax.Array,
    *,
    lengths: jax.Array | None = None,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> jax.Array:
    """The likeliest next tokens, one after the other.

    Args:
      prompt: i32 [B, P], each row's prompt at its left end.
      lengths: i32 [B], tokens of each prompt, 1 to P (default P); what follows in the row is ignored.
      eos_id: a row that produced this token is finished; it is filled with it to the end.

    Returns:
      i32 [B, max_new_tokens].
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt has shape {prompt.shape}; expected [B, P] with P >= 1.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if lengths is None:
        lengths = jnp.full(prompt.shape[:1], prompt.shape[1], jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    if lengths.shape != prompt.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape}; expected one per prompt, {prompt.shape[:1]}.")
    return _generate(params, config, jnp.asarray(prompt, jnp.int32), lengths, max_new_tokens, eos_id)


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos_id"))
def _generate(params, config, prompt, lengths, max_new_tokens, eos_id):
    B, P = prompt.shape

    def read(tokens, mask, cache) -> tuple[Any, Any]:
        output = forward(params, config, tokens, mask=mask, collect=("hidden",), cache=cache)
        return output.hidden, output.cache

    def likeliest(hidden_BD):
        return jnp.argmax(output_logits(params, config, hidden_BD), axis=-1).astype(jnp.int32)

    # All rows write their n-th new token at place P + n of the cache; a shorter prompt leaves padding before it, which
    # has another document number and so is never read, nor counted in rotary positions.
    real = jnp.arange(P, dtype=jnp.int32)[None, :] < lengths[:, None]
    hidden, cache = read(prompt, real, init_cache(config, B, P + max_new_tokens))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = likeliest(last)
    done = jnp.zeros((B,), bool) if eos_id is None else first == eos_id
    tokens = jnp.full((B, max_new_tokens), 0 if eos_id is None else eos_id, jnp.int32).at[:, 0].set(first)

    def unfinished(state):
        n, _, _, done, _ = state
        return (n < max_new_tokens) & ~jnp.all(done)

    def step(state):
        n, tokens, current, done, cache = state
        hidden, cache = read(current[:, None], None, cache)
        current = likeliest(hidden[:, 0])
        if eos_id is not None:
            current = jnp.where(done, eos_id, current)
            done = done | (current == eos_id)
        return n + 1, jax.lax.dynamic_update_index_in_dim(tokens, current, n, axis=1), current, done, cache

    state = (jnp.ones((), jnp.int32), tokens, first, done, cache)
    return jax.lax.while_loop(unfinished, step, state)[1]
