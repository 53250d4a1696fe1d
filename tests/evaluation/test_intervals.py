"""Intervals say how far a number could be off: golden values, brute force, and coverage on known distributions."""

import math

import numpy as np
import pytest
from scipy import stats

from trace_jax.evaluation import intervals


def test_weights_make_the_ratio_of_sums():
    result = intervals.bootstrap_mean(np.array([6.0, 1.0]), weights=np.array([3.0, 1.0]))
    assert result.value == 7 / 4
    assert (result.low, result.high) == (1.0, 2.0)  # a quarter of the resamples draws one row twice


def test_groups_are_resampled_whole_so_copies_of_an_item_add_no_certainty():
    values = np.random.default_rng(2).normal(size=50)
    alone = intervals.bootstrap_mean(values, seed=3)
    copies = intervals.bootstrap_mean(np.repeat(values, 10), groups=np.repeat(np.arange(50), 10), seed=3)
    naive = intervals.bootstrap_mean(np.repeat(values, 10), seed=3)
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
    assert copies.n == 500
    assert naive.high - naive.low < 0.5 * (copies.high - copies.low)


def test_bootstrap_interval_covers_the_true_mean_about_95_times_in_100():
    rng, covered = np.random.default_rng(4), 0
    for trial in range(300):
        result = intervals.bootstrap_mean(rng.exponential(1.0, 60), resamples=300, seed=trial)
        covered += result.low <= 1.0 <= result.high
    assert 0.89 <= covered / 300 <= 0.98


def test_chunks_of_resamples_do_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(5).normal(size=30)
    at_once = intervals.bootstrap_mean(values, resamples=200)
    monkeypatch.setattr(intervals, "_CHUNK", 100)
    chunked = intervals.bootstrap_mean(values, resamples=200)
    assert (chunked.low, chunked.high) == pytest.approx((at_once.low, at_once.high))


def test_averaging_nothing_is_refused():
    for values, weights in ((np.zeros(0), None), (np.ones(2), np.zeros(2))):
        with pytest.raises(ValueError, match="nothing to average"):
            intervals.bootstrap_mean(values, weights=weights)


def test_wilson_equals_scipy_and_is_that_of_groups_that_all_agree():
    for successes, n in ((0, 10), (3, 10), (10, 10), (81, 263)):
        expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        result = intervals.wilson(successes, n)
        assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    result = intervals.proportion(np.ones(30, bool), groups=np.arange(30) // 3)
    assert (result.n, result.low) == (30, pytest.approx(intervals.wilson(10, 10).low))


def test_one_seed_has_the_percentile_interval_of_its_items_and_resamples_without_a_value_are_left_out():
    result = intervals.seeds_and_items(np.array([0.4]), np.linspace(0, 1, 101)[:, None], 7)
    assert (result.value, result.low, result.high, result.n) == (0.4, pytest.approx(0.025), pytest.approx(0.975), 7)
    resampled = np.array([[0.1, 0.3], [0.2, np.nan], [0.3, 0.2], [np.inf, 0.2]])
    values = np.array([0.2, 0.25])
    result = intervals.seeds_and_items(values, resampled, 9)
    assert result == intervals.seeds_and_items(values, resampled[[0, 2]], 9)
    assert math.isnan(intervals.seeds_and_items(values, resampled[:2], 9).low)


def test_auc_resamples_equal_the_auc_of_repeated_items():
    counts = np.array([[2.0, 0.0, 1.0]]), np.array([[0.0, 2.0]])
    result = intervals.auc(np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0]), counts)
    assert result == intervals.auc(np.array([1.0, 1.0, 2.0]), np.array([2.0, 2.0]))
    for nothing in (np.zeros(0), np.array([np.nan])):
        with pytest.raises(ValueError, match="at least one finite score"):
            intervals.auc(nothing, np.ones(3))
