"""Items of a run are kept at every evaluation; resampled, they give the fronts that other items would have given."""

import dataclasses

import numpy as np
import pytest

from tests import handmade
from trace_jax.evaluation.fronts import MEAN, RunItems, front_from_history, load_run_items, make_draws
from trace_jax.evaluation.probes import relative_likelihood
from trace_jax.tasks.benchmarks import scoreboard
from trace_jax.unlearning.metrics import Metrics, read_items

STEPS = (0, 4, 8)
QUICK = ("questions", "text")


@pytest.fixture(scope="module", params=["handbook", "text"])
def run(request, tmp_path_factory):
    """(directory, scoreboard, evaluator, scores at each step, front on test) of three models in place of a run."""
    evaluator, board = handmade.make_evaluator(benchmark=request.param), scoreboard(request.param)
    scores = [{name: handmade.scores(seed)[name] for name in QUICK} for seed in range(len(STEPS))]
    evaluator = dataclasses.replace(evaluator, original=scores[0])
    directory = tmp_path_factory.mktemp(request.param)
    for step, own in zip(STEPS, scores, strict=True):
        Metrics(directory, "a").write_items(step, evaluator.outcomes(own))
    history = [(step, evaluator.measure(own)) for step, own in zip(STEPS, scores, strict=True)]
    return directory, board, evaluator, scores, front_from_history(history, board=board, split="test")


def test_the_items_of_a_run_have_its_front(run):
    directory, board, _, _, front = run
    items = load_run_items(directory, front, board)
    forgetting, utilities = items.resampled(lambda names: np.ones((1, len(names))))  # every item once
    np.testing.assert_allclose(forgetting[0], front.forgetting, rtol=1e-6)
    assert set(utilities) == set(front.utilities)
    for name, values in utilities.items():
        np.testing.assert_allclose(values[0], front.utilities[name], rtol=1e-6, err_msg=name)


def test_a_resample_is_the_run_on_items_that_are_repeated(run):
    """Against the scores of explicitly repeated items, measured as everything else is."""
    directory, board, evaluator, scores, front = run
    items = load_run_items(directory, front, board)
    draws = make_draws(resamples=3, seed=1)
    forgetting, utilities = items.resampled(draws)
    result = {board.forgetting: forgetting, **utilities}
    saved = read_items(directory)[1]

    def repeated(subject, name, resample):
        distinct, group = np.unique(saved[f"test/{subject}/{name}"][0], return_inverse=True)
        return np.repeat(np.arange(len(group)), draws(distinct)[resample].astype(int)[group])

    checked = set()
    for at, step_scores in enumerate(scores):
        arrays, first = ({**one["questions"].arrays, **one["text"].arrays} for one in (step_scores, scores[0]))
        for resample in range(3):
            for subject in {key[1] for task in evaluator.tasks[:2] for key in task.data}:
                name = board.questions.get(subject, f"{subject}_accuracy")
                if f"test/{subject}/log_likelihood" in arrays and name in result:
                    rows = repeated(subject, "question", resample)
                    answer = evaluator.tasks[0].data["test", subject].answer[rows]
                    ours, before = (
                        np.mean(x[f"test/{subject}/log_likelihood"][rows].argmax(axis=1) == answer)
                        for x in (arrays, first)
                    )
                    expected = ours / before if board.utilities.get(name) else ours
                    assert result[name][resample, at] == pytest.approx(expected)
                    checked.add(name)
                if (name := relative_likelihood(subject)) in result:
                    rows = repeated(subject, "row", resample)
                    ours, before = (x[f"test/{subject}/nll"][rows].sum() for x in (arrays, first))
                    gain = np.exp((before - ours) / arrays[f"test/{subject}/tokens"][rows].sum())
                    expected = gain if subject == "forget" else min(gain, 1)
                    assert result[name][resample, at] == pytest.approx(expected, rel=1e-5)
                    checked.add(name)
    assert checked == set(result) - {MEAN}


def test_questions_of_a_group_are_one_name_and_equal_rows_too():
    evaluator = handmade.make_evaluator(benchmark="handbook")
    saved = evaluator.outcomes(handmade.scores(0))
    groups = evaluator.tasks[0].data["test", "forget"].group
    names = saved["test/forget/question"]
    assert [len(set(names[groups == g])) for g in set(groups)] == [1] * 3 and len(set(names)) == 3
    assert not set(saved["validation/forget/question"]) & set(names)
    assert "test/general/original" not in saved


def test_one_item_is_drawn_as_often_wherever_it_comes_up():
    one, other = make_draws(resamples=50, seed=0), make_draws(resamples=50, seed=0)
    first, second = one(np.arange(20)), other(np.arange(12)[::-1])
    np.testing.assert_array_equal(first[:, 11::-1], second)
    assert (first[:, 0] != first[:, 1]).any()
    many = make_draws(resamples=4000, seed=1)(np.arange(20))
    assert many.mean() == pytest.approx(1, abs=0.02) and many.var() == pytest.approx(1, abs=0.03)
    assert (make_draws(resamples=200, seed=0)(np.arange(1)).sum(axis=1) > 0).all()


def test_without_items_at_every_step_of_the_front_there_are_none(run, tmp_path):
    directory, board, evaluator, scores, front = run
    assert load_run_items(tmp_path, front, board) is None
    for step, step_scores in list(zip(STEPS, scores, strict=True))[:2]:
        Metrics(tmp_path, "a").write_items(step, evaluator.outcomes(step_scores))
    assert load_run_items(tmp_path, front, board) is None
    assert isinstance(load_run_items(directory, front, board), RunItems)


def test_mean_utility_stands_on_the_items_of_every_utility(run):
    directory, board, _, _, front = run
    items = load_run_items(directory, front, board)
    counted = {name: sum(items.counts(name).values()) for name in front.utilities}
    assert counted[MEAN] == sum(n for name, n in counted.items() if name != MEAN)
    assert counted["general_utility"] == 5
