"""Items of a run are kept at every evaluation; resampled, they give the fronts that other items would have given."""

import dataclasses

import numpy as np
import pytest

from tests import handmade
from trace_jax.evaluation.fronts import MEAN, RunItems, load_run_items, make_draws
from trace_jax.evaluation.task import TaskScores
from trace_jax.tasks.benchmarks import BENCHMARKS
from trace_jax.unlearning.metrics import read_items

QUICK = ("questions", "text")


@pytest.fixture(scope="module", params=["handbook", "text"])
def run(request, tmp_path_factory):
    """(directory, scoreboard, evaluator, scores at each step, front on test) of three models in place of a run."""
    evaluator, board = handmade.make_evaluator(benchmark=request.param), BENCHMARKS[request.param].board
    scores = [{name: handmade.scores(seed)[name] for name in QUICK} for seed in range(3)]
    evaluator = dataclasses.replace(evaluator, original=scores[0])
    directory = tmp_path_factory.mktemp(request.param)
    return directory, board, evaluator, scores, handmade.write_run(directory, evaluator, scores, board)


def test_the_items_of_a_run_have_its_front(run):
    directory, board, _, _, front = run
    items = load_run_items(directory, front, board)
    forgetting, utilities = items.resampled(lambda names: np.ones((1, len(names))))  # every item once
    np.testing.assert_allclose(forgetting[0], front.forgetting, rtol=1e-6)
    assert set(utilities) == set(front.utilities)
    for name, values in utilities.items():
        np.testing.assert_allclose(values[0], front.utilities[name], rtol=1e-6, err_msg=name)
    counted = {name: sum(items.counts(name).values()) for name in front.utilities}  # of the mean those of every utility
    assert counted["general_utility"] == 5 and 2 * counted[MEAN] == sum(counted.values())


def test_a_resample_is_the_run_on_items_that_are_repeated(run, tmp_path):
    """Against the front of explicitly repeated items, measured as everything else is."""
    directory, board, evaluator, scores, front = run
    draws, saved = make_draws(resamples=3, seed=1), read_items(directory)[1]
    forgetting, utilities = load_run_items(directory, front, board).resampled(draws)
    for resample in range(3):
        tasks, repeated = [], [{name: {} for name in QUICK} for _ in scores]
        for task, item in zip(evaluator.tasks, ("question", "row"), strict=False):
            data = {}
            for split, subject in task.data:
                names, group = np.unique(saved[f"{split}/{subject}/{item}"][0], return_inverse=True)
                rows = np.repeat(np.arange(len(group)), draws(names)[resample].astype(int)[group])
                data[split, subject] = type(sets := task.data[split, subject])(*(x[rows] for x in vars(sets).values()))
                for own, of_step in zip(scores, repeated, strict=True):
                    arrays = own[task.name].arrays.items()
                    of_step[task.name] |= {n: x[rows] for n, x in arrays if n.startswith(f"{split}/{subject}/")}
            tasks.append(dataclasses.replace(task, data=data))
        repeated = [{name: TaskScores(arrays) for name, arrays in own.items()} for own in repeated]
        again = dataclasses.replace(evaluator, tasks=tuple(tasks), original=repeated[0])
        expected = handmade.write_run(tmp_path, again, repeated, board)
        np.testing.assert_allclose(forgetting[resample], expected.forgetting, rtol=1e-5)
        for name, values in expected.utilities.items():
            np.testing.assert_allclose(utilities[name][resample], values, rtol=1e-5, err_msg=name)


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
    handmade.write_run(tmp_path, evaluator, scores[:2], board)
    assert load_run_items(tmp_path, front, board) is None
    assert isinstance(load_run_items(directory, front, board), RunItems)
