"""Kept scores: the same numbers, computed once per model and task, and again when one of them is another."""

import dataclasses
import json

import numpy as np
import pytest

from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.store import ScoreStore
from trace_jax.evaluation.suite import Scores, make_evaluator
from trace_jax.evaluation.task import TaskScores

SETTINGS = EvaluationConfig(batch_size=8, bootstrap=100)


@dataclasses.dataclass
class Counting:
    """A task that counts how often it is scored; each item is the sum of the head's weights."""

    identity: str = "one"
    quick: bool = True
    name: str = "counting"
    calls: int = 0

    def score(self, model, *, batch_size, mesh):
        self.calls += 1
        total = float(np.asarray(model.params["embed"]).sum())
        return TaskScores({"values": np.full(3, total)}, {"part": [{"item": i} for i in range(3)]})

    def measure(self, scores, *, original, retrained, resamples, seed):
        assert (original is None) == (retrained is None)
        return []


@pytest.fixture
def evaluator(tiny):
    probe = tiny.make_probes(0)
    rows = tiny.make_rows(4, seed=1)
    probe = dataclasses.replace(probe, members={"forget": rows, "holdout": tiny.make_rows(5, seed=2)})
    return make_evaluator(
        SETTINGS,
        tiny.config,
        {"test": probe},
        tiny.make_tokenizer(),
        benchmark="presidents",
        tasks=[Counting()],
        identity="probes of today",
    )


def same(one: Scores, other: Scores):
    first, second = one.to_arrays(), other.to_arrays()
    assert first.keys() == second.keys()
    for name in first.keys() - {"seconds"}:
        np.testing.assert_array_equal(first[name], second[name])
    for name, task in one.tasks.items():
        np.testing.assert_array_equal(task.arrays["values"], other.tasks[name].arrays["values"])


def test_kept_scores_are_the_computed_ones_and_are_not_computed_again(tiny, evaluator, tmp_path):
    store = ScoreStore(tmp_path, "model a")
    first = evaluator.full_scores(tiny.params, store=store)
    same(first, evaluator.score(tiny.params, full=True))
    (task,) = evaluator.tasks
    calls = task.calls
    same(first, evaluator.full_scores(None, store=store))  # no parameters are needed
    assert task.calls == calls
    assert [m.to_json() for m in evaluator.measure(first)] == [m.to_json() for m in evaluator.full(None, store=store)]


@pytest.mark.parametrize("change", ["model", "task", "probes"])
def test_another_model_or_task_is_scored_anew(tiny, evaluator, tmp_path, change):
    evaluator.full_scores(tiny.params, store=ScoreStore(tmp_path, "model a"))
    (task,) = evaluator.tasks
    task.identity = "two" if change == "task" else "one"
    evaluator = dataclasses.replace(evaluator, identity="others") if change == "probes" else evaluator
    store = ScoreStore(tmp_path, "model b" if change == "model" else "model a")
    other, calls = tiny.make_params(1), task.calls
    scores = evaluator.full_scores(other, store=store)
    assert task.calls == calls + (change != "probes")
    fresh = evaluator.score(other, full=True)
    changed = scores.text["test", "general"].nll, fresh.text["test", "general"].nll
    assert np.array_equal(*changed) == (change != "task")  # probes alone are kept when the task is another


def test_items_are_lines_beside_the_scores_and_an_unfinished_write_is_no_score(tiny, evaluator, tmp_path):
    store = ScoreStore(tmp_path, "model a")
    evaluator.full_scores(tiny.params, store=store)
    lines = (tmp_path / "counting.part.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"item": 0}, {"item": 1}, {"item": 2}]
    assert not [file for file in tmp_path.iterdir() if "tmp" in file.name]


def test_quick_scoring_leaves_out_what_is_slow(tiny, evaluator):
    (task,) = evaluator.tasks
    assert "counting" in evaluator.score(tiny.params).tasks
    task.quick = False
    assert evaluator.score(tiny.params).tasks == {}
    assert "counting" in evaluator.score(tiny.params, full=True).tasks


def test_empty_probes_are_kept_too(tiny, tmp_path):
    evaluator = make_evaluator(SETTINGS, tiny.config, {}, benchmark="text")
    scores = evaluator.full_scores(tiny.params, store=ScoreStore(tmp_path, "m"))
    assert scores.to_arrays().keys() == {"seconds"}
    assert evaluator.full(None, store=ScoreStore(tmp_path, "m")) == []
