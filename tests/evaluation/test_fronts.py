"""What is read off a front: crossings of forgetting levels, and the area between two fronts."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trace_jax.evaluation import fronts
from trace_jax.evaluation.fronts import MEAN, Front, front_from_history, mean_difference
from trace_jax.evaluation.intervals import Measurement
from trace_jax.io.files import decode, encode
from trace_jax.tasks.benchmarks import BENCHMARKS


def front(forgetting, utility, steps=None):
    steps = np.arange(len(forgetting)) * 4 if steps is None else np.asarray(steps)
    forgetting, utility = np.asarray(forgetting, float), np.asarray(utility, float)
    return Front(steps, forgetting, {MEAN: utility}, {"forget_accuracy": forgetting})


def utility_at(run, level):
    read = fronts.crossings(run.forgetting[None], level)
    return None if run.forgetting.min() > level else read(run.utilities[MEAN][None])[0]


FALLS, RETURNS = front([1.0, 0.5, 0.2], [1.0, 0.9, 0.1]), front([1.0, 0.4, 0.9, 0.3], [1.0, 0.8, 0.95, 0.2])


@pytest.mark.parametrize(
    ("run", "level", "utility"),
    [
        (FALLS, 0.5, 0.9),  # a level met exactly is that evaluation
        (FALLS, 0.2, 0.1),
        (front([1.0, 0.6], [1.0, 0.9]), 0.5, None),  # never reached
        (front([0.4, 0.2], [1.0, 0.5]), 0.5, 1.0),  # met from the start
        (RETURNS, 0.4, 0.8),  # the first crossing counts even if knowledge comes back
        (RETURNS, 0.3, 0.2),
        (RETURNS, 0.35, 0.95 + (0.9 - 0.35) / 0.6 * (0.2 - 0.95)),
    ],
)
def test_utility_at_a_level(run, level, utility):
    assert utility_at(run, level) == (None if utility is None else pytest.approx(utility))


def test_many_fronts_are_read_at_once_as_each_alone_would_be():
    rng = np.random.default_rng(0)
    forgetting, utility = rng.uniform(size=(200, 6)).round(1), rng.uniform(size=(200, 6))
    for f, u, value in zip(forgetting, utility, fronts.crossings(forgetting, 0.2)(utility), strict=True):
        expected = utility_at(front(f, u), 0.2)
        assert value == pytest.approx(u[f.argmin()] if expected is None else expected)


points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=7)


@settings(max_examples=40, deadline=None)
@given(points, points)
@example([(20, 20)], [(6, 20)])
def test_the_difference_equals_a_fine_sum_and_changes_sign_with_the_order(first, second):
    a, b = (front([1.0, *(f / 20 for f, _ in p)], [1.0, *(u / 20 for _, u in p)]) for p in (first, second))
    difference = mean_difference(a, b)
    low, high = max(a.forgetting.min(), b.forgetting.min()), min(a.forgetting[0], b.forgetting[0])
    assert (difference is None) == (low >= high), "without a common range there is none"
    if difference is None:
        return
    assert mean_difference(b, a) == pytest.approx(-difference)
    levels = low + (np.arange(400) + 0.5) / 400 * (high - low)
    differences = [utility_at(a, level) - utility_at(b, level) for level in levels]
    assert difference == pytest.approx(np.mean(differences), abs=0.02)


def measurements(**values):
    made = [Measurement(value, value, value, 60, name, "test") for name, value in values.items()]
    return [*made, Measurement(0.123, 0, 1, 30, "forget_accuracy", "validation")]


def test_the_front_of_a_run_divides_relative_utilities_by_the_original():
    history = [
        (0, measurements(forget_accuracy=0.98, neighbour_accuracy=0.8, general_utility=1.0)),
        (4, measurements(forget_accuracy=0.4, neighbour_accuracy=0.6, general_utility=0.96)),
    ]
    run = front_from_history(history, board=BENCHMARKS["handbook"].board, split="test")
    assert run.forgetting.tolist() == [0.98, 0.4]
    assert run.utilities["neighbour_accuracy"] == pytest.approx([1.0, 0.75])
    assert run.utilities[MEAN] == pytest.approx([1.0, (0.75 + 0.96) / 2])
    assert run.measured["neighbour_accuracy"].tolist() == [0.8, 0.6]
    assert encode(decode(Front, json.loads(json.dumps(encode(run))))) == encode(run)
    original = {"neighbour_accuracy": 0.8, "general_utility": 1.0}  # in place of step 0
    later = front_from_history(history[1:], board=BENCHMARKS["handbook"].board, split="test", original=original)
    assert (later.forgetting[0], later.utilities[MEAN][0]) == (0.4, pytest.approx(run.utilities[MEAN][1]))
    history = [(0, measurements(forget_probability_ratio=1.0, general_utility=1.0))]
    alone = front_from_history(history, board=BENCHMARKS["text"].board, split="test")
    assert set(alone.utilities) == {"general_utility", MEAN}


def test_what_a_front_cannot_be_made_of_is_named():
    for values, message in (
        ({"general_utility": 1.0}, "forget_accuracy was not measured"),
        ({"forget_accuracy": 0.4, "neighbour_accuracy": 0.0}, "needs a positive value"),
        ({"forget_accuracy": 0.4}, "no utility was measured"),
    ):
        with pytest.raises(ValueError, match=message):
            front_from_history([(0, measurements(**values))], board=BENCHMARKS["handbook"].board, split="test")
    with pytest.raises(ValueError, match="increasing steps"):
        front([1.0, 0.5], [1.0, 0.9], steps=[4, 4])
    with pytest.raises(ValueError, match="finite"):
        front([1.0, np.nan], [1.0, 0.9])
