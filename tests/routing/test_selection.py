"""Which experts are forget-critical, on examples that can be checked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_jax.config import ConfigError
from trace_jax.routing.config import random_like, select_experts, z_scores
from trace_jax.routing.statistics import ExpertStatistics


def statistics(counts, tokens, top_k=2, affinity=None):
    counts = np.asarray(counts, np.int64)
    return ExpertStatistics(counts, np.zeros(counts.shape) if affinity is None else np.asarray(affinity), tokens, top_k)


# One layer, 100 forget and 1000 retain tokens, K = 2, E = 4, so K/E = 0.5.
FORGET = statistics([[90, 60, 30, 20]], 100, affinity=[[0.1, 0.5, 0.3, 0.1]])
RETAIN = statistics([[400, 700, 100, 800]], 1000)


@pytest.mark.parametrize(
    ("rule", "settings", "expected"),
    [
        # Ratios 2.25, .857, 3, .25; forget frequencies .9, .6, .3, .2 against kappa * 0.5
        ("ratio", {"kappa": 0.5, "tau": 1.2}, [0, 2]),
        ("ratio", {"kappa": 0.8, "tau": 1.2}, [0]),
        ("ratio", {"kappa": 0.5, "tau": 2.5}, [2]),
        ("ratio", {"kappa": 0.0, "tau": 0.0}, [0, 1, 2, 3]),
        # Differences .5, -.1, .2, -.6
        ("difference", {"top": 1}, [0]),
        ("difference", {"top": 3}, [0, 1, 2]),
        ("log_odds", {"z": 5.0}, [0, 2]),
        # Falling forget frequencies .9 .6 .3 .2 (sum K = 2); those above their retain frequency are 0 and 2
        ("cumulative", {"mass": 0.45}, [0]),
        ("cumulative", {"mass": 0.5}, [0]),  # needs 0 and 1; 1 falls below its retain frequency
        ("cumulative", {"mass": 0.76}, [0, 2]),
        ("cumulative", {"mass": 0.0}, []),
        # Affinities .1, .5, .3, .1
        ("affinity", {"top": 2}, [1, 2]),
        ("affinity", {"top": 1, "scope": "model"}, [1]),
        ("sensitivity", {"top": 2, "sensitivity": np.array([[0.2, 0.1, 0.4, 0.3]])}, [2, 3]),
        ("all", {}, [0, 1, 2, 3]),
    ],
)
def test_rules_by_hand(rule, settings, expected):
    assert np.flatnonzero(select_experts(FORGET, RETAIN, rule=rule, **settings)[0]).tolist() == expected


def test_experts_never_used_ties_and_the_model_as_a_scope():
    unused, even = statistics([[0, 700, 500, 800]], 1000), statistics([[5, 5, 5, 5]], 10)
    assert select_experts(FORGET, unused, rule="ratio", kappa=0.5, tau=100.0)[0].tolist() == [True, False, False, False]
    assert select_experts(even, even, rule="difference", top=2)[0].tolist() == [True, True, False, False]
    forget, retain = statistics([[9, 1], [6, 4]], 10, 1), statistics([[5, 5], [5, 5]], 10, 1)
    selected = select_experts(forget, retain, rule="difference", top=2, scope="model")
    assert selected.tolist() == [[True, False], [True, False]]


def test_log_odds_is_the_two_proportion_z_score_which_noise_of_a_small_corpus_does_not_raise():
    # expert 2: pooled 130/1100, z = .2 / sqrt(p (1-p) (1/100 + 1/1000))
    pooled = 130 / 1100
    expected = 0.2 / np.sqrt(pooled * (1 - pooled) * 0.011)
    np.testing.assert_allclose(z_scores(FORGET, RETAIN)[0, 2], expected, rtol=1e-12)
    small = statistics([[3, 2, 2, 1]], 4)  # .75 against .4, but only four tokens
    assert not select_experts(small, RETAIN, rule="log_odds", z=5.0).any()
    assert not z_scores(statistics([[0, 4]], 4, 1), statistics([[0, 9]], 9, 1)).any()  # no variance, no score


def test_random_is_seeded_and_differs_between_seeds():
    forget = statistics(np.full((4, 16), 10), 80)
    one, again, other = (select_experts(forget, forget, rule="random", top=5, seed=s) for s in (1, 1, 2))
    assert (one.sum(axis=1) == 5).all()
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len({row.tobytes() for row in one}) > 1  # layers are drawn independently


@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=2, max_size=2),
    top=st.integers(1, 6), mass=st.floats(0, 1), kappa=st.floats(0, 2), tau=st.floats(0, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_properties_of_every_rule(counts, top, mass, kappa, tau, seed):
    forget = statistics([counts[0], counts[1]], 60)
    retain = statistics([counts[1], counts[0]], 60)
    for rule in ("difference", "affinity", "random"):
        assert (select_experts(forget, retain, rule=rule, top=top, seed=seed).sum(axis=1) == top).all()
    assert select_experts(forget, retain, rule="all").all()
    looser = select_experts(forget, retain, rule="ratio", kappa=kappa, tau=tau)
    stricter = select_experts(forget, retain, rule="ratio", kappa=kappa, tau=tau + 0.5)
    assert (looser | ~stricter).all()
    covering = select_experts(forget, retain, rule="cumulative", mass=mass)
    assert (forget.frequency > retain.frequency)[covering].all()
    assert not select_experts(forget, forget, rule="cumulative", mass=mass).any()
    assert not select_experts(forget, forget, rule="log_odds", z=0.0).any()
    for selected in (covering, looser):
        drawn, count = random_like(selected, seed=seed), selected.sum(axis=1)
        assert (drawn.sum(axis=1) == count).all()
        assert ((drawn & selected).sum(axis=1) == np.maximum(0, 2 * count - 6)).all()  # none where there are others


def test_bad_arguments_are_named():
    for rule, own, message in (
        ("best", {}, "rule is 'best'; expected one of ratio"),
        ("difference", {"tau": 2.0}, r"difference\.tau"),
        ("difference", {"top": 5}, "top is 5; expected 1 to 4"),
        ("random", {"scope": "expert"}, "scope is 'expert'"),
    ):
        with pytest.raises(ConfigError, match=message):
            select_experts(FORGET, RETAIN, rule=rule, **own)
    with pytest.raises(ValueError, match="same model"):
        select_experts(FORGET, statistics([[1, 1]], 1), rule="all")
    with pytest.raises(ValueError, match="needs sensitivity"):
        select_experts(FORGET, RETAIN, rule="sensitivity")
