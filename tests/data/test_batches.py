"""The step is the position in the data: same step, same batch; shares and frequencies are what was asked for."""

import collections
import itertools

import numpy as np
import pytest

from trace_jax.data.batches import (
    Batches,
    batch_counts,
    epoch_sampler,
    mixture_batches,
    retain_batches,
    sequential_batches,
    weighted_sampler,
)
from trace_jax.data.rows import Rows


def rows_of(count, first=0, length=4):
    tokens = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], length, axis=1)
    return Rows(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool), np.zeros(count, np.int32))


def samplers():
    train = {"general": rows_of(11), "forget": rows_of(5, first=100)}
    return {
        "epochs": Batches(rows_of(11), epoch_sampler(11, 4, seed=3)),
        "weighted": retain_batches(rows_of(11), 4, seed=3, probability=np.arange(11) / 55),
        "mixture": mixture_batches(train, {"general": 0.6, "forget": 0.4}, 5, seed=3),
    }


@pytest.mark.parametrize("name", ["epochs", "weighted", "mixture"])
def test_resuming_at_a_step_gives_the_batches_of_an_unbroken_run(name):
    unbroken, resumed = samplers()[name], samplers()[name]
    run = [unbroken.indices(step) for step in range(12)]
    for step in (7, 8, 11, 2):
        np.testing.assert_array_equal(resumed.indices(step), run[step])
        np.testing.assert_array_equal(resumed[step].tokens, resumed.rows.tokens[run[step]])
    assert run[0].dtype == np.int64
    assert any((a != b).any() for a, b in itertools.pairwise(run))


def test_an_epoch_visits_every_row_once_and_the_next_one_in_another_order():
    sampler = epoch_sampler(12, 5, seed=0)
    drawn = np.concatenate([sampler(step) for step in range(24)]).reshape(-1, 12)
    assert (np.sort(drawn, axis=1) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in drawn}) == len(drawn)
    assert (epoch_sampler(50, 20, seed=0)(0) != epoch_sampler(50, 20, seed=1)(0)).any()
    assert collections.Counter(epoch_sampler(3, 7, seed=0)(0).tolist()).most_common(1)[0][1] == 3


def test_rows_are_drawn_as_often_as_asked():
    probability = np.array([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    sampler = weighted_sampler(7.0 * probability, 64, seed=5)
    drawn = np.bincount(np.concatenate([sampler(s) for s in range(200)]), minlength=6)
    total = drawn.sum()
    error = np.sqrt(probability * (1 - probability) / total)
    assert (np.abs(drawn / total - probability) <= 4 * error).all()
    assert drawn[1] == drawn[5] == 0


def test_equal_probabilities_draw_exactly_as_none():
    plain, equal = (retain_batches(rows_of(9), 4, seed=2, probability=p) for p in (None, np.full(9, 1 / 9)))
    assert all((plain.indices(s) == equal.indices(s)).all() for s in range(9))


@pytest.mark.parametrize(
    ("mixture", "size", "counts"),
    [
        ({"general": 0.50, "neighbour": 0.32, "forget": 0.18}, 32, {"general": 16, "neighbour": 10, "forget": 6}),
        ({"a": 1, "b": 1, "c": 1}, 7, {"a": 3, "b": 2, "c": 2}),
        ({"a": 3.0, "b": 0.0, "c": 1.0}, 8, {"a": 6, "c": 2}),
    ],
)
def test_counts_by_largest_remainder(mixture, size, counts):
    assert batch_counts(mixture, size) == counts


def test_every_batch_has_the_mixture_and_every_source_its_own_epochs():
    train = {"general": rows_of(30), "neighbour": rows_of(6, first=100), "forget": rows_of(4, first=200)}
    batches = mixture_batches(train, {"forget": 0.25, "neighbour": 0.25, "general": 0.5}, 8, seed=1)
    seen = np.concatenate([batches[step].tokens[:, 0] for step in range(30)]).reshape(30, 8)
    assert (np.sort(seen // 100, axis=1) == [0, 0, 0, 0, 1, 1, 2, 2]).all()
    neighbours = seen[seen // 100 == 1].reshape(-1, 6)
    assert (np.sort(neighbours, axis=1) == np.arange(100, 106)).all()
    assert len({tuple(epoch) for epoch in neighbours}) > 1


def test_a_pass_over_the_rows_sees_each_once_and_in_order():
    batches = list(sequential_batches(rows_of(7, first=1), 3))
    assert [b.tokens.shape for b in batches] == [(3, 4), (3, 4), (1, 4)]
    assert np.concatenate([b.tokens[:, 0] for b in batches]).tolist() == list(range(1, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: epoch_sampler(0, 4, seed=0), "no rows"),
        (lambda: epoch_sampler(4, 0, seed=0), "batch_size is 0"),
        (lambda: weighted_sampler(np.array([1.0, -1.0]), 2, seed=0), "non-negative"),
        (lambda: weighted_sampler(np.array([1.0, np.nan]), 2, seed=0), "finite"),
        (lambda: weighted_sampler(np.zeros(3), 2, seed=0), "not all zero"),
        (lambda: retain_batches(rows_of(3), 2, seed=0, probability=np.ones(4)), "4 row probabilities .* 3 rows"),
        (lambda: batch_counts({"a": 0.99, "b": 0.01}, 4), "batch of 4 rows has no room for the sources b"),
        (lambda: batch_counts({"a": -1.0, "b": 2.0}, 4), "non-negative"),
        (lambda: mixture_batches({"a": rows_of(2)}, {"b": 1.0}, 4, seed=0), "names b, but the sources are a"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
