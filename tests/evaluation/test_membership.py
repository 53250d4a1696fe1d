"""Membership inference in MUSE's convention, on rows whose likelihoods are written by hand."""

import math

import numpy as np
import pytest

from trace_jax.evaluation import membership
from trace_jax.evaluation.likelihood import RowScores
from trace_jax.evaluation.membership import MemberScores


def rows(*texts):
    """RowScores from lists of NLLs; positions beyond a text are invalid and hold a value that must not count."""
    length = max(len(t) for t in texts)
    nll, valid = np.full((len(texts), length), 99.0, np.float32), np.zeros((len(texts), length), bool)
    for i, text in enumerate(texts):
        nll[i, : len(text)], valid[i, : len(text)] = text, True
    return RowScores(np.where(valid, nll, 0).astype(np.float32), valid)


def scores(forget, holdout):
    forget, holdout = np.asarray(forget, float), np.asarray(holdout, float)
    return MemberScores(forget, holdout, forget, holdout)


def test_min_k_is_the_mean_of_the_40_percent_least_likely_tokens():
    found = membership.min_k_scores(rows([1, 5, 2, 8, 3], [4, 1, 1, 1, 1, 6, 1, 1, 1, 2]))
    assert found == pytest.approx([(8 + 5) / 2, (6 + 4 + 2 + 1) / 4])  # int(0.4 * 5) = 2, int(0.4 * 10) = 4


def test_a_text_too_short_for_40_percent_counts_its_least_likely_token_and_an_empty_one_is_left_out():
    assert membership.min_k_scores(rows([3, 7], [2], [])) == pytest.approx([7, 2])


def test_a_likely_token_in_a_padded_row_is_not_mistaken_for_padding():
    assert membership.min_k_scores(rows([0, 0, 0], [1, 1, 1, 1, 1]))[0] == 0.0


def test_a_model_that_memorised_the_forget_texts_has_auc_0_and_one_pushed_too_far_1():
    remembered = membership.member_scores(rows([0.1] * 6, [0.2] * 6), rows([3.0] * 6, [4.0] * 6))
    assert membership.membership_auc(remembered).value == 0.0
    assert membership.loss_auc(remembered).value == 0.0
    pushed = membership.member_scores(rows([9.0] * 6, [8.0] * 6), rows([3.0] * 6, [4.0] * 6))
    assert membership.membership_auc(pushed).value == 1.0


def test_equal_scores_are_half_a_win():
    assert membership.membership_auc(scores([1, 1], [1, 1])).value == 0.5


def test_min_k_and_loss_can_disagree():
    """Familiar but for two rare words: unfamiliar by Min-K, familiar by mean loss."""
    found = membership.member_scores(rows([0, 0, 0, 7, 7]), rows([3, 3, 3, 3, 3]))
    assert membership.membership_auc(found).value == 1.0
    assert membership.loss_auc(found).value == 0.0


def test_privleak_is_the_relative_distance_from_the_retrained_model_in_percent():
    """MUSE-Books: the target's AUC 0.229 against 0.5393 of the retrained model is -57.5."""
    unlearned, retrained = scores([1, 3], [2, 4]), scores([1, 2, 5, 3][:2], [3, 1])
    a = membership.membership_auc(unlearned).value  # pairs (1,2) (1,4) (3,2) (3,4): one of four has holdout lower
    r = membership.membership_auc(retrained).value  # (1,3) no (1,1) tie (2,3) no (2,1) yes: 1.5 of 4
    assert (a, r) == (0.25, 0.375)
    assert membership.privleak(unlearned, retrained).value == pytest.approx((0.25 - 0.375) / 0.375 * 100)


def test_privleak_of_the_retrained_model_itself_is_zero_in_every_resample():
    rng = np.random.default_rng(0)
    retrained = scores(rng.normal(size=30), rng.normal(size=30))
    found = membership.privleak(retrained, retrained)
    assert (found.value, found.low, found.high, found.n) == (0, 0, 0, 60)


def test_privleak_does_not_exist_where_the_retrained_model_has_auc_0():
    assert membership.privleak(scores([1, 2], [2, 1]), scores([1, 1], [2, 2])) is None


def test_privleak_refuses_models_scored_on_different_texts():
    with pytest.raises(ValueError, match="same texts"):
        membership.privleak(scores([1, 2], [2, 1]), scores([1], [2, 1]))


def test_one_text_a_side_gives_a_value_without_an_interval():
    found = membership.membership_auc(scores([1], [2]))
    assert found.value == 0.0 and math.isnan(found.low)
    assert math.isnan(membership.privleak(scores([1], [2]), scores([2], [1])).low)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_true_positive_rate_is_the_best_over_all_thresholds(rate, ties):
    rng = np.random.default_rng(3)
    forget, holdout = rng.normal(0, 1, 40), rng.normal(0.7, 1, 30)
    if ties:
        forget, holdout = np.round(forget), np.round(holdout)
    best = 0.0
    for threshold in np.concatenate([forget, holdout]):
        if (holdout <= threshold).mean() <= rate + 1e-12:  # less unfamiliar than the threshold: taken for a member
            best = max(best, (forget <= threshold).mean())
    assert membership.true_positive_rate(scores(forget, holdout), false_positive_rate=rate).value == best
