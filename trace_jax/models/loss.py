"""Losses over the vocabulary that never hold all logits at once.

Tokens are taken in chunks. A loss gives its value at every token and its slope, the gradient by the token's logits;
when all tokens fit in one chunk the slopes are kept for the backward pass, with more they are computed again. Both are
exact. Where a mesh splits the vocabulary, each device has the logits of its share, and sums over devices complete them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import output_operands
from trace_jax.models.layers import MASKED
from trace_jax.parallel.mesh import TENSOR, as_varying, axis_sizes, varying_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Scores of T tokens over the vocabulary. Every method gives what the whole vocabulary says, f32 [T]."""

    logits: jax.Array  # f32 [T, V'], the columns of this device; where they only pad its share, a very low score
    is_target: jax.Array  # bool [T, V'], the column of each token's target
    real: jax.Array | None  # bool [1, V'], False where a column only pads; None: none does
    size: int = dataclasses.field(metadata={"static": True})  # tokens in the vocabulary
    split: bool = dataclasses.field(metadata={"static": True})  # whether other devices have the other columns

    def total(self, values: jax.Array) -> jax.Array:
        """Sum of `values` [T, V'] over the vocabulary."""
        own = (values if self.real is None else jnp.where(self.real, values, 0.0)).sum(-1)
        return jax.lax.psum(own, TENSOR) if self.split else own

    def mean(self, values: jax.Array) -> jax.Array:
        """Mean of `values` [T, V'] over the vocabulary."""
        return self.total(values) / self.size

    def maximum(self, scores: jax.Array) -> jax.Array:
        """f32 [T, 1], the largest of `scores` [T, V'] over the vocabulary. It takes no gradient."""
        own = jax.lax.stop_gradient(scores).max(-1, keepdims=True)
        return jax.lax.pmax(own, TENSOR) if self.split else own

    def softmax(self) -> tuple[jax.Array, jax.Array]:
        """(softmax f32 [T, V'], log of its normaliser f32 [T])."""
        largest = self.maximum(self.logits)
        exponential = jnp.exp(self.logits - largest)
        total = jnp.sum(exponential, axis=-1, keepdims=True)
        total = jax.lax.psum(total, TENSOR) if self.split else total
        return exponential / total, (largest + jnp.log(total))[:, 0]

    def largest(self) -> jax.Array:
        """The largest logit. Equal ones share its gradient."""
        is_largest = (self.logits == self.maximum(self.logits)).astype(jnp.float32)
        return self.total(is_largest * self.logits) / self.total(is_largest)

    def of_target(self, values: jax.Array) -> jax.Array:
        """`values` [T, V'] at each token's target."""
        return self.total(jnp.where(self.is_target, values, 0.0))

    def log_normalizer(self, scores: jax.Array) -> jax.Array:
        """log sum exp of `scores` [T, V']."""
        largest = self.maximum(scores)
        return largest[:, 0] + jnp.log(self.total(jnp.exp(scores - largest)))

    def cross_entropy(self, scores: jax.Array) -> jax.Array:
        """-sum_v q_v log p_v: of the model's softmax p, against q = softmax(scores), which takes no gradient."""
        scores = jax.lax.stop_gradient(scores)
        q = jnp.exp(scores - self.log_normalizer(scores)[:, None])
        return self.log_normalizer(self.logits) - self.total(q * self.logits)


CHUNK_ELEMENTS = 2**24  # of one chunk's logits: 64 MiB in float32
HEAD_PER_CHUNK = 4  # but as many as the head has numbers, over this: each chunk reads the head, not for few tokens


def token_nll(params: dict, config: ModelConfig, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """f32 [B, S], -log p of `targets` i32 [B, S] (any id where there is none) by final `hidden` states [B, S, D]."""
    return _losses(_nll, {}, params, config, hidden, targets)


def token_kl(params_ref: dict, hidden_ref, params: dict, hidden, config: ModelConfig) -> jax.Array:
    """f32 [B, S], KL(p_ref || p) over the vocabulary. The reference takes no gradient."""
    unread = jnp.zeros(hidden.shape[:-1], jnp.int32)
    return _losses(_kl, {}, params, config, hidden, unread, (params_ref, hidden_ref))


def vocabulary_loss(fn: Callable, numbers, params, config: ModelConfig, hidden, targets, reference=None) -> jax.Array:
    """f32 [B, S], what `fn` makes of the logits at every position.

    It takes the `Vocabulary` of the model, that of the `reference` (its parameters and final hidden states) or None,
    and `numbers` f32 [] by name, and gives f32 [T] for any number of tokens T, each from its own logits. Reference and
    numbers take no gradient.
    """

    def with_slope(vocabulary: Vocabulary, other: Vocabulary | None, numbers):
        values, pull_back = jax.vjp(
            lambda x: fn(dataclasses.replace(vocabulary, logits=x), other, numbers), vocabulary.logits
        )
        return values, pull_back(as_varying(jnp.ones(values.shape, values.dtype), varying_axes(values)))[0]

    return _losses(with_slope, numbers, params, config, hidden, targets, reference)


def token_scores(params: dict, config: ModelConfig, hidden, targets, *, moments: bool = False) -> dict[str, jax.Array]:
    """What is told of a target by the distribution at its place, without gradients; each [B, S].

    log_prob f32, nats; greedy bool: no other token is likelier; with `moments` also mean and variance f32 of log p(v)
    over tokens v drawn from the model's own distribution p.
    """
    chunks, vocabulary_of, (head, *rows) = _operands(config, params, hidden, targets)

    def chunk(rows):
        vocabulary = vocabulary_of(head, *rows)
        logits = vocabulary.logits
        log_probs = logits - vocabulary.log_normalizer(logits)[:, None]
        greedy = vocabulary.of_target(logits) >= vocabulary.maximum(logits)[:, 0]
        scores = {"log_prob": vocabulary.of_target(log_probs), "greedy": greedy}
        if moments:
            p = jnp.exp(log_probs)
            scores["mean"] = vocabulary.total(p * log_probs)
            scores["variance"] = vocabulary.total(p * jnp.square(log_probs - scores["mean"][:, None]))
        return scores

    scores = jax.lax.map(chunk, _split(chunks, *rows))
    return {name: x.reshape(-1)[: targets.size].reshape(targets.shape) for name, x in scores.items()}


def document_sums(values: jax.Array, segments: jax.Array) -> jax.Array:
    """f32 [B, S + 1], the sum of values f32 [B, S] over each document of a row: entry i is of the positions where
    `segments` i32 [B, S] is i, entry 0 of padding. Documents that a row does not have give 0.
    """
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=segments.shape[1] + 1))(values, segments)


# --- losses: (value f32 [T], slope f32 [T, V']) of the logits of T tokens


def _nll(vocabulary: Vocabulary, _reference, _numbers):
    p, normalizer = vocabulary.softmax()
    return normalizer - vocabulary.of_target(vocabulary.logits), jnp.where(vocabulary.is_target, p - 1.0, p)


def _kl(vocabulary: Vocabulary, reference: Vocabulary, _numbers):
    (p, normalizer), (p_ref, normalizer_ref) = vocabulary.softmax(), reference.softmax()
    mean = vocabulary.total(p_ref * (reference.logits - vocabulary.logits))
    return mean - normalizer_ref + normalizer, p - p_ref


# --- in chunks


def _operands(config: ModelConfig, params, hidden, targets, reference=None):
    """(number of chunks, function from (head, hidden, targets) of some tokens to their `Vocabulary`, operands).

    The operands are head [D,V'], hidden [T,D], targets [T], and the head and hidden of the reference, if there is one.
    """
    hidden, head = output_operands(params, config, hidden)
    operands = [head, hidden.reshape(-1, head.shape[0]), targets.reshape(-1)]
    if reference is not None:
        hidden_ref, head_ref = output_operands(reference[0], config, reference[1])
        operands += jax.lax.stop_gradient([head_ref, hidden_ref.reshape(-1, head_ref.shape[0])])
    chunks = -(-targets.size // max(1, max(CHUNK_ELEMENTS, head.size // HEAD_PER_CHUNK) // head.shape[1]))
    size, devices = config.vocab_size, axis_sizes().get(TENSOR, 1)

    def vocabulary_of(head_DV, hidden_TD, targets_T) -> Vocabulary:
        logits, columns = jnp.dot(hidden_TD, head_DV, preferred_element_type=jnp.float32), head_DV.shape[1]
        first = jax.lax.axis_index(TENSOR) * columns if devices > 1 else 0
        token = (first + jnp.arange(columns, dtype=jnp.int32))[None]
        real = token < size if columns * devices != size else None
        logits = logits if real is None else jnp.where(real, logits, MASKED)
        return Vocabulary(logits, targets_T[:, None] == token, real, size, devices > 1)

    return chunks, vocabulary_of, as_varying(tuple(operands), varying_axes(*operands))


def _losses(fn, numbers, params, config: ModelConfig, hidden, targets, reference=None) -> jax.Array:
    """f32 like `targets`: the values of `fn`, which gives (values, slopes)."""
    chunks, vocabulary_of, operands = _operands(config, params, hidden, targets, reference)

    def of_chunk(numbers, head_DV, reference, hidden_TD, targets_T, *hidden_ref):
        other = vocabulary_of(reference[0], hidden_ref[0], targets_T) if reference else None
        return fn(vocabulary_of(head_DV, hidden_TD, targets_T), other, numbers)

    return jnp.reshape(_values(chunks, of_chunk, numbers, *operands), targets.shape)


def _split(num_chunks: int, *arrays):
    """Arrays [T, ...] as [num_chunks, T/num_chunks, ...], padded with zeros at the end."""
    rows = -(-len(arrays[0]) // num_chunks)
    missing = rows * num_chunks - len(arrays[0])
    padded = (jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in arrays)
    return tuple(x.reshape(num_chunks, rows, *x.shape[1:]) for x in padded)


def _forward(chunks, of_chunk, numbers, head_DV, hidden_TD, targets_T, *reference):
    of_chunk, rows = partial(of_chunk, numbers, head_DV, reference), (hidden_TD, targets_T, *reference[1:])
    if chunks == 1:
        values, slopes = of_chunk(*rows)
    else:
        values, slopes = jax.lax.map(lambda chunk: of_chunk(*chunk)[0], _split(chunks, *rows)), None
    residuals = numbers, head_DV, hidden_TD, targets_T, reference, slopes
    return values.reshape(-1)[: hidden_TD.shape[0]], residuals


def _backward(chunks, of_chunk, residuals, gradient_T):
    numbers, head_DV, hidden_TD, targets_T, reference, slopes = residuals

    def step(of_head, chunk):
        gradient, hidden, *rest = chunk
        slope = of_chunk(numbers, head_DV, reference, hidden, *rest)[1] if slopes is None else rest[0]
        of_logits = (gradient[:, None] * slope).astype(hidden.dtype)
        more = jnp.dot(hidden.T, of_logits, preferred_element_type=jnp.float32)
        return of_head + more, jnp.dot(of_logits, head_DV.T)

    rest = (targets_T, *reference[1:]) if slopes is None else (slopes,)
    start = as_varying(jnp.zeros(head_DV.shape, jnp.float32), varying_axes(hidden_TD))
    rows = _split(chunks, gradient_T, hidden_TD, *rest)
    of_head, of_hidden = jax.lax.scan(step, start, rows, unroll=chunks == 1)
    of_hidden = of_hidden.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    zeros = jax.tree.map(jnp.zeros_like, (numbers, reference))
    return zeros[0], of_head.astype(head_DV.dtype), of_hidden, None, *zeros[1]


_values = jax.custom_vjp(lambda *operands: _forward(*operands)[0], nondiff_argnums=(0, 1))
_values.defvjp(_forward, _backward)
