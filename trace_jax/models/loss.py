"""Losses over the vocabulary that never hold all logits at once.

Tokens are taken in chunks. When all fit in one, the softmax of the forward pass is kept for the backward pass (which
is softmax minus target, times the cotangent); with more, each chunk's logits are computed again. Both are exact.
Where a mesh splits the vocabulary, each device has the logits of its share, and sums over devices complete them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trace_jax.models.attention import MASKED
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import output_operands
from trace_jax.models.vocabulary import Vocabulary
from trace_jax.parallel.mesh import TENSOR, as_varying, axis_sizes, varying_axes

VocabularyFunction = Callable[[Vocabulary, Vocabulary | None, Mapping[str, jax.Array]], jax.Array]
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
    return jnp.reshape(_nll(_pieces(config, targets.size, head, chunk_size), *operands), targets.shape)


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
    pieces = _pieces(config, hidden.shape[0], head, chunk_size)
    operands = as_varying((head_ref, hidden_ref, head, hidden), varying_axes(head_ref, hidden_ref, head, hidden))
    return jnp.reshape(_kl(pieces, *operands), shape)


def vocabulary_loss(
    fn: VocabularyFunction,
    numbers: Mapping[str, jax.Array],
    params: dict,
    config: ModelConfig,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    params_ref: dict | None = None,
    hidden_ref: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """What `fn` makes of the logits at every position: f32 [B, S].

    Args:
      fn: (vocabulary of the model, of the reference or None, numbers) -> f32 [T], for any number of tokens T.
      numbers: f32 [], by name. They and the reference take no gradient.
      hidden, targets, chunk_size: as in `token_nll`; params_ref, hidden_ref: of the reference, where `fn` reads it.
    """
    hidden, head = output_operands(params, config, hidden)
    operands = [head, hidden.reshape(-1, head.shape[0]), targets.reshape(-1)]
    if params_ref is not None and hidden_ref is not None:
        hidden_ref, head_ref = output_operands(params_ref, config, hidden_ref)
        operands += [head_ref, hidden_ref.reshape(-1, head_ref.shape[0])]
    operands = as_varying(tuple(operands), varying_axes(*operands))
    pieces = _pieces(config, targets.size, head, chunk_size)
    return jnp.reshape(_of_vocabulary(pieces, fn, dict(numbers), *operands), targets.shape)


def token_scores(
    params: dict,
    config: ModelConfig,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    moments: bool = False,
    chunk_size: int | None = None,
) -> dict[str, jax.Array]:
    """What is told of a target by the distribution at its place, without gradients; each [B, S].

    Args:
      hidden, targets, chunk_size: as in `token_nll`.
      moments: whether the mean and the variance of the log-probability are wanted.

    Returns:
      log_prob f32, nats; greedy bool: no other token is likelier; with `moments` also mean and variance f32 of
      log p(v) over tokens v drawn from the model's own distribution p.
    """
    hidden, head = output_operands(params, config, hidden)
    operands = as_varying(
        (head, hidden.reshape(-1, head.shape[0]), targets.reshape(-1)), varying_axes(head, hidden, targets)
    )
    head, hidden, flat = operands
    pieces = _pieces(config, targets.size, head, chunk_size)

    def chunk(parts):
        hidden, targets = parts
        vocabulary = _vocabulary(pieces, head, _logits(pieces, hidden, head), targets)
        log_probs = vocabulary.logits - vocabulary.log_normalizer(vocabulary.logits)[:, None]
        found = {"log_prob": vocabulary.of_target(log_probs), "greedy": vocabulary.is_likeliest()}
        if moments:
            p = jnp.exp(log_probs)
            found["mean"] = vocabulary.total(p * log_probs)
            found["variance"] = vocabulary.total(p * jnp.square(log_probs - found["mean"][:, None]))
        return found

    found = jax.lax.map(chunk, _split(pieces.chunks, hidden, flat))
    return {name: x.reshape(-1)[: flat.shape[0]].reshape(targets.shape) for name, x in found.items()}


class _Pieces(NamedTuple):
    """How the logits [T, V] are cut: T into chunks one after the other, V over devices or not, with padding or not."""

    chunks: int
    vocab_size: int
    split: bool
    padded: bool


def _pieces(config: ModelConfig, num_tokens: int, head_DV: jax.Array, chunk_size: int | None) -> _Pieces:
    chunk_size = chunk_size or max(1, MAX_CHUNK_ELEMENTS // head_DV.shape[1])
    devices = axis_sizes().get(TENSOR, 1)
    padded = devices > 1 and head_DV.shape[1] * devices != config.vocab_size
    return _Pieces(-(-num_tokens // chunk_size), config.vocab_size, devices > 1, padded)


def _first(pieces: _Pieces, head_DV) -> jax.Array | int:
    """The token that the first column of this device's logits stands for."""
    return jax.lax.axis_index(TENSOR) * head_DV.shape[1] if pieces.split else 0


def _logits(pieces: _Pieces, hidden_TD, head_DV):
    logits = jnp.dot(hidden_TD, head_DV, preferred_element_type=jnp.float32)
    if not pieces.padded:
        return logits
    token = _first(pieces, head_DV) + jnp.arange(head_DV.shape[1], dtype=jnp.int32)
    return jnp.where((token < pieces.vocab_size)[None], logits, MASKED)


def _softmax(pieces: _Pieces, logits_TV):
    """(softmax f32 [T,V], log of the normaliser f32 [T])."""
    largest = jnp.max(logits_TV, axis=-1, keepdims=True)
    largest = jax.lax.pmax(largest, TENSOR) if pieces.split else largest
    exponential = jnp.exp(logits_TV - largest)
    total = jnp.sum(exponential, axis=-1, keepdims=True)
    total = jax.lax.psum(total, TENSOR) if pieces.split else total
    return exponential / total, (largest + jnp.log(total))[:, 0]


def _split(num_chunks: int, *arrays):
    """Arrays [T, ...] as [num_chunks, T/num_chunks, ...], padded with zeros at the end."""

    def split(x):
        rows = -(-x.shape[0] // num_chunks)
        padded = jnp.pad(x, ((0, rows * num_chunks - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(num_chunks, rows, *x.shape[1:])

    return tuple(split(x) for x in arrays)


def _backward(pieces, head_DV, hidden_TD, gradient_T, others, logit_gradient):
    """(gradient of head, gradient of hidden), chunk by chunk. `logit_gradient(hidden, gradient, *others)` is [C,V]."""

    def step(total, chunk):
        hidden, gradient, *rest = chunk
        gradient_logits = logit_gradient(hidden, gradient, *rest).astype(hidden.dtype)
        gradient_head = jnp.dot(hidden.T, gradient_logits, preferred_element_type=jnp.float32)
        return total + gradient_head, jnp.dot(gradient_logits, head_DV.T)

    start = as_varying(jnp.zeros(head_DV.shape, jnp.float32), varying_axes(hidden_TD))
    chunks = _split(pieces.chunks, hidden_TD, gradient_T, *others)
    gradient_head, gradient_hidden = jax.lax.scan(step, start, chunks, unroll=pieces.chunks == 1)
    gradient_hidden = gradient_hidden.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    return gradient_head.astype(head_DV.dtype), gradient_hidden


# --- negative log-likelihood ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(pieces, head_DV, hidden_TD, targets_T):
    return _nll_forward(pieces, head_DV, hidden_TD, targets_T)[0]


def _nll_chunk(pieces, head_DV, hidden_TD, targets_T):
    logits = _logits(pieces, hidden_TD, head_DV)
    probabilities, normalizer = _softmax(pieces, logits)
    if not pieces.split:
        return normalizer - jnp.take_along_axis(logits, targets_T[:, None], axis=1)[:, 0], probabilities
    of_target = jnp.sum(jnp.where(_is_target(pieces, head_DV, targets_T), logits, 0.0), axis=1)
    return normalizer - jax.lax.psum(of_target, TENSOR), probabilities


def _is_target(pieces: _Pieces, head_DV, targets_T):
    """bool [T, V]: whether a column of this device stands for the target."""
    token = _first(pieces, head_DV) + jnp.arange(head_DV.shape[1], dtype=jnp.int32)
    return targets_T[:, None] == token[None]


def _nll_forward(pieces, head_DV, hidden_TD, targets_T):
    residuals = head_DV, hidden_TD, targets_T
    if pieces.chunks == 1:
        nll, probabilities = _nll_chunk(pieces, *residuals)
        return nll, (*residuals, probabilities)
    chunks = _split(pieces.chunks, hidden_TD, targets_T)
    nll = jax.lax.map(lambda chunk: _nll_chunk(pieces, head_DV, *chunk)[0], chunks)
    return nll.reshape(-1)[: hidden_TD.shape[0]], (*residuals, None)


def _nll_backward(pieces, residuals, gradient_T):
    head_DV, hidden_TD, targets_T, kept = residuals

    def logit_gradient(hidden, gradient, targets, *probabilities):
        p = probabilities[0] if probabilities else _softmax(pieces, _logits(pieces, hidden, head_DV))[0]
        return gradient[:, None] * jnp.where(_is_target(pieces, head_DV, targets), p - 1.0, p)

    others = (targets_T,) if kept is None else (targets_T, kept)
    return *_backward(pieces, head_DV, hidden_TD, gradient_T, others, logit_gradient), None


_nll.defvjp(_nll_forward, _nll_backward)


# --- Kullback-Leibler divergence from a reference ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(pieces, head_ref_DV, hidden_ref_TD, head_DV, hidden_TD):
    return _kl_forward(pieces, head_ref_DV, hidden_ref_TD, head_DV, hidden_TD)[0]


def _kl_chunk(pieces, head_ref_DV, head_DV, hidden_ref_TD, hidden_TD):
    """(KL [T], p - p_ref [T,V], which is the gradient of KL by the logits)."""
    logits_ref, logits = _logits(pieces, hidden_ref_TD, head_ref_DV), _logits(pieces, hidden_TD, head_DV)
    p_ref, normalizer_ref = _softmax(pieces, logits_ref)
    p, normalizer = _softmax(pieces, logits)
    mean = jnp.sum(p_ref * (logits_ref - logits), axis=-1)
    mean = jax.lax.psum(mean, TENSOR) if pieces.split else mean
    return mean - normalizer_ref + normalizer, p - p_ref


def _kl_forward(pieces, head_ref_DV, hidden_ref_TD, head_DV, hidden_TD):
    residuals = head_ref_DV, hidden_ref_TD, head_DV, hidden_TD
    if pieces.chunks == 1:
        kl, difference = _kl_chunk(pieces, head_ref_DV, head_DV, hidden_ref_TD, hidden_TD)
        return kl, (*residuals, difference)
    chunks = _split(pieces.chunks, hidden_ref_TD, hidden_TD)
    kl = jax.lax.map(lambda chunk: _kl_chunk(pieces, head_ref_DV, head_DV, *chunk)[0], chunks)
    return kl.reshape(-1)[: hidden_TD.shape[0]], (*residuals, None)


def _kl_backward(pieces, residuals, gradient_T):
    head_ref_DV, hidden_ref_TD, head_DV, hidden_TD, kept = residuals

    def logit_gradient(hidden, gradient, other):
        difference = other if kept is not None else _kl_chunk(pieces, head_ref_DV, head_DV, other, hidden)[1]
        return gradient[:, None] * difference

    others = (hidden_ref_TD,) if kept is None else (kept,)
    gradients = _backward(pieces, head_DV, hidden_TD, gradient_T, others, logit_gradient)
    return jnp.zeros_like(head_ref_DV), jnp.zeros_like(hidden_ref_TD), *gradients


_kl.defvjp(_kl_forward, _kl_backward)


# --- any function of the logits ---


def _vocabulary(pieces: _Pieces, head_DV, logits_TV, targets_T) -> Vocabulary:
    token = _first(pieces, head_DV) + jnp.arange(head_DV.shape[1], dtype=jnp.int32)
    real = (token < pieces.vocab_size)[None]
    return Vocabulary(logits_TV, targets_T[:, None] == token[None], real, pieces.vocab_size, pieces.split)


def _vocabulary_chunk(pieces, fn, numbers, head_DV, head_ref_DV, logits_TV, targets_T, *hidden_ref):
    """`fn` at one chunk's logits [T, V']."""
    reference = None
    if hidden_ref:
        logits_ref = jax.lax.stop_gradient(_logits(pieces, hidden_ref[0], head_ref_DV))
        reference = _vocabulary(pieces, head_DV, logits_ref, targets_T)
    return fn(_vocabulary(pieces, head_DV, logits_TV, targets_T), reference, numbers)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_vocabulary(pieces, fn, numbers, head_DV, hidden_TD, targets_T, *reference):
    return _of_vocabulary_forward(pieces, fn, numbers, head_DV, hidden_TD, targets_T, *reference)[0]


def _of_vocabulary_forward(pieces, fn, numbers, head_DV, hidden_TD, targets_T, *reference):
    head_ref_DV, hidden_ref = (reference[0], reference[1:]) if reference else (None, ())

    def chunk(parts):
        hidden, *others = parts
        return _vocabulary_chunk(pieces, fn, numbers, head_DV, head_ref_DV, _logits(pieces, hidden, head_DV), *others)

    chunks = _split(pieces.chunks, hidden_TD, targets_T, *hidden_ref)
    values = jax.lax.map(chunk, chunks).reshape(-1)[: hidden_TD.shape[0]]
    return values, (numbers, head_DV, hidden_TD, targets_T, reference)


def _of_vocabulary_backward(pieces, fn, residuals, gradient_T):
    numbers, head_DV, hidden_TD, targets_T, reference = residuals
    head_ref_DV, hidden_ref = (reference[0], reference[1:]) if reference else (None, ())

    def logit_gradient(hidden, gradient, *others):
        def of_logits(logits):
            return _vocabulary_chunk(pieces, fn, numbers, head_DV, head_ref_DV, logits, *others)

        return jax.vjp(of_logits, _logits(pieces, hidden, head_DV))[1](gradient)[0]

    gradients = _backward(pieces, head_DV, hidden_TD, gradient_T, (targets_T, *hidden_ref), logit_gradient)
    zeros = (jax.tree.map(jnp.zeros_like, part) for part in (numbers, reference))
    zero_numbers, zero_reference = zeros
    return zero_numbers, *gradients, None, *zero_reference


_of_vocabulary.defvjp(_of_vocabulary_forward, _of_vocabulary_backward)
