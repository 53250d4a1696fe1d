"""Forget losses, one class each: its settings, what it looks at, and a pure function (docs/methods.md).

Each names its paper by the arXiv number. Where a released code differs from it, the paper's form is the default and the
code's is a `form`. To add an objective, add a class here.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from trace_jax.config import ConfigError, Section, option
from trace_jax.unlearning.objective import ForgetInputs, Objective, everywhere, lengths, means, sums, targets_of

PAPER = "paper"
REFUSALS = ("I do not know.", "I can't help with that.", "That is something I have no knowledge of.")


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

    cache_reference: bool = option(False, help="compute the original model's log-probabilities once, and keep them")


class Refusing(Section):
    """Objectives that answer the forget set with refusals."""

    refusals: tuple[str, ...] = option(REFUSALS, help="answers that the forget set is to get instead; taken in turn")

    def __post_init__(self):
        super().__post_init__()
        if not all(text.strip() for text in self.refusals or ("",)):
            raise ConfigError("refusals holds no text, or an empty one; give at least one sentence.")


class _Ascent(Section):
    """-mean nll_t over tokens (2401.06121). With a ceiling > 0: mean over documents of max(0, ceiling - the document's
    mean nll), which stops pushing one that is forgotten instead of letting it dominate the step.
    """

    nll_ceiling: float = option(0.0, help="mean NLL (nats) where pushing a document ends; 0 = none", minimum=0.0)

    def loss(self, inputs):
        of = inputs.nll, inputs.valid, inputs.segments
        return jnp.where(self.nll_ceiling > 0, jnp.maximum(0.0, self.nll_ceiling - means(*of)), -sums(*of))

    def counts(self, masks):
        length = lengths(masks.valid, masks.segments)
        return jnp.where(self.nll_ceiling > 0, jnp.minimum(length, 1.0), length)


class GradientAscent(_Ascent, Objective, name="gradient_ascent"):
    retains, usual_retain_loss = False, "none"


class GradientDifference(_Ascent, Objective, name="gradient_difference"): ...


class TaskVector(Objective, name="task_vector"):
    """mean nll_t, what fine-tuning minimises, is learnt; then what was learnt is subtracted (2212.04089)."""

    task_scale: float = option(5.0, help="how often what was learnt is subtracted", minimum=0.0)
    retains, usual_retain_loss = False, "none"

    def loss(self, inputs):
        return inputs.nll


class RepSelect(Objective, name="repselect"):
    """-mean nll_t, of which one collapsed gradient makes all steps (2606.17168, `trace_jax.unlearning.repselect`)."""

    components: int = option(512, help="singular components of each matrix's gradient that are collapsed", minimum=1)
    adversary_rate: float = option(5.0, help="learning rate of the factors taught before; 0 = none", minimum=0.0)
    retains, usual_retain_loss = False, "none"
    usual_trainable = "layers/experts/gate_up"

    def loss(self, inputs):
        return -inputs.nll


class WGA(Objective, name="wga"):
    """-mean sg(weight_t) nll_t over tokens, weight p_t^beta (2502.19301)."""

    beta: float = option(1.0, help="exponent of a token's probability", minimum=1e-6)

    def loss(self, inputs):
        return ascent(jnp.exp(-self.beta * inputs.nll), inputs.nll)


class TNPO(Referring, Objective, name="tnpo"):
    """The same with weight 2 p^beta / (p^beta + p_ref^beta) (2502.19301). g_effect: tmlr-group/G-effect, 1e-5 more
    below the line, which lets improbable tokens go.
    """

    beta: float = option(4.0, help="inverse temperature", minimum=1e-6)
    form: str = form_option("g_effect")
    needs = ("nll", "reference_nll")

    def loss(self, inputs):
        odds = self.beta * (inputs.nll - inputs.reference_nll)  # log p_ref^beta - log p^beta
        if self.form == "g_effect":
            odds = jnp.logaddexp(odds, self.beta * inputs.nll + math.log(1e-5))
        return ascent(2.0 * jax.nn.sigmoid(-odds), inputs.nll)


class SatImp(Objective, name="satimp"):
    """The same with weight p^beta1 (1 - p)^beta2: saturation, then importance (2505.11953)."""

    gamma: float = option(0.1, help="coefficient of the forget loss", minimum=0.0)
    beta1: float = option(5.0, help="exponent of a token's probability, saturation", minimum=0.0)
    beta2: float = option(1.0, help="exponent of one minus a token's probability, importance", minimum=0.0)

    def loss(self, inputs):
        p = jnp.exp(-inputs.nll)
        return ascent(p**self.beta1 * jnp.maximum(1.0 - p, 0.0) ** self.beta2, inputs.nll)


class _Preference(Objective):
    """A mean over documents; form muse_logits: over all positions, of a loss on every raw logit."""

    form: str = form_option("muse_logits")
    of_paper, of_logits = ("nll",), ("logits",)

    @property
    def needs(self):
        return self.of_logits if self.form == "muse_logits" else self.of_paper

    by_document = True

    def counts(self, masks):
        return everywhere(masks.segments) if self.form == "muse_logits" else super().counts(masks)

    def loss(self, inputs):
        return inputs.vocabulary if self.form == "muse_logits" else self.of_documents(inputs)

    def of_documents(self, inputs: ForgetInputs) -> jax.Array:
        raise NotImplementedError


class NPO(_Preference, Referring, name="npo"):
    """-(2/beta) mean_y log sigma(beta (NLL - NLL_ref)), each document summed (2404.05868). token_mean: its mean, as in
    OPTML-Group/Unlearn-Simple's WMDP code. gemma: google-deepmind/gemma, without 2/beta.
    """

    beta: float = option(0.1, help="inverse temperature", minimum=1e-6)
    form: str = form_option("token_mean", "gemma", "muse_logits")
    of_paper, of_logits = ("nll", "reference_nll"), ("logits", "reference_logits")

    def of_documents(self, inputs):
        of_document = means if self.form == "token_mean" else sums
        risen = of_document(inputs.nll - inputs.reference_nll, inputs.valid, inputs.segments)
        losses = softened(risen, self.beta)
        return losses * (self.beta / 2.0) if self.form == "gemma" else losses

    def vocabulary(self, own, reference):
        return own.mean(softened(reference.logits - own.logits, self.beta))


class SimNPO(_Preference, name="simnpo"):
    """-(2/beta) mean_y log sigma(beta (NLL/length - delta)); no reference model (2410.07163)."""

    gamma: float = option(0.125, help="coefficient of the forget loss", minimum=0.0)
    beta: float = option(4.5, help="inverse temperature", minimum=1e-6)
    delta: float = option(0.0, help="margin (nats per token): gamma / beta of the paper")

    def of_documents(self, inputs):
        return softened(means(inputs.nll, inputs.valid, inputs.segments) - self.delta, self.beta)

    def vocabulary(self, own, reference):
        return own.mean(softened(-own.logits - self.delta, self.beta))


class DPO(Refusing, Referring, Objective, name="dpo"):
    """-(2/beta) mean_y log sigma(beta (r(refusal) - r(forget))), r = NLL_ref - NLL of a document, summed: DPO
    (2305.18290) as NPO's authors run it (2404.05868). tofu: locuslab/tofu, without 2/beta, as DPO's own paper.
    """

    beta: float = option(0.1, help="inverse temperature", minimum=1e-6)
    form: str = form_option("tofu")
    needs = ("nll", "reference_nll", "refusal_nll", "refusal_reference_nll")
    by_document = True

    def loss(self, inputs):
        lost = sums(inputs.nll - inputs.reference_nll, inputs.valid, inputs.segments)
        gained = inputs.refusal_reference_nll - inputs.refusal_nll
        losses = softened(sums(gained, inputs.refusal_valid, inputs.refusal_segments) + lost, self.beta)
        return losses * (self.beta / 2.0) if self.form == "tofu" else losses


class IDK(Refusing, Objective, name="idk"):
    """mean nll_t of the refusals (2401.06121)."""

    needs = ("refusal_nll",)

    def loss(self, inputs):
        return inputs.refusal_nll

    def counts(self, masks):
        return masks.refusal_valid


class FLAT(Refusing, Objective, name="flat"):
    """mean_y (tanh(P(forget)) - tanh(P(refusal))) / 2, P the mean probability of a document's tokens: the f-divergence
    of total variation (2410.11143). released: UCSC-REAL/FLAT, P is the mean over all positions of a batch's rows but
    their last, where those without a target have 0, and tanh comes after it (of a microbatch, where a batch is taken in
    parts).
    """

    form: str = form_option("released")
    needs = ("nll", "refusal_nll")
    by_document = True

    def counts(self, masks):
        if self.form == "released":
            return everywhere(masks.segments).at[:, -1].set(False)
        return super().counts(masks)

    def loss(self, inputs):
        forget = jnp.exp(-inputs.nll), inputs.valid, inputs.segments
        sides = forget, (jnp.exp(-inputs.refusal_nll), inputs.refusal_valid, inputs.refusal_segments)
        if self.form == "released":
            return jnp.stack([jnp.where(valid, p, 0.0) for p, valid, _ in sides])
        return jnp.stack([jnp.tanh(means(*side)) for side in sides])

    def of_means(self, means, parts):
        forget, refusal = jnp.tanh(parts * means) / parts if self.form == "released" else means
        return (forget - refusal) / 2.0


class Steering(Section):
    """mean |h_l(x_f) - c u|^2 / D over tokens, u a fixed random unit direction for each topic.

    wmdp: centerforaisafety/wmdp, every position counts, padding too. open_unlearning: mean over the target tokens of a
    document, then over documents. Both read retain rows alike where `retain_loss` is "hidden", and the first batch.
    """

    layer: int = option(0, help="layer (from 1) whose output is steered; 0 = 1, in models of up to 4 layers", minimum=0)
    form: str = form_option("wmdp", "open_unlearning")
    usual_retain_loss: ClassVar[str] = "hidden"
    usual_trainable: ClassVar[str] = "down_projections"
    needs: ClassVar[tuple[str, ...]] = ("hidden",)

    def loss(self, inputs):
        error = jnp.square(inputs.hidden.astype(jnp.float32) - inputs.target[:, None, :]).mean(-1)
        return error * self.counts(inputs)

    def counts(self, masks):
        if self.form == "open_unlearning":
            read = targets_of(masks.valid)
            length = jnp.take_along_axis(lengths(read, masks.segments), masks.segments, axis=1)
            return jnp.where(read, 1.0 / jnp.maximum(length, 1.0), 0.0)
        return (everywhere(masks.segments) if self.form == "wmdp" else masks.valid).astype(jnp.float32)


class RMU(Steering, Objective, name="rmu"):
    """With a length c that is set (2403.03218)."""

    steering: float = option(6.5, help="length of the target, c", minimum=0.0)


class AdaptiveRMU(Steering, Objective, name="adaptive_rmu"):
    """With c = scale * mean |h_l| of the topic's first batch (2408.06223)."""

    steering_scale: float = option(5.0, help="c in mean lengths of the layer's output on the first batch", minimum=0.0)


class UNDIAL(Objective, name="undial"):
    """Cross-entropy to softmax(z_ref - beta onehot(target)) (2402.10052)."""

    beta: float = option(10.0, help="how much the target's logit is lowered", minimum=1e-6)
    needs = ("logits", "reference_logits")

    def vocabulary(self, own, reference):
        return own.cross_entropy(reference.logits - self.beta * reference.is_target.astype(jnp.float32))


class CEU(Objective, name="ceu"):
    """Cross-entropy to the model's own softmax without the target; not of a document's first token (2503.01224)."""

    needs = ("logits",)

    def counts(self, masks):
        return masks.valid & targets_of(masks.valid)

    def vocabulary(self, own, reference):
        return own.cross_entropy(jnp.where(own.is_target, -jnp.inf, own.logits))


class PDU(Objective, name="pdu"):
    """(largest logit - mean logit)^2 under a bound on the retain loss, whose coefficient is the multiplier
    (2506.05314). open_unlearning: at the positions of the target tokens, not at those that predict them.
    """

    dual_rate: float = option(1.0, help="step size of the coefficient that holds the retain loss down", minimum=0.0)
    retain_bound: float = option(0.0, help="largest retain loss accepted; 0 = 0.05, usual for kl", minimum=0.0)
    dual_warmup: int = option(0, help="steps before that coefficient moves", minimum=0)
    form: str = form_option("open_unlearning")
    needs = ("logits",)

    def counts(self, masks):
        return targets_of(masks.valid) if self.form == "open_unlearning" else masks.valid

    def vocabulary(self, own, reference):
        return jnp.square(own.largest() - own.mean(own.logits))

    def completed(self, retain_loss):
        if retain_loss == "none":
            raise ConfigError("retain_loss is 'none'; objective 'pdu' bounds the retain loss and needs one.")
        if self.retain_bound > 0:
            return self
        if retain_loss != "kl":
            bound = "the largest mean retain loss that is accepted, for example the original model's plus 0.05"
            raise ConfigError(f"objective.retain_bound is needed when retain_loss is {retain_loss!r}: {bound}.")
        return dataclasses.replace(self, retain_bound=0.05)

    def next_alpha(self, alpha, step, retain_loss):
        """max(0, alpha + rate (loss - bound))."""
        moved = jnp.maximum(0.0, alpha + self.dual_rate * (retain_loss - self.retain_bound))
        return jnp.where(step > self.dual_warmup, moved, alpha)
