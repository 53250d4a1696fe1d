"""The logits of some tokens as losses look at them, also where a mesh splits the vocabulary over devices."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.attention import MASKED
from trace_jax.parallel.mesh import TENSOR


@partial(jax.tree_util.register_dataclass, data_fields=["logits", "is_target", "real"], meta_fields=["size", "split"])
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Scores of T tokens over the vocabulary. Every method gives what the whole vocabulary says, f32 [T].

    Attributes:
      logits: f32 [T, V'], the columns of this device; where they only pad its share, a very low score.
      is_target: bool [T, V'], the column of each token's target.
      real: bool [1, V'], False where a column only pads; None: none does.
      size: tokens in the vocabulary. split: whether other devices have the other columns.
    """

    logits: jax.Array
    is_target: jax.Array
    real: jax.Array | None
    size: int
    split: bool

    def total(self, values: jax.Array) -> jax.Array:
        """Sum of `values` [T, V'] over the vocabulary."""
        own = (values if self.real is None else jnp.where(self.real, values, 0.0)).sum(-1)
        return jax.lax.psum(own, TENSOR) if self.split else own

    def mean(self, values: jax.Array) -> jax.Array:
        """Mean of `values` [T, V'] over the vocabulary."""
        return self.total(values) / self.size

    def _maximum(self, scores: jax.Array) -> jax.Array:
        own = jax.lax.stop_gradient(scores).max(-1, keepdims=True)
        return jax.lax.pmax(own, TENSOR) if self.split else own

    def at(self, logits: jax.Array) -> Vocabulary:
        """The same tokens with other logits."""
        return dataclasses.replace(self, logits=logits)

    def softmax(self) -> tuple[jax.Array, jax.Array]:
        """(softmax f32 [T, V'], log of its normaliser f32 [T])."""
        largest = self._maximum(self.logits)
        exponential = jnp.exp(self.logits - largest)
        total = jnp.sum(exponential, axis=-1, keepdims=True)
        total = jax.lax.psum(total, TENSOR) if self.split else total
        return exponential / total, (largest + jnp.log(total))[:, 0]

    def largest(self) -> jax.Array:
        """The largest logit. Equal ones share its gradient."""
        is_largest = (self.logits == self._maximum(self.logits)).astype(jnp.float32)
        return self.total(is_largest * self.logits) / self.total(is_largest)

    def of_target(self, values: jax.Array) -> jax.Array:
        """`values` [T, V'] at each token's target."""
        return self.total(jnp.where(self.is_target, values, 0.0))

    def is_likeliest(self) -> jax.Array:
        """bool [T]: no other token is likelier than the target."""
        return self.of_target(self.logits) >= self._maximum(self.logits)[:, 0]

    def log_normalizer(self, scores: jax.Array) -> jax.Array:
        """log sum exp of `scores` [T, V']."""
        largest = self._maximum(scores)
        return largest[:, 0] + jnp.log(self.total(jnp.exp(scores - largest)))

    def without_target(self, scores: jax.Array) -> jax.Array:
        """`scores` [T, V'] with the target's at the bottom."""
        return jnp.where(self.is_target, MASKED, scores)

    def cross_entropy(self, scores: jax.Array) -> jax.Array:
        """-sum_v q_v log p_v: of the model's softmax p, against q = softmax(scores), which takes no gradient."""
        scores = jax.lax.stop_gradient(scores)
        q = jnp.exp(scores - self.log_normalizer(scores)[:, None])
        return self.log_normalizer(self.logits) - self.total(q * self.logits)
