"""The rivals: each does what its name says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trace_jax as tj
from tests import tiny
from trace_jax.data.rows import Rows
from trace_jax.models.loss import token_nll
from trace_jax.routing import controls
from trace_jax.routing.config import Domain, Hidden
from trace_jax.routing.solver import effective_sample_size


def test_permuted_weights_have_the_same_histogram_and_stay_constant_in_their_units():
    units = np.repeat(np.arange(50), 4)
    weights = np.random.default_rng(0).random(50)[units]
    shuffled = controls.permuted(weights, units, seed=3)
    assert np.array_equal(np.sort(shuffled), np.sort(weights))
    assert not np.array_equal(shuffled, weights)
    assert (np.ptp(shuffled.reshape(50, 4), axis=1) == 0).all()
    assert np.array_equal(shuffled, controls.permuted(weights, units, seed=3))
    assert not np.array_equal(shuffled, controls.permuted(weights, units, seed=4))


def text(rows):
    tokens = np.asarray(rows, np.int32)
    valid = np.ones(tokens.shape, bool)
    valid[:, -1] = False
    return Rows(tokens, np.ones_like(tokens), valid, np.zeros(len(tokens), np.int32))


def test_gradient_cosines_are_of_the_absolute_gradients_of_all_parameters():
    model, forget, retain = tiny.make_model(), tiny.make_rows(3, seed=1), tiny.make_rows(4, seed=2)

    def gradient(rows):
        def nll(params):
            hidden = tj.forward(params, model.config, rows.tokens, mask=rows.segments, collect=("hidden",)).hidden
            nll = token_nll(params, model.config, hidden, jnp.roll(rows.tokens, -1, axis=1))
            return jnp.where(rows.valid, nll, 0.0).sum()

        return np.abs(np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.grad(nll)(model.params))]))

    goal, own = gradient(forget), [gradient(retain.take(np.array([i]))) for i in range(4)]
    expected = [x @ goal / np.linalg.norm(x) / np.linalg.norm(goal) for x in own]
    np.testing.assert_allclose(controls.gradient_cosines(model, forget, retain), expected, rtol=1e-5)


def test_ngram_ratio_equals_a_slow_count_of_uni_and_bigrams():
    forget, retain = text([[1, 2, 1, 2]]), text([[1, 2, 3, 1], [4, 5, 4, 5], [1, 2, 1, 2]])
    retain.valid[2, 1:] = False  # of this row one position counts

    def grams(rows):
        pairs = zip(rows.tokens.tolist(), rows.valid, strict=True)
        return [[g for t in np.flatnonzero(valid) for g in (x[t : t + 1], x[t : t + 2])] for x, valid in pairs]

    def probability(corpus, gram):  # few enough n-grams not to collide in a bucket
        every = [gram for row in grams(corpus) for gram in row]
        return (1 + every.count(gram)) / (len(every) + controls.BUCKETS)

    expected = [sum(np.log(probability(forget, g) / probability(retain, g)) for g in row) for row in grams(retain)]
    np.testing.assert_allclose(controls.ngram_log_ratio(forget, retain), expected, rtol=1e-9)
    assert expected[0] > expected[1]


def test_the_domain_oracle_gives_neighbours_what_the_sample_allows():
    domain, base = np.repeat([1, 0], [5, 95]), np.full(100, 10.0)
    weights = controls.bounded(controls.domain_scores(domain, base), base, Domain())
    share = weights[:5].sum() / weights.sum()  # (1 / .2 = share^2 / .05 + (1 - share)^2 / .95)
    np.testing.assert_allclose(share**2 / 0.05 + (1 - share) ** 2 / 0.95, 5.0, rtol=1e-9)
    assert np.ptp(weights[:5]) == np.ptp(weights[5:]) == 0 and share > 0.4
    with pytest.raises(ValueError, match="domain oracle"):
        controls.domain_scores(np.zeros(100, int), base)


def test_hidden_weights_move_the_mean_state_to_the_forget_mean():
    generator = np.random.default_rng(0)
    states = generator.normal(size=(400, 6)) * [1, 2, 3, 1, 1, 0] + 5  # the last direction never varies
    base = generator.integers(5, 20, 400).astype(float)
    forget = states[:40].mean(0)
    mass = base * controls.hidden_weights(states, forget, base, Hidden(min_effective_sample_size=0.0, max_weight=1e9))
    np.testing.assert_allclose(mass @ states / mass.sum(), forget, atol=1e-8)
    np.testing.assert_allclose(mass.sum() / base.sum(), 1.0)
    far = controls.hidden_weights(states, states.mean(0) + 1.0, base, Hidden(min_effective_sample_size=0.6))
    assert effective_sample_size(far, base) == pytest.approx(0.6)


def nearest_in_turn(forget, retain, base, size):
    """The rule of the published data sets, pair by pair: rounds of nearest rows, the most similar pair first."""
    cosine = np.array([[f @ r / np.linalg.norm(f) / np.linalg.norm(r) for r in retain] for f in forget])
    counts = np.zeros(len(retain))
    for place in range(len(retain)):
        pairs = sorted((-np.sort(-row)[place], np.argsort(-row)[place]) for row in cosine)[::-1]
        for _, row in pairs:
            if place and effective_sample_size(counts, base) >= size:
                return counts
            counts[row] += 1
    return counts


@pytest.mark.parametrize("size", [0.0, 0.2, 0.6, 1.0])
def test_rows_are_chosen_by_the_forget_rows_that_they_are_nearest_to(size):
    generator = np.random.default_rng(0)
    retain, base = generator.normal(size=(60, 4)), generator.integers(5, 20, 60).astype(float)
    forget = 3.0 + generator.normal(size=(7, 4))
    counts = controls.nearest_counts(forget, retain, base, size)
    assert np.array_equal(counts, nearest_in_turn(forget, retain, base, size))
    assert counts.sum() >= 7 and effective_sample_size(counts, base) >= min(size, 0.99)
    chosen = retain[counts > 0] @ forget.mean(0) / np.linalg.norm(retain[counts > 0], axis=1)
    assert size == 1.0 or chosen.mean() > (retain @ forget.mean(0) / np.linalg.norm(retain, axis=1)).mean()


@pytest.mark.parametrize(
    ("forget", "retain", "raw"),
    [
        # Expert 0 has ratio .6/.2 = 3, expert 1 has .9/.09 = 10, cut at 5; expert 2 has ratio 10, but isn't selected.
        ([0.6, 0.9, 0.5, 0.0], [0.2, 0.09, 0.05, 1.0], [3.0, 4.0, 1.0, 1.0]),
        # What forget data use less counts as one.
        ([0.1, 0.5, 0.5, 0.0], [0.5, 0.5, 0.05, 1.0], [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_ratio_weights_by_hand(forget, retain, raw):
    weights = controls.ratio_weights(
        np.array([[[0, 2], [0, 1], [2, 3], [3, 2]]]), np.array([[True, True, False, False]]), np.array([forget]),
        np.array([retain]), 5.0,
    )  # fmt: skip
    np.testing.assert_allclose(weights, raw)
