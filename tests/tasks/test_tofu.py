"""TOFU's formulas by hand, and as the code of TOFU and of open-unlearning has them."""

import math

import numpy as np
import pytest
from rouge_score import rouge_scorer
from scipy import stats

from trace_jax.evaluation.rouge import rouge_recalls
from trace_jax.tasks import tofu

LOG = np.log
CORRECT = LOG([0.5, 0.2, 0.9])
WRONG = LOG([[0.25, 0.25], [0.4, 0.1], [0.9, 0.9]])


def random_items(n=40, wrong=5, seed=0):
    rng = np.random.default_rng(seed)
    return -rng.exponential(1.0, n), -rng.exponential(1.5, (n, wrong))


def test_probability_is_length_normalised():
    assert tofu.probability(np.array([(LOG(0.5) + LOG(0.125)) / 2])) == pytest.approx([0.25])


def test_probability_among_wrong_answers():
    found = tofu.probability_among(CORRECT, WRONG)
    assert found == pytest.approx([0.5 / 1.0, 0.2 / 0.7, 1 / 3])


def test_an_item_with_fewer_wrong_answers():
    wrong = np.array([[LOG(0.25), np.nan], [LOG(0.4), LOG(0.1)]])
    assert tofu.probability_among(CORRECT[:2], wrong) == pytest.approx([0.5 / 0.75, 0.2 / 0.7])
    for mean in ("geometric", "arithmetic"):
        assert np.exp(tofu.log_truth_ratio(CORRECT[:2], wrong, wrong_mean=mean))[0] == pytest.approx(0.5)


def test_truth_ratio_by_hand():
    geometric = np.exp(tofu.log_truth_ratio(CORRECT, WRONG))
    assert geometric == pytest.approx([0.25 / 0.5, 0.2 / 0.2, 1])  # sqrt(0.4 * 0.1) = 0.2
    arithmetic = np.exp(tofu.log_truth_ratio(CORRECT, WRONG, wrong_mean="arithmetic"))
    assert arithmetic == pytest.approx([0.25 / 0.5, 0.25 / 0.2, 1])


def test_aggregators_by_hand():
    ratio = LOG([0.5, 2.0, 1.0])
    assert tofu.aggregated(ratio, "closer_to_1_better") == pytest.approx([0.5, 0.5, 1])
    assert tofu.aggregated(ratio, "true_better") == pytest.approx([0.5, 0, 0])
    assert tofu.aggregated(ratio, "prob_mean") == pytest.approx([1 / 1.5, 1 / 3, 0.5])


def test_truth_ratios_are_those_of_both_repositories():
    correct, wrong = random_items()
    leaderboard = np.exp((-wrong).mean(1) - (-correct))  # p(correct) / p(wrong), losses averaged
    ours = tofu.log_truth_ratio(correct, wrong)
    np.testing.assert_allclose(np.exp(-ours), leaderboard)
    np.testing.assert_allclose(tofu.aggregated(ours, "true_better"), np.maximum(0, 1 - 1 / leaderboard))
    np.testing.assert_allclose(tofu.aggregated(ours, "closer_to_1_better"), np.minimum(leaderboard, 1 / leaderboard))
    averaged = np.exp(wrong).mean(-1) / np.exp(correct)  # utils.py: probabilities averaged
    np.testing.assert_allclose(np.exp(tofu.log_truth_ratio(correct, wrong, wrong_mean="arithmetic")), averaged)
    wrong_prob, correct_prob = np.exp(wrong.mean(1)), np.exp(correct)  # open-unlearning
    theirs = correct_prob / (correct_prob + wrong_prob + 1e-10)
    np.testing.assert_allclose(tofu.aggregated(ours, "prob_mean"), theirs, rtol=1e-6)


def test_a_model_that_gives_every_answer_nothing_knows_no_truth():
    """With 1e-10 in the denominator its ratio would be near 0, and its truth near 1."""
    ratio = tofu.log_truth_ratio(np.array([-80.0]), np.array([[-80.0, -80.0]]))
    assert tofu.aggregated(ratio, "true_better") == 0
    assert tofu.aggregated(ratio, "closer_to_1_better") == 1
    extreme = tofu.log_truth_ratio(np.array([-2000.0, -0.1]), np.array([[-0.1], [-2000.0]]))
    for aggregator in ("closer_to_1_better", "true_better", "prob_mean"):
        assert np.isfinite(tofu.aggregated(extreme, aggregator)).all()


def test_forget_quality_is_scipys_test_and_blind_to_increasing_functions():
    ours, theirs = (tofu.log_truth_ratio(*random_items(seed=s)) for s in (1, 2))
    pvalue, statistic = tofu.forget_quality(ours, theirs)
    for function in (np.exp, lambda x: np.exp(-x)):  # open-unlearning's ratio, and TOFU's inverse
        expected = stats.ks_2samp(function(ours), function(theirs))
        assert (pvalue, statistic) == pytest.approx((expected.pvalue, expected.statistic))
    grid = np.concatenate([ours, theirs])
    steps = np.abs((ours[:, None] <= grid).mean(0) - (theirs[:, None] <= grid).mean(0))
    assert statistic == pytest.approx(steps.max())


def test_forget_quality_of_the_retrained_model_itself_is_one():
    ratio = tofu.log_truth_ratio(*random_items())
    assert tofu.forget_quality(ratio, ratio) == (1, 0)
    assert tofu.forget_quality(ratio, ratio + 20)[0] < 1e-10


def test_model_utility_is_the_harmonic_mean_of_nine_means():
    rng = np.random.default_rng(0)
    sets = {name: rng.random((n, 3)) for name, n in (("retain", 30), ("real_authors", 10), ("world_facts", 12))}
    found = tofu.model_utility(sets, resamples=400)
    nine = [column.mean() for values in sets.values() for column in values.T]
    assert found.value == pytest.approx(stats.hmean(nine))
    assert found.n == 52 and found.low < found.value < found.high
    naive, rng = [], np.random.default_rng(1)
    for _ in range(400):
        drawn = [values[rng.integers(0, len(values), len(values))] for values in sets.values()]
        naive.append(stats.hmean([m for values in drawn for m in values.mean(0)]))
    assert (found.low, found.high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.02)


def test_a_mean_of_zero_makes_the_utility_zero():
    sets = {"retain": np.ones((4, 3)), "real_authors": np.ones((4, 3)), "world_facts": np.ones((4, 3)) * [1, 0, 1]}
    found = tofu.model_utility(sets, resamples=100)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert tofu.harmonic_mean(np.array([0.5, 0.5])) == 0.5


def test_one_item_has_a_utility_without_interval():
    found = tofu.model_utility({"retain": np.full((1, 3), 0.5), "real_authors": np.full((5, 3), 0.5)})
    assert found.value == pytest.approx(0.5) and math.isnan(found.low)


def test_rouge_recalls():
    given, truth = ["the author wrote novels", "", "writes"], ["the author writes poems", "anything", "writing"]
    found = rouge_recalls(given, truth)
    assert found == pytest.approx(np.array([[0.5, 0.5], [0, 0], [1, 1]]))  # stems: write, wrote apart
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    assert found[0, 1] == scorer.score(truth[0], given[0])["rougeL"].recall
    assert rouge_recalls([], []).shape == (0, 2)
