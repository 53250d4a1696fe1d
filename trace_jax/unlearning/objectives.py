"""Forget losses: one table, and pure functions of per-token quantities (docs/methods.md).

A loss returns a pair (sum, count); L_forget is their ratio after both are added over devices, so that it does not
depend on how rows are split. The count depends on masks alone. Where a released code differs from its paper, the
paper's form is the row and the code's stands in its `forms`. Shapes: B rows, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trace_jax.models.vocabulary import Vocabulary

Numbers = Mapping[str, jax.Array]  # f32 [], by name
PAPER = "paper"


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


Loss = Callable[[ForgetInputs, Numbers], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
      loss: see the head of this file.
      source: arXiv number.
      numbers: its settings with their usual values; they are traced, so that a sweep over them compiles once.
      needs: parts of `ForgetInputs`, of "nll", "reference_nll", "hidden", "refusals", "refusals_reference".
      vocabulary: (vocabulary of the model, of the original model or None, numbers) -> f32 [tokens], for losses of
        more than the target's probability. against: whether it reads the original model's.
      gamma: usual coefficient. retains: whether there is a retain term.
      dual: the retain loss is a constraint, and its coefficient follows it.
      negates: it learns the forget set, and what it learnt is subtracted.
      forms: other forms of it by name.
    """

    loss: Loss
    source: str
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ("nll",)
    vocabulary: Callable[[Vocabulary, Vocabulary | None, Numbers], jax.Array] | None = None
    against: bool = False
    gamma: float = 1.0
    retains: bool = True
    dual: bool = False
    negates: bool = False
    forms: Mapping[str, Objective] = dataclasses.field(default_factory=dict)

    def form(self, name: str) -> Objective:
        """The row of a form."""
        return self if name == PAPER else self.forms[name]


def _sum(values, valid):
    return jnp.where(valid, values, 0.0).sum()


def _tokens(valid):
    return valid.sum(dtype=jnp.float32)


def _row_sums(values, valid):
    """(sum of values per row [B], number of valid positions per row [B], rows that have any [B])."""
    length = valid.sum(-1, dtype=jnp.float32)
    return jnp.where(valid, values, 0.0).sum(-1), length, (length > 0).astype(jnp.float32)


def _over_rows(losses, present):
    return (losses * present).sum(), present.sum()


def _softened(x, beta):
    """-(2/beta) log sigma(beta x): about -x where x is far below 0, and 0 far above."""
    return -(2.0 / beta) * jax.nn.log_sigmoid(beta * x)


# --- likelihood


def learning(inputs: ForgetInputs, n: Numbers):
    """mean nll_t: what fine-tuning minimises."""
    return _sum(inputs.nll, inputs.valid), _tokens(inputs.valid)


def gradient_ascent(inputs: ForgetInputs, n: Numbers):
    """-mean nll_t over tokens. With a ceiling > 0: mean over rows of max(0, ceiling - row mean nll), which stops
    pushing a row that is forgotten instead of letting it dominate the step."""
    total, length, present = _row_sums(inputs.nll, inputs.valid)
    row_mean = total / jnp.maximum(length, 1.0)
    hinge = jnp.maximum(0.0, n["nll_ceiling"] - row_mean) * present
    bounded = n["nll_ceiling"] > 0
    return jnp.where(bounded, hinge.sum(), -total.sum()), jnp.where(bounded, present.sum(), length.sum())


def weighted_ascent(weight: Callable[[ForgetInputs, Numbers], jax.Array]) -> Loss:
    """-mean sg(weight_t) nll_t over tokens."""

    def loss(inputs: ForgetInputs, n: Numbers):
        weights = jax.lax.stop_gradient(weight(inputs, n))
        return -_sum(weights * inputs.nll, inputs.valid), _tokens(inputs.valid)

    return loss


def _wga(inputs: ForgetInputs, n: Numbers):
    """p_t^beta."""
    return jnp.exp(-n["beta"] * inputs.nll)


def _tnpo(inputs: ForgetInputs, n: Numbers):
    """2 p^beta / (p^beta + p_ref^beta)."""
    return 2.0 * jax.nn.sigmoid(n["beta"] * (inputs.reference_nll - inputs.nll))


def _satimp(inputs: ForgetInputs, n: Numbers):
    """p^beta1 (1 - p)^beta2: saturation, then importance."""
    p = jnp.exp(-inputs.nll)
    return p ** n["beta1"] * jnp.maximum(1.0 - p, 0.0) ** n["beta2"]


# --- preference


def npo(inputs: ForgetInputs, n: Numbers):
    """-(2/beta) mean_y log sigma(beta (NLL - NLL_ref)), rows summed."""
    total, _, present = _row_sums(inputs.nll - inputs.reference_nll, inputs.valid)
    return _over_rows(_softened(total, n["beta"]), present)


def npo_gemma(inputs: ForgetInputs, n: Numbers):
    """The form of google-deepmind/gemma: -mean_y log sigma(beta (NLL - NLL_ref)), without 2/beta."""
    total, count = npo(inputs, n)
    return total * (n["beta"] / 2.0), count


def simnpo(inputs: ForgetInputs, n: Numbers):
    """-(2/beta) mean_y log sigma(beta (NLL/length - delta)); no reference model."""
    total, length, present = _row_sums(inputs.nll, inputs.valid)
    return _over_rows(_softened(total / jnp.maximum(length, 1.0) - n["delta"], n["beta"]), present)


def dpo(inputs: ForgetInputs, n: Numbers):
    """-(2/beta) mean_y log sigma(beta (r(refusal) - r(forget))), r = NLL_ref - NLL of a row, rows summed."""
    lost, _, present = _row_sums(inputs.nll - inputs.reference_nll, inputs.valid)
    won, _, _ = _row_sums(inputs.refusal_reference_nll - inputs.refusal_nll, inputs.refusal_valid)
    return _over_rows(_softened(won + lost, n["beta"]), present)


def idk(inputs: ForgetInputs, n: Numbers):
    """mean nll_t of the refusals."""
    return _sum(inputs.refusal_nll, inputs.refusal_valid), _tokens(inputs.refusal_valid)


def flat(inputs: ForgetInputs, n: Numbers):
    """mean_y (tanh(P(forget)) - tanh(P(refusal))) / 2, P the mean probability of a row's tokens: the f-divergence of
    total variation."""
    forget, length, present = _row_sums(jnp.exp(-inputs.nll), inputs.valid)
    refusal, refusal_length, _ = _row_sums(jnp.exp(-inputs.refusal_nll), inputs.refusal_valid)
    forget, refusal = forget / jnp.maximum(length, 1.0), refusal / jnp.maximum(refusal_length, 1.0)
    return _over_rows((jnp.tanh(forget) - jnp.tanh(refusal)) / 2.0, present)


# --- representation


def _steered_error(inputs: ForgetInputs):
    return jnp.square(inputs.hidden.astype(jnp.float32) - inputs.target[:, None, :]).mean(-1)


def rmu(inputs: ForgetInputs, n: Numbers):
    """mean |h_l(x_f) - c u|^2 / D over tokens, u a fixed random unit direction."""
    return _sum(_steered_error(inputs), inputs.valid), _tokens(inputs.valid)


def rmu_wmdp(inputs: ForgetInputs, n: Numbers):
    """The form of centerforaisafety/wmdp: every position counts, padding too. (Empty rows, which only fill up a batch
    for the devices, hold no valid token and stay out.)"""
    rows = jnp.broadcast_to(inputs.valid.any(-1, keepdims=True), inputs.valid.shape)
    return _sum(_steered_error(inputs), rows), _tokens(rows)


def rmu_open_unlearning(inputs: ForgetInputs, n: Numbers):
    """The form of locuslab/open-unlearning: mean over the tokens of a row, then over rows."""
    total, length, present = _row_sums(_steered_error(inputs), inputs.valid)
    return _over_rows(total / jnp.maximum(length, 1.0), present)


# --- distributions


def token_mean(inputs: ForgetInputs, n: Numbers):
    """mean over tokens of what `vocabulary` gave."""
    return _sum(inputs.vocabulary, inputs.valid), _tokens(inputs.valid)


def after_first(inputs: ForgetInputs, n: Numbers):
    """`token_mean` without the first token that a document predicts."""
    before = jnp.pad(inputs.valid[:, :-1], ((0, 0), (1, 0)))
    later = inputs.valid & before
    return _sum(inputs.vocabulary, later), _tokens(later)


def _undial(own: Vocabulary, reference: Vocabulary | None, n: Numbers):
    """Cross-entropy to softmax(z_ref - beta onehot(target))."""
    assert reference is not None
    return own.cross_entropy(reference.logits - n["beta"] * reference.is_target.astype(jnp.float32))


def _ceu(own: Vocabulary, reference: Vocabulary | None, n: Numbers):
    """Cross-entropy to the model's own softmax without the target."""
    return own.cross_entropy(own.without_target(jax.lax.stop_gradient(own.logits)))


def _pdu(own: Vocabulary, reference: Vocabulary | None, n: Numbers):
    """(largest logit - mean logit)^2."""
    return jnp.square(own.largest() - own.mean(own.logits))


def _npo_logits(own: Vocabulary, reference: Vocabulary | None, n: Numbers):
    """NPO on every raw logit: -(2/beta) mean_v log sigma(beta (z_ref - z))."""
    assert reference is not None
    return own.mean(_softened(reference.logits - own.logits, n["beta"]))


def _simnpo_logits(own: Vocabulary, reference: Vocabulary | None, n: Numbers):
    """SimNPO on every raw logit: -(2/beta) mean_v log sigma(beta (-z - delta))."""
    return own.mean(_softened(-own.logits - n["delta"], n["beta"]))


_CEILING = {"nll_ceiling": 0.0}
_REFERENCE = ("nll", "reference_nll")
_RMU_FORMS = {"wmdp": rmu_wmdp, "open_unlearning": rmu_open_unlearning}


def _forms(row: Objective, **forms: Objective) -> Objective:
    """A row with other forms, which share its numbers and usual coefficient."""
    shared = {"numbers": row.numbers, "gamma": row.gamma}
    return dataclasses.replace(row, forms={name: dataclasses.replace(form, **shared) for name, form in forms.items()})


def _rmu(source: str, numbers: Mapping[str, float]) -> Objective:
    forms = {name: Objective(loss, source, needs=("hidden",)) for name, loss in _RMU_FORMS.items()}
    return _forms(Objective(rmu, source, numbers, needs=("hidden",)), **forms)


OBJECTIVES: dict[str, Objective] = {
    "gradient_ascent": Objective(gradient_ascent, "2401.06121", _CEILING, retains=False),
    "gradient_difference": Objective(gradient_ascent, "2401.06121", _CEILING),
    "npo": _forms(
        Objective(npo, "2404.05868", {"beta": 0.1}, needs=_REFERENCE),
        gemma=Objective(npo_gemma, "2404.05868", needs=_REFERENCE),
        muse_logits=Objective(token_mean, "2407.06460", needs=(), vocabulary=_npo_logits, against=True),
    ),
    "simnpo": _forms(
        Objective(simnpo, "2410.07163", {"beta": 4.5, "delta": 0.0}, gamma=0.125),
        muse_logits=Objective(token_mean, "2410.07163", needs=(), vocabulary=_simnpo_logits),
    ),
    "dpo": Objective(dpo, "2305.18290", {"beta": 0.1}, needs=(*_REFERENCE, "refusals", "refusals_reference")),
    "idk": Objective(idk, "2401.06121", needs=("refusals",)),
    "rmu": _rmu("2403.03218", {"steering": 6.5}),
    "adaptive_rmu": _rmu("2408.06223", {"steering_scale": 5.0}),
    "undial": Objective(token_mean, "2402.10052", {"beta": 10.0}, needs=(), vocabulary=_undial, against=True),
    "wga": Objective(weighted_ascent(_wga), "2502.19301", {"beta": 1.0}),
    "tnpo": Objective(weighted_ascent(_tnpo), "2502.19301", {"beta": 4.0}, needs=_REFERENCE),
    "satimp": Objective(weighted_ascent(_satimp), "2505.11953", {"beta1": 5.0, "beta2": 1.0}, gamma=0.1),
    "ceu": Objective(after_first, "2503.01224", needs=(), vocabulary=_ceu),
    "pdu": Objective(token_mean, "2506.05314", {"dual_rate": 1.0}, needs=(), vocabulary=_pdu, dual=True),
    "flat": Objective(flat, "2410.11143", needs=("nll", "refusals")),
    "task_vector": Objective(learning, "2212.04089", {"task_scale": 5.0}, retains=False, negates=True),
}


def steering_directions(key: jax.Array, topics: int, width: int) -> jax.Array:
    """RMU's u for each topic: uniform on [0, 1)^D, scaled to length one (f32 [topics, D])."""
    directions = jax.random.uniform(key, (topics, width), jnp.float32)
    return directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
