"""Membership inference: can one tell the forget texts from texts that no model has seen?

Six attacks, each a number per text that is higher the less familiar the text looks. They are reported in the
attacker's convention: the AUC is the probability that a forget text looks more familiar than a holdout text. 1: the
attacker finds every forget text; 1/2: chance; below: forget text was made less likely than text never seen, which gives
it away as well.

PrivLeak and its AUC stay in the convention of MUSE (2407.06460), the other way round: forget texts are labelled 0 and
holdout texts 1, so that a model that memorised the forget set has an AUC near 0. The right value there is that of
the retrained model, not 1/2; PrivLeak is the relative distance from it.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from trace_jax.data.rows import Rows
from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.likelihood import TokenScores, gradient_norms, row_texts, score_sequences, spread_indices
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.models.model import Model

MIN_K = 0.4  # share of a text's tokens that Min-K and Min-K++ look at, as in MUSE and open-unlearning
RATE = 0.01
_LEAST_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class TextScores:
    """How unfamiliar a model finds each of N texts, by attack; higher is less familiar. f64 [N].

    loss: mean NLL of its scored tokens, nats (Yeom et al. 2018).
    min_k: minus the mean of its least likely tokens' log-probabilities (2310.16789).
    min_k_plus_plus: the same of log-probabilities in units of the model's own spread (2404.02936).
    zlib: loss over the bytes of its scored text, compressed (2012.07805). NaN without a tokenizer.
    gradient_norm: of the loss (`gradient_norms`). NaN for texts whose gradient wasn't taken.
    """

    loss: np.ndarray
    min_k: np.ndarray
    min_k_plus_plus: np.ndarray
    zlib: np.ndarray
    gradient_norm: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)


@dataclasses.dataclass(frozen=True)
class MemberScores:
    """Scores of forget texts (trained on) and holdout texts (never seen)."""

    forget: TextScores
    holdout: TextScores


ATTACKS = tuple(field.name for field in dataclasses.fields(TextScores))  # and "reference", which needs a second model


def score_members(
    model: Model, forget: Rows, holdout: Rows, *, gradients: int, batch_size: int = 16, mesh: Mesh | None = None
) -> MemberScores:
    """Scores of the texts of both sides; `gradients`: of how many texts a side gradients are taken, evenly spread."""
    sides = (
        _score_texts(model, rows, gradients=gradients, batch_size=batch_size, mesh=mesh) for rows in (forget, holdout)
    )
    return MemberScores(*sides)


def _score_texts(model: Model, rows: Rows, *, gradients: int, batch_size: int, mesh: Mesh | None) -> TextScores:
    texts, first = row_texts(rows)
    scores = score_sequences(model, texts, first, moments=True, batch_size=batch_size, mesh=mesh)
    loss = np.array([-one.log_prob.mean(dtype=np.float64) for one in scores])
    norms = np.full(len(texts), np.nan)
    chosen = spread_indices(len(texts), gradients)
    norms[chosen] = gradient_norms(model, [texts[i] for i in chosen], [first[i] for i in chosen], mesh=mesh)
    scored = [text[start:] for text, start in zip(texts, first, strict=True)]
    return TextScores(
        loss,
        min_k_scores([one.log_prob for one in scores]),
        min_k_plus_plus_scores(scores),
        loss / compressed_sizes(model.tokenizer, scored),
        norms,
    )


def min_k_scores(values: Sequence[np.ndarray], *, share: float = MIN_K) -> np.ndarray:
    """Min-K % Prob (2310.16789) of each text from its n log-probabilities, f64 [N]: minus the mean of the lowest
    int(share * n) of them, and of at least one (MUSE's code has no value for texts of fewer than 1/share tokens)."""
    lowest = [np.sort(np.asarray(v, np.float64))[: max(1, int(share * len(v)))] for v in values]
    return np.array([-v.mean() for v in lowest])


def min_k_plus_plus_scores(scores: Sequence[TokenScores], *, share: float = MIN_K) -> np.ndarray:
    """Min-K %++ (2404.02936) of each text, f64 [N]: `min_k_scores` of (log-probability - its mean) / deviation.

    Mean and deviation are of the log-probability of a token drawn from the model at that place. As in open-unlearning,
    the variance counts as 1e-6 at least: where a model is certain it is 0.
    """
    standardised = []
    for one in scores:
        if one.mean is None or one.variance is None:
            raise ValueError("Min-K++ needs the moments of the log-probabilities: score_sequences(..., moments=True).")
        log_prob, mean, variance = (np.asarray(x, np.float64) for x in (one.log_prob, one.mean, one.variance))
        standardised.append((log_prob - mean) / np.sqrt(np.maximum(variance, _LEAST_VARIANCE)))
    return min_k_scores(standardised, share=share)


def compressed_sizes(tokenizer: Tokenizer | None, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Bytes of each text (token ids) after zlib, f64 [N]; NaN without a tokenizer. Special tokens are no text."""
    if tokenizer is None:
        return np.full(len(texts), np.nan)
    decoded = tokenizer.decode_batch([list(text) for text in texts])
    return np.array([len(zlib.compress(text.encode("utf-8"))) for text in decoded], np.float64)


def measure_membership(
    scores: MemberScores, retrained: MemberScores | None, *, split: str, resamples: int = 1000, seed: int = 0
) -> list[Measurement]:
    """AUC and true positive rate of every attack, then PrivLeak and its AUC; nothing where a side has no text.

    Args:
      retrained: of the model trained without the forget set, on the same texts: it is the reference of the attack of
        that name and of PrivLeak, which are left out without it.
    """
    if not len(scores.forget) or not len(scores.holdout):
        return []
    resampling, found = {"resamples": resamples, "seed": seed}, []
    for attack, (forget, holdout) in _attacks(scores, retrained).items():
        note = _counts(forget, holdout)
        why = "; no retrained model, so no reference attack" if attack == "loss" and retrained is None else ""
        auc = intervals.bootstrap_auc(-forget, -holdout, **resampling)
        found.append(named(f"membership_{attack}_auc", split, auc, note + why))
        rate = intervals.bootstrap_true_positive_rate(-forget, -holdout, false_positive_rate=RATE, **resampling)
        few = f"; none of fewer than {round(1 / RATE)} holdout texts may pass" if RATE * len(holdout) < 1 else ""
        found.append(named(f"membership_{attack}_tpr_at_fpr_1", split, rate, note + few))
    ours, note = (scores.forget.min_k, scores.holdout.min_k), _counts(scores.forget, scores.holdout)
    why = "; no retrained model to compare with, so no PrivLeak" if retrained is None else ""
    found.append(named("privleak_auc", split, privleak_auc(*ours, **resampling), note + why))
    if retrained is not None:
        leak = privleak(*ours, (retrained.forget.min_k, retrained.holdout.min_k), **resampling)
        found += [] if leak is None else [named("privleak", split, leak, note)]
    return found


def reference_scores(loss: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The reference attack: how much higher the loss of each text is than the reference model's, f64 [N]."""
    if len(loss) != len(reference):
        raise ValueError(f"two models are compared on the same texts; got {len(loss)} and {len(reference)} texts.")
    return loss - reference


def privleak_auc(forget: np.ndarray, holdout: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """AUC of Min-40 % Prob in MUSE's convention: P(a holdout text is more familiar than a forget text).

    forget, holdout: `min_k_scores` of the texts of each side.
    """
    return intervals.bootstrap_auc(-holdout, -forget, resamples=resamples, seed=seed)


def privleak(
    forget: np.ndarray,
    holdout: np.ndarray,
    retrained: tuple[np.ndarray, np.ndarray],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """(AUC - AUC_retrained) / AUC_retrained * 100, percent; negative: still remembered, positive: pushed too far.

    Args:
      forget, holdout: `min_k_scores` of the unlearned model; retrained: those of the retrained model on the same texts.
        The bootstrap draws the same texts for both.

    Returns:
      The interval, or None where the retrained model's AUC is zero and the ratio does not exist.
    """
    if (len(forget), len(holdout)) != tuple(len(side) for side in retrained):
        raise ValueError("PrivLeak compares two models on the same texts; the numbers of texts differ.")
    auc, reference = intervals.auc(-holdout, -forget), intervals.auc(-retrained[1], -retrained[0])
    n = len(forget) + len(holdout)
    if reference == 0:
        return None
    value = (auc - reference) / reference * 100
    if min(len(forget), len(holdout)) < 2:
        return Interval(value, np.nan, np.nan, n)
    ours, theirs = (
        intervals.auc_resamples(-seen[1], -seen[0], resamples=resamples, seed=seed)
        for seen in ((forget, holdout), retrained)
    )
    defined = theirs > 0
    return intervals.quantile_interval(value, (ours[defined] - theirs[defined]) / theirs[defined] * 100, n)


def _attacks(scores: MemberScores, retrained: MemberScores | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(forget, holdout) scores of every attack that has some on both sides."""
    sides = (scores.forget, scores.holdout)
    found = {attack: tuple(getattr(side, attack) for side in sides) for attack in ATTACKS}
    if retrained is not None:
        references = (retrained.forget, retrained.holdout)
        pairs = zip(sides, references, strict=True)
        found["reference"] = tuple(reference_scores(side.loss, reference.loss) for side, reference in pairs)
    found = {attack: (a[~np.isnan(a)], b[~np.isnan(b)]) for attack, (a, b) in found.items()}
    return {attack: both for attack, both in found.items() if all(len(side) for side in both)}


def _counts(forget, holdout) -> str:
    return f"{len(forget)} forget, {len(holdout)} holdout texts"
