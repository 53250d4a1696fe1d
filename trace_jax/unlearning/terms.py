"""The two terms of a loss, gamma * L_forget + alpha * L_retain: what a forget loss is, and the retain losses.

A loss gives a value for every token [B, S] or every row [B], and `counts` how much each of them counts. L_forget is the
sum of values over the sum of counts, both added over devices, so that it does not depend on how rows are split. Counts
depend on masks alone. Shapes: B rows, S positions, D hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from trace_jax.config import Variant, option
from trace_jax.models.loss import Vocabulary


class ForgetInputs(NamedTuple):
    """What a forget loss may look at. Parts that an objective does not ask for (`Objective.needs`) are None."""

    valid: Any  # bool [B, S]
    nll: Any = None  # f32 [B, S] in nats
    reference_nll: Any = None  # f32 [B, S], under the original model
    hidden: Any = None  # [B, S, D], output of the steered layer
    target: Any = None  # f32 [B, D], where RMU steers the rows: c u of their topic
    vocabulary: Any = None  # f32 [B, S], what `Objective.vocabulary` made of the logits
    refusal_valid: Any = None  # the same of rows that end in refusals
    refusal_nll: Any = None
    refusal_reference_nll: Any = None


class Objective(Variant):
    """A forget loss. Settings of type float are traced in a step, so that a sweep over them compiles once.

    Attributes:
      source: arXiv number.
      retains: whether there is a retain term. usual_retain_loss, usual_trainable: settings that go with it.
      adapts_alpha: the retain loss is a constraint, and its coefficient follows it (`next_alpha`).
      subtracts_update: it learns the forget set, and what it learnt is subtracted from the model.
    """

    gamma: float = option(1.0, help="coefficient of the forget loss", minimum=0.0)

    source: ClassVar[str]
    retains: ClassVar[bool] = True
    usual_retain_loss: ClassVar[str] = "kl"
    usual_trainable: ClassVar[str] = "all"
    adapts_alpha: ClassVar[bool] = False
    subtracts_update: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("nll",)

    @property
    def needs(self) -> tuple[str, ...]:
        """Of "nll", "reference_nll", "refusals", "reference_refusals", "hidden", and "logits", "reference_logits" for
        `vocabulary`."""
        return self.reads

    def loss(self, inputs: ForgetInputs) -> jax.Array:
        """f32 [B, S] of tokens, or f32 [B] of rows."""
        raise NotImplementedError

    def counts(self, valid: jax.Array, refusal_valid: Any) -> jax.Array:
        """How much each value of `loss` counts; where it is 0 the value is not read. Default: every valid token."""
        return valid

    def vocabulary(self, own: Vocabulary, reference: Any) -> jax.Array:
        """f32 [tokens], for losses of more than the target's probability; `reference` is the original `Vocabulary`."""
        raise NotImplementedError

    def completed(self, retain_loss: str) -> Self:
        """With the settings that depend on the retain loss; raises ConfigError if it can't be used with it."""
        return self

    def next_alpha(self, alpha: jax.Array, step: jax.Array, retain_loss: jax.Array) -> jax.Array:
        """The coefficient of the retain loss after a step, where `adapts_alpha`."""
        raise NotImplementedError

    def numbers(self) -> dict[str, float]:
        """The settings that are traced."""
        return {name: getattr(self, name) for name in self._traced()}

    def with_numbers(self, numbers: Mapping[str, Any]) -> Self:
        """The same with traced arrays, f32 [], in place of its numbers."""
        made = object.__new__(type(self))  # past the checks, which are of Python numbers
        for field in dataclasses.fields(self):
            traced = field.name in self._traced()
            object.__setattr__(made, field.name, numbers[field.name] if traced else getattr(self, field.name))
        return made

    def without_numbers(self) -> Self:
        """What shapes a compiled step: the same for all numbers."""
        return self.with_numbers(dict.fromkeys(self._traced()))

    @classmethod
    def _traced(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.type is float]


# --- retain losses


class RetainLoss(Variant):
    """The loss of a retain token; every one takes weights."""


class NoRetain(RetainLoss, name="none"):
    """The retain set is left out."""


class RetainNLL(RetainLoss, name="nll"):
    """-log p(x_{t+1})."""


class RetainKL(RetainLoss, name="kl"):
    """KL(p_ref || p) over the vocabulary."""


class RetainHidden(RetainLoss, name="hidden"):
    """|h - h_ref|^2 / D at the output of a layer (RMU's retain term, 2403.03218)."""

    layer: int = option(
        0, help="layer (from 1) whose output is compared; 0 = the one that the objective steers, else the first",
        minimum=0,
    )  # fmt: skip


def hidden_distance(hidden: jax.Array, reference: jax.Array) -> jax.Array:
    """|h - h_ref|^2 / D per token. hidden, reference [B, S, D] -> f32 [B, S]; the reference takes no gradient."""
    difference = hidden.astype(jnp.float32) - jax.lax.stop_gradient(reference).astype(jnp.float32)
    return jnp.square(difference).mean(-1)
