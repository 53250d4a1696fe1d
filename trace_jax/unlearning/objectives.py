"""Forget losses, one class each: its settings, what it looks at, and a pure function (docs/methods.md).

A loss gives a value for every token [B, S] or every row [B], and `counts` how much each of them counts. L_forget is the
sum of values over the sum of counts, both added over devices, so that it does not depend on how rows are split. Counts
depend on masks alone. Shapes: B rows, S positions, D hidden size.

Where a released code differs from its paper, the paper's form is the default and the code's is a `form`. To add an
objective, add a class here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from trace_jax.config import ConfigError, Section, Variant, option
from trace_jax.models.loss import Vocabulary

PAPER = "paper"
REFUSALS = ("I do not know.", "I can't help with that.", "That is something I have no knowledge of.")


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
      source: arXiv number. retains: whether there is a retain term.
      usual_retain_loss, usual_trainable: settings that go with it. over_rows: the loss is a mean over rows.
      needs: of "hidden", "logits", "reference_logits", "nll", "reference_nll", "refusal_nll", "refusal_reference_nll".
      next_alpha: (alpha, step, retain loss) -> alpha after the step, where the retain loss is a constraint.
      task_scale: how often what was learnt is subtracted from the model in the end.
    """

    gamma: float = option(1.0, help="coefficient of the forget loss", minimum=0.0)

    source: ClassVar[str]
    retains: ClassVar[bool] = True
    usual_retain_loss: ClassVar[str] = "kl"
    usual_trainable: ClassVar[str] = "all"
    over_rows: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("nll",)
    next_alpha: ClassVar[Any] = None
    task_scale: ClassVar[float] = 0.0

    def loss(self, inputs: ForgetInputs) -> jax.Array:
        """f32 [B, S] of tokens, or f32 [B] of rows. Default: what `vocabulary` gives."""
        return inputs.vocabulary

    def counts(self, valid: jax.Array, refusal_valid: Any) -> jax.Array:
        """How much each value of `loss` counts; where it is 0 the value is not read. Default: every valid token."""
        return valid.any(-1) if self.over_rows else valid

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


def row_sums(values: jax.Array, valid: jax.Array) -> jax.Array:
    """f32 [B], the sum of values [B, S] at the valid positions of each row."""
    return jnp.where(valid, values, 0.0).sum(-1)


def row_means(values: jax.Array, valid: jax.Array) -> jax.Array:
    """f32 [B], their mean; 0 for a row without any."""
    return row_sums(values, valid) / jnp.maximum(valid.sum(-1, dtype=jnp.float32), 1.0)


def softened(x: jax.Array, beta: Any) -> jax.Array:
    """-(2/beta) log sigma(beta x): about -x where x is far below 0, and 0 far above."""
    return -(2.0 / beta) * jax.nn.log_sigmoid(beta * x)


def ascent(weight: jax.Array, nll: jax.Array) -> jax.Array:
    """-sg(weight) nll of every token."""
    return -jax.lax.stop_gradient(weight) * nll


def form_option(*codes: str) -> Any:
    """The setting `form`: that of the paper, or of a released code."""
    return option(PAPER, help="the paper's loss, or that of a released code", choices=(PAPER, *codes))


class Referring(Section):
    """Objectives that compare log-probabilities with the original model's."""

    cache_reference: bool = option(
        False, help="compute the original model's log-probabilities of the forget rows once, and keep them on disk"
    )


class Refusing(Section):
    """Objectives that answer the forget set with refusals."""

    refusals: tuple[str, ...] = option(REFUSALS, help="answers that the forget set is to get instead; taken in turn")

    def __post_init__(self):
        super().__post_init__()
        if not all(text.strip() for text in self.refusals or ("",)):
            raise ConfigError("refusals holds no text, or an empty one; give at least one sentence.")


class _Ascent(Section):
    """-mean nll_t over tokens. With a ceiling > 0: mean over rows of max(0, ceiling - row mean nll), which stops
    pushing a row that is forgotten instead of letting it dominate the step.
    """

    nll_ceiling: float = option(0.0, help="mean NLL (nats) past which a row is no longer pushed; 0 = none", minimum=0.0)
    source: ClassVar[str] = "2401.06121"

    def loss(self, inputs):
        hinge = jnp.maximum(0.0, self.nll_ceiling - row_means(inputs.nll, inputs.valid))
        return jnp.where(self.nll_ceiling > 0, hinge, -row_sums(inputs.nll, inputs.valid))

    def counts(self, valid, refusal_valid):
        length = valid.sum(-1, dtype=jnp.float32)
        return jnp.where(self.nll_ceiling > 0, jnp.minimum(length, 1.0), length)


class GradientAscent(_Ascent, Objective, name="gradient_ascent"):
    retains, usual_retain_loss = False, "none"


class GradientDifference(_Ascent, Objective, name="gradient_difference"): ...


class TaskVector(Objective, name="task_vector"):
    """mean nll_t, what fine-tuning minimises, is learnt; then what was learnt is subtracted."""

    task_scale: float = option(5.0, help="how often what was learnt is subtracted", minimum=0.0)
    source = "2212.04089"
    retains, usual_retain_loss = False, "none"

    def loss(self, inputs):
        return inputs.nll


class WGA(Objective, name="wga"):
    """-mean sg(weight_t) nll_t over tokens, weight p_t^beta."""

    beta: float = option(1.0, help="exponent of a token's probability", minimum=1e-6)
    source = "2502.19301"

    def loss(self, inputs):
        return ascent(jnp.exp(-self.beta * inputs.nll), inputs.nll)


class TNPO(Referring, Objective, name="tnpo"):
    """The same with weight 2 p^beta / (p^beta + p_ref^beta)."""

    beta: float = option(4.0, help="inverse temperature", minimum=1e-6)
    source = "2502.19301"
    needs = ("nll", "reference_nll")

    def loss(self, inputs):
        return ascent(2.0 * jax.nn.sigmoid(self.beta * (inputs.reference_nll - inputs.nll)), inputs.nll)


class SatImp(Objective, name="satimp"):
    """The same with weight p^beta1 (1 - p)^beta2: saturation, then importance."""

    gamma: float = option(0.1, help="coefficient of the forget loss", minimum=0.0)
    beta1: float = option(5.0, help="exponent of a token's probability, saturation", minimum=0.0)
    beta2: float = option(1.0, help="exponent of one minus a token's probability, importance", minimum=0.0)
    source = "2505.11953"

    def loss(self, inputs):
        p = jnp.exp(-inputs.nll)
        return ascent(p**self.beta1 * jnp.maximum(1.0 - p, 0.0) ** self.beta2, inputs.nll)


class _Preference(Objective):
    """A mean over rows; form muse_logits: over tokens, of a loss on every raw logit."""

    form: str = form_option("muse_logits")
    of_paper, of_logits = ("nll",), ("logits",)

    @property
    def needs(self):
        return self.of_logits if self.form == "muse_logits" else self.of_paper

    def counts(self, valid, refusal_valid):
        return valid if self.form == "muse_logits" else valid.any(-1)

    def loss(self, inputs):
        return inputs.vocabulary if self.form == "muse_logits" else self.of_rows(inputs)

    def of_rows(self, inputs: ForgetInputs) -> jax.Array:
        raise NotImplementedError


class NPO(_Preference, Referring, name="npo"):
    """-(2/beta) mean_y log sigma(beta (NLL - NLL_ref)), rows summed. gemma: google-deepmind/gemma, without 2/beta."""

    beta: float = option(0.1, help="inverse temperature", minimum=1e-6)
    form: str = form_option("gemma", "muse_logits")
    source = "2404.05868"
    of_paper, of_logits = ("nll", "reference_nll"), ("logits", "reference_logits")

    def of_rows(self, inputs):
        losses = softened(row_sums(inputs.nll - inputs.reference_nll, inputs.valid), self.beta)
        return losses * (self.beta / 2.0) if self.form == "gemma" else losses

    def vocabulary(self, own, reference):
        return own.mean(softened(reference.logits - own.logits, self.beta))


class SimNPO(_Preference, name="simnpo"):
    """-(2/beta) mean_y log sigma(beta (NLL/length - delta)); no reference model."""

    gamma: float = option(0.125, help="coefficient of the forget loss", minimum=0.0)
    beta: float = option(4.5, help="inverse temperature", minimum=1e-6)
    delta: float = option(0.0, help="margin (nats per token)")
    source = "2410.07163"

    def of_rows(self, inputs):
        return softened(row_means(inputs.nll, inputs.valid) - self.delta, self.beta)

    def vocabulary(self, own, reference):
        return own.mean(softened(-own.logits - self.delta, self.beta))


class DPO(Refusing, Referring, Objective, name="dpo"):
    """-(2/beta) mean_y log sigma(beta (r(refusal) - r(forget))), r = NLL_ref - NLL of a row, rows summed."""

    beta: float = option(0.1, help="inverse temperature", minimum=1e-6)
    source = "2305.18290"
    needs = ("nll", "reference_nll", "refusal_nll", "refusal_reference_nll")
    over_rows = True

    def loss(self, inputs):
        lost = row_sums(inputs.nll - inputs.reference_nll, inputs.valid)
        won = row_sums(inputs.refusal_reference_nll - inputs.refusal_nll, inputs.refusal_valid)
        return softened(won + lost, self.beta)


class IDK(Refusing, Objective, name="idk"):
    """mean nll_t of the refusals."""

    source = "2401.06121"
    needs = ("refusal_nll",)

    def loss(self, inputs):
        return inputs.refusal_nll

    def counts(self, valid, refusal_valid):
        return refusal_valid


class FLAT(Refusing, Objective, name="flat"):
    """mean_y (tanh(P(forget)) - tanh(P(refusal))) / 2, P the mean probability of a row's tokens: the f-divergence of
    total variation.
    """

    source = "2410.11143"
    needs = ("nll", "refusal_nll")
    over_rows = True

    def loss(self, inputs):
        forget = row_means(jnp.exp(-inputs.nll), inputs.valid)
        refusal = row_means(jnp.exp(-inputs.refusal_nll), inputs.refusal_valid)
        return (jnp.tanh(forget) - jnp.tanh(refusal)) / 2.0


class Steering(Section):
    """mean |h_l(x_f) - c u|^2 / D over tokens, u a fixed random unit direction for each topic.

    wmdp: centerforaisafety/wmdp, every position counts, padding too. (Empty rows, which only fill up a batch for the
    devices, stay out.) open_unlearning: mean over the tokens of a row, then over rows.
    """

    layer: int = option(1, help="layer (from 1) whose output is steered", minimum=1)
    form: str = form_option("wmdp", "open_unlearning")
    usual_retain_loss: ClassVar[str] = "hidden"
    usual_trainable: ClassVar[str] = "down_projections"
    needs: ClassVar[tuple[str, ...]] = ("hidden",)

    def loss(self, inputs):
        error = jnp.square(inputs.hidden.astype(jnp.float32) - inputs.target[:, None, :]).mean(-1)
        return row_means(error, inputs.valid) if self.form == "open_unlearning" else error

    def counts(self, valid, refusal_valid):
        rows = valid.any(-1)
        if self.form == "wmdp":
            return jnp.broadcast_to(rows[:, None], valid.shape)
        return rows if self.form == "open_unlearning" else valid


class RMU(Steering, Objective, name="rmu"):
    """With a length c that is set."""

    steering: float = option(6.5, help="length of the target, c", minimum=0.0)
    source = "2403.03218"


class AdaptiveRMU(Steering, Objective, name="adaptive_rmu"):
    """With c = scale * mean |h_l| of the topic's first batch."""

    steering_scale: float = option(5.0, help="c in mean lengths of the layer's output on the first batch", minimum=0.0)
    source = "2408.06223"


class UNDIAL(Objective, name="undial"):
    """Cross-entropy to softmax(z_ref - beta onehot(target))."""

    beta: float = option(10.0, help="how much the target's logit is lowered", minimum=1e-6)
    source = "2402.10052"
    needs = ("logits", "reference_logits")

    def vocabulary(self, own, reference):
        return own.cross_entropy(reference.logits - self.beta * reference.is_target.astype(jnp.float32))


class CEU(Objective, name="ceu"):
    """Cross-entropy to the model's own softmax without the target; the first token of a document stays out."""

    source = "2503.01224"
    needs = ("logits",)

    def counts(self, valid, refusal_valid):
        return valid & jnp.pad(valid[:, :-1], ((0, 0), (1, 0)))

    def vocabulary(self, own, reference):
        return own.cross_entropy(jnp.where(own.is_target, -jnp.inf, own.logits))


class PDU(Objective, name="pdu"):
    """(largest logit - mean logit)^2 under a bound on the retain loss, whose coefficient is the multiplier."""

    dual_rate: float = option(1.0, help="step size of the coefficient that holds the retain loss down", minimum=0.0)
    retain_bound: float = option(0.0, help="largest retain loss accepted; 0 = 0.05, usual for kl", minimum=0.0)
    dual_warmup: int = option(0, help="steps before that coefficient moves", minimum=0)
    source = "2506.05314"
    needs = ("logits",)

    def vocabulary(self, own, reference):
        return jnp.square(own.largest() - own.mean(own.logits))

    def completed(self, retain_loss):
        if retain_loss == "none":
            raise ConfigError(
                "retain_loss is 'none'; objective 'pdu' holds the retain loss below a bound and needs one."
            )
        if self.retain_bound > 0:
            return self
        if retain_loss != "kl":
            raise ConfigError(
                f"objective.retain_bound is needed when retain_loss is {retain_loss!r}: the largest mean retain loss "
                "that is accepted, for example the original model's plus 0.05."
            )
        return dataclasses.replace(self, retain_bound=0.05)

    def next_alpha(self, alpha, step, retain_loss):
        """max(0, alpha + rate (loss - bound))."""
        moved = jnp.maximum(0.0, alpha + self.dual_rate * (retain_loss - self.retain_bound))
        return jnp.where(step > self.dual_warmup, moved, alpha)
