"""What every forget loss has: what it may look at, how much its values count, and sums over documents.

A loss gives a value for every token [B, S] or every document [B, S + 1] (`trace_jax.models.loss.document_sums`), and
`counts` how much each of them counts. L_forget is the sum of values over the sum of counts, both added over devices, so
that it does not depend on how documents are packed into rows and split. Counts depend on masks alone. Shapes: B rows, S
positions, D hidden size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from trace_jax.config import Variant, option
from trace_jax.models.loss import Vocabulary, document_sums


class ForgetInputs(NamedTuple):
    """What a forget loss may look at. Parts that an objective does not ask for (`Objective.needs`) are None."""

    valid: Any  # bool [B, S]
    segments: Any  # i32 [B, S], numbers the documents of a row from 1; 0 is padding
    nll: Any = None  # f32 [B, S] in nats
    reference_nll: Any = None  # f32 [B, S], under the original model
    hidden: Any = None  # [B, S, D], output of the steered layer
    target: Any = None  # f32 [B, D], where RMU steers the rows: c u of their topic
    vocabulary: Any = None  # f32 [B, S], what `Objective.vocabulary` made of the logits
    refusal_valid: Any = None  # the same of refusals; document i of a row pairs with document i of the forget row
    refusal_segments: Any = None
    refusal_nll: Any = None
    refusal_reference_nll: Any = None


class Objective(Variant):
    """A forget loss. Settings of type float are traced in a step, so that a sweep over them compiles once.

    Attributes:
      retains: whether there is a retain term. by_document: the loss is a mean over documents.
      usual_retain_loss, usual_trainable: settings that go with it.
      needs: of "hidden", "logits", "reference_logits", "nll", "reference_nll", "refusal_nll", "refusal_reference_nll".
      next_alpha: (alpha, step, retain loss) -> alpha after the step, where the retain loss is a constraint.
      task_scale: how often what was learnt is subtracted from the model in the end.
    """

    gamma: float = option(1.0, help="coefficient of the forget loss", minimum=0.0)

    retains: ClassVar[bool] = True
    usual_retain_loss: ClassVar[str] = "kl"
    usual_trainable: ClassVar[str] = "all"
    by_document: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("nll",)
    next_alpha: ClassVar[Any] = None
    task_scale: ClassVar[float] = 0.0

    def loss(self, inputs: ForgetInputs) -> jax.Array:
        """f32 [B, S] of tokens, or f32 [B, S + 1] of documents. Default: what `vocabulary` gives."""
        return inputs.vocabulary

    def counts(self, masks: ForgetInputs) -> jax.Array:
        """How much each value of `loss` counts; where it is 0 the value is not read. Default: every valid token."""
        return lengths(masks.valid, masks.segments) > 0 if self.by_document else masks.valid

    def of_means(self, means: jax.Array, parts: int) -> jax.Array:
        """L_forget from sum of values over sum of counts; of a batch taken in `parts`, both are one part's share."""
        return means

    def vocabulary(self, own: Vocabulary, reference: Any) -> jax.Array:
        """f32 [tokens], for losses of more than the target's probability; `reference` is the original `Vocabulary`."""
        raise NotImplementedError

    def completed(self, retain_loss: str) -> Self:
        """With the settings that depend on the retain loss; raises ConfigError if it can't be used with it."""
        return self

    def numbers(self) -> dict[str, float]:
        """The settings that are traced."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type is float}

    def with_numbers(self, numbers: Mapping[str, Any]) -> Self:
        """The same with traced arrays, f32 [], in place of its numbers."""
        made = object.__new__(type(self))  # past the checks, which are of Python numbers
        for field in dataclasses.fields(self):
            object.__setattr__(made, field.name, numbers.get(field.name, getattr(self, field.name)))
        return made

    def without_numbers(self) -> Self:
        """What shapes a compiled step: the same for all numbers."""
        return self.with_numbers(dict.fromkeys(self.numbers()))


def sums(values: jax.Array, valid: jax.Array, segments: jax.Array) -> jax.Array:
    """f32 [B, S + 1], the sum of values [B, S] at the valid positions of each document."""
    return document_sums(jnp.where(valid, values, 0.0), segments)


def lengths(valid: jax.Array, segments: jax.Array) -> jax.Array:
    """f32 [B, S + 1], how many valid positions each document has."""
    return document_sums(valid.astype(jnp.float32), segments)


def means(values: jax.Array, valid: jax.Array, segments: jax.Array) -> jax.Array:
    """f32 [B, S + 1], the mean at the valid positions of each document; 0 for one without any."""
    return sums(values, valid, segments) / jnp.maximum(lengths(valid, segments), 1.0)


def everywhere(segments: jax.Array) -> jax.Array:
    """bool [B, S], every position, padding too, of rows that hold a document; others only fill up a batch."""
    return jnp.broadcast_to((segments > 0).any(-1, keepdims=True), segments.shape)


def targets_of(valid: jax.Array) -> jax.Array:
    """bool [B, S], the positions of the tokens that valid positions predict (`labels != -100` of Hugging Face)."""
    return jnp.pad(valid[:, :-1], ((0, 0), (1, 0)))
