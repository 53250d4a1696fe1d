"""Membership inference: can one tell the forget texts from texts that no model has seen?

Convention of MUSE (2407.06460): forget texts are labelled 0 and holdout texts 1, so that a model that memorised the
forget set has an AUC near 0, one that never saw it an AUC near 1/2, and one that was pushed too far an AUC near 1.
The right value is that of the retrained model, not 1/2; PrivLeak is the relative distance from it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.likelihood import RowScores

MIN_K = 0.4


@dataclasses.dataclass(frozen=True)
class MemberScores:
    """How unfamiliar a model finds each text (higher: less familiar), f64 [N forget] and f64 [N holdout].

    Texts without a scored token are left out. Two models scored on the same rows can be paired item by item.
    """

    forget_min_k: np.ndarray
    holdout_min_k: np.ndarray
    forget_loss: np.ndarray
    holdout_loss: np.ndarray

    @property
    def enough(self) -> bool:
        """Whether there is at least one text on each side."""
        return len(self.forget_loss) > 0 and len(self.holdout_loss) > 0


def member_scores(forget: RowScores, holdout: RowScores) -> MemberScores:
    """Min-40 % Prob and mean loss of every text, one text a row."""
    return MemberScores(min_k_scores(forget), min_k_scores(holdout), _mean_losses(forget), _mean_losses(holdout))


def min_k_scores(rows: RowScores, *, share: float = MIN_K) -> np.ndarray:
    """Min-K % Prob (2310.16789) of each text with a scored token: minus the mean of the lowest int(share * n) of its n
    log-probabilities, and of at least one (MUSE's code has no value for texts of fewer than 1/share tokens)."""
    scores = []
    for nll, valid in zip(rows.token_nll, rows.valid, strict=True):
        worst = np.sort(nll[valid].astype(np.float64))[::-1]
        if len(worst):
            scores.append(worst[: max(1, int(share * len(worst)))].mean())
    return np.array(scores)


def membership_auc(scores: MemberScores, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """AUC of Min-40 % Prob in MUSE's convention: P(a holdout text is more familiar than a forget text)."""
    return intervals.bootstrap_auc(-scores.holdout_min_k, -scores.forget_min_k, resamples=resamples, seed=seed)


def loss_auc(scores: MemberScores, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """The same with the mean loss of a text instead of Min-40 % Prob."""
    return intervals.bootstrap_auc(-scores.holdout_loss, -scores.forget_loss, resamples=resamples, seed=seed)


def privleak(scores: MemberScores, retrained: MemberScores, *, resamples: int = 1000, seed: int = 0) -> Interval | None:
    """(AUC - AUC_retrained) / AUC_retrained * 100, percent; negative: still remembered, positive: pushed too far.

    Args:
      scores, retrained: of the unlearned and of the retrained model on the same texts; the bootstrap draws the same
        texts for both.

    Returns:
      The interval, or None where the retrained model's AUC is zero and the ratio does not exist.
    """
    if len(scores.forget_min_k) != len(retrained.forget_min_k) or len(scores.holdout_min_k) != len(
        retrained.holdout_min_k
    ):
        raise ValueError("PrivLeak compares two models on the same texts; the numbers of texts differ.")
    auc, reference = membership_auc(scores).value, membership_auc(retrained).value
    n = len(scores.forget_min_k) + len(scores.holdout_min_k)
    if reference == 0:
        return None
    value = (auc - reference) / reference * 100
    if min(len(scores.forget_min_k), len(scores.holdout_min_k)) < 2:
        return Interval(value, np.nan, np.nan, n)
    ours, theirs = (
        intervals.auc_resamples(-s.holdout_min_k, -s.forget_min_k, resamples=resamples, seed=seed)
        for s in (scores, retrained)
    )
    defined = theirs > 0
    return intervals.quantile_interval(value, (ours[defined] - theirs[defined]) / theirs[defined] * 100, n)


def true_positive_rate(scores: MemberScores, *, false_positive_rate: float = 0.01) -> Interval:
    """Share of forget texts found at a threshold that takes at most that share of holdout texts for forget texts.

    Scored by Min-40 % Prob; the attacker's best threshold. The interval is Wilson's at that threshold.
    """
    familiarity, unseen = -scores.forget_min_k, np.sort(-scores.holdout_min_k)[::-1]
    allowed = int(false_positive_rate * len(unseen) + 1e-9)
    found = familiarity > unseen[min(allowed, len(unseen) - 1)] if allowed < len(unseen) else familiarity > -np.inf
    return intervals.wilson(int(found.sum()), len(familiarity))


def _mean_losses(rows: RowScores) -> np.ndarray:
    scored = rows.tokens > 0
    return rows.nll[scored] / rows.tokens[scored]
