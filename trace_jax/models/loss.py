"""Losses over the vocabulary that never hold all logits at once.

Tokens are taken in chunks. When all fit in one, the softmax of the forward pass is kept for the backward pass (which
is softmax minus target, times the cotangent); with more, each chunk's logits are computed again. Both are exact.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import output_operands
from trace_jax.parallel.mesh import as_varying, varying_axes

MAX_CHUNK_ELEMENTS = 2**24  # of one chunk's logits: 64 MiB in float32


def token_nll(
    params: dict, config: ModelConfig, hidden: jax.Array, targets: jax.Array, *, chunk_size: int | None = None
) -> jax.Array:
    """-log p(target) at every position: f32 [B, S].

    Args:
      hidden: [B, S, D], `forward(..., collect=("hidden",)).hidden`.
      targets: i32 [B, S], the next token of each position; any valid id where there is none (mask the result).
      chunk_size: tokens whose logits exist at a time; default: as many as make `MAX_CHUNK_ELEMENTS` logits.
    """
    hidden, head = output_operands(params, config, hidden)
    axes = varying_axes(head, hidden, targets)
    operands = as_varying((head, hidden.reshape(-1, head.shape[0]), targets.reshape(-1)), axes)
    return jnp.reshape(_nll(_num_chunks(targets.size, head.shape[1], chunk_size), *operands), targets.shape)


def token_kl(
    params_ref: dict,
    hidden_ref: jax.Array,
    params: dict,
    hidden: jax.Array,
    config: ModelConfig,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """KL(p_ref || p) over the vocabulary at every position: f32 [B, S]. The reference takes no gradient.

    Args:
      hidden_ref, hidden: [B, S, D], final hidden states under `params_ref` and `params`.
      chunk_size: as in `token_nll`.
    """
    shape = hidden.shape[:-1]
    hidden_ref, head_ref = jax.lax.stop_gradient(output_operands(params_ref, config, hidden_ref))
    hidden, head = output_operands(params, config, hidden)
    hidden_ref, hidden = (h.reshape(-1, head.shape[0]) for h in (hidden_ref, hidden))
    num_chunks = _num_chunks(hidden.shape[0], head.shape[1], chunk_size)
    operands = as_varying((head_ref, hidden_ref, head, hidden), varying_axes(head_ref, hidden_ref, head, hidden))
    return jnp.reshape(_kl(num_chunks, *operands), shape)


def _num_chunks(num_tokens: int, vocab_size: int, chunk_size: int | None) -> int:
    chunk_size = chunk_size or max(1, MAX_CHUNK_ELEMENTS // vocab_size)
    return -(-num_tokens // chunk_size)


def _logits(hidden_TD, head_DV):
    return jnp.dot(hidden_TD, head_DV, preferred_element_type=jnp.float32)


def _softmax(logits_TV):
    """(softmax f32 [T,V], log of the normaliser f32 [T])."""
    largest = jnp.max(logits_TV, axis=-1, keepdims=True)
    exponential = jnp.exp(logits_TV - largest)
    total = jnp.sum(exponential, axis=-1, keepdims=True)
    return exponential / total, (largest + jnp.log(total))[:, 0]


def _split(num_chunks: int, *arrays):
    """Arrays [T, ...] as [num_chunks, T/num_chunks, ...], padded with zeros at the end."""

    def split(x):
        rows = -(-x.shape[0] // num_chunks)
        padded = jnp.pad(x, ((0, rows * num_chunks - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(num_chunks, rows, *x.shape[1:])

    return tuple(split(x) for x in arrays)


def _backward(num_chunks, head_DV, hidden_TD, gradient_T, others, logit_gradient):
    """(gradient of head, gradient of hidden), chunk by chunk. `logit_gradient(hidden, gradient, *others)` is [C,V]."""

    def step(total, chunk):
        hidden, gradient, *rest = chunk
        gradient_logits = logit_gradient(hidden, gradient, *rest).astype(hidden.dtype)
        gradient_head = jnp.dot(hidden.T, gradient_logits, preferred_element_type=jnp.float32)
        return total + gradient_head, jnp.dot(gradient_logits, head_DV.T)

    start = as_varying(jnp.zeros(head_DV.shape, jnp.float32), varying_axes(hidden_TD))
    chunks = _split(num_chunks, hidden_TD, gradient_T, *others)
    gradient_head, gradient_hidden = jax.lax.scan(step, start, chunks, unroll=num_chunks == 1)
    gradient_hidden = gradient_hidden.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    return gradient_head.astype(head_DV.dtype), gradient_hidden


# --- negative log-likelihood ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(num_chunks, head_DV, hidden_TD, targets_T):
    return _nll_forward(num_chunks, head_DV, hidden_TD, targets_T)[0]


def _nll_chunk(head_DV, hidden_TD, targets_T):
    logits = _logits(hidden_TD, head_DV)
    probabilities, normalizer = _softmax(logits)
    return normalizer - jnp.take_along_axis(logits, targets_T[:, None], axis=1)[:, 0], probabilities


def _nll_forward(num_chunks, head_DV, hidden_TD, targets_T):
    residuals = head_DV, hidden_TD, targets_T
    if num_chunks == 1:
        nll, probabilities = _nll_chunk(*residuals)
        return nll, (*residuals, probabilities)
    chunks = _split(num_chunks, hidden_TD, targets_T)
    nll = jax.lax.map(lambda chunk: _nll_chunk(head_DV, *chunk)[0], chunks)
    return nll.reshape(-1)[: hidden_TD.shape[0]], (*residuals, None)


def _nll_backward(num_chunks, residuals, gradient_T):
    head_DV, hidden_TD, targets_T, kept = residuals

    def logit_gradient(hidden, gradient, targets, *probabilities):
        p = probabilities[0] if probabilities else _softmax(_logits(hidden, head_DV))[0]
        is_target = targets[:, None] == jnp.arange(p.shape[1], dtype=jnp.int32)[None, :]
        return gradient[:, None] * jnp.where(is_target, p - 1.0, p)

    others = (targets_T,) if kept is None else (targets_T, kept)
    return *_backward(num_chunks, head_DV, hidden_TD, gradient_T, others, logit_gradient), None


_nll.defvjp(_nll_forward, _nll_backward)


# --- Kullback-Leibler divergence from a reference ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(num_chunks, head_ref_DV, hidden_ref_TD, head_DV, hidden_TD):
    return _kl_forward(num_chunks, head_ref_DV, hidden_ref_TD, head_DV, hidden_TD)[0]


def _kl_chunk(head_ref_DV, head_DV, hidden_ref_TD, hidden_TD):
    """(KL [T], p - p_ref [T,V], which is the gradient of KL by the logits)."""
    logits_ref, logits = _logits(hidden_ref_TD, head_ref_DV), _logits(hidden_TD, head_DV)
    p_ref, normalizer_ref = _softmax(logits_ref)
    p, normalizer = _softmax(logits)
    kl = jnp.sum(p_ref * (logits_ref - logits), axis=-1) - normalizer_ref + normalizer
    return kl, p - p_ref


def _kl_forward(num_chunks, head_ref_DV, hidden_ref_TD, head_DV, hidden_TD):
    residuals = head_ref_DV, hidden_ref_TD, head_DV, hidden_TD
    if num_chunks == 1:
        kl, difference = _kl_chunk(head_ref_DV, head_DV, hidden_ref_TD, hidden_TD)
        return kl, (*residuals, difference)
    chunks = _split(num_chunks, hidden_ref_TD, hidden_TD)
    kl = jax.lax.map(lambda chunk: _kl_chunk(head_ref_DV, head_DV, *chunk)[0], chunks)
    return kl.reshape(-1)[: hidden_TD.shape[0]], (*residuals, None)


def _kl_backward(num_chunks, residuals, gradient_T):
    head_ref_DV, hidden_ref_TD, head_DV, hidden_TD, kept = residuals

    def logit_gradient(hidden, gradient, other):
        difference = other if kept is not None else _kl_chunk(head_ref_DV, head_DV, other, hidden)[1]
        return gradient[:, None] * difference

    others = (hidden_ref_TD,) if kept is None else (kept,)
    gradients = _backward(num_chunks, head_DV, hidden_TD, gradient_T, others, logit_gradient)
    return jnp.zeros_like(head_ref_DV), jnp.zeros_like(hidden_ref_TD), *gradients


_kl.defvjp(_kl_forward, _kl_backward)
