"""An evaluator scores tasks once per model and task, keeps what they gave, and writes text only where that may be."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests import handmade
from trace_jax.evaluation.intervals import Measurement, find
from trace_jax.evaluation.task import Evaluator, ScoreStore, Task, TaskScores, hazardous
from trace_jax.io.files import decode


@dataclasses.dataclass
class Counting(Task):
    """A task that counts how often it is scored; each item is the sum of the embedding's weights."""

    identity: str = "one"
    quick: bool = True
    name: str = "counting"
    calls: int = 0

    def score(self, model, *, batch_size, mesh):
        self.calls += 1
        total = float(np.asarray(model.params["embed"]).sum())
        lines = [{"item": i, "generation": "secret"} for i in range(3)]
        return TaskScores({"values": np.full(3, total)}, {"part": lines})

    def measure(self, scores, *, original, retrained, resamples, seed):
        assert (original is None) == (retrained is None)
        return []


@pytest.fixture
def evaluator():
    return handmade.make_evaluator(benchmark="presidents", tasks=[Counting()])


def check_same(one, other):
    assert one.keys() == other.keys()
    for name, scores in one.items():
        assert scores.arrays.keys() == other[name].arrays.keys()
        for path, values in scores.arrays.items():
            np.testing.assert_array_equal(values, other[name].arrays[path])


def test_kept_scores_are_the_computed_ones_and_are_not_computed_again(evaluator, tmp_path):
    store, model = ScoreStore(tmp_path, "model a"), handmade.make_model()
    first = evaluator.score(model, full=True, store=store)
    check_same({name: scores for name, scores in first.items() if name != "counting"}, handmade.scores(0))
    assert list(first) == ["questions", "text", "verbatim", "memorization", "membership", "counting"]
    stored = evaluator.score(model.replace(params=None), full=True, store=store)  # no parameters are needed
    check_same(first, stored)
    assert evaluator.tasks[-1].calls == 1
    assert evaluator.measure(first) == evaluator.measure(stored)
    assert not [file for file in tmp_path.iterdir() if "tmp" in file.name]


@pytest.mark.parametrize(
    ("model_id", "identity", "calls"), [("a", "one", [1, 1]), ("b", "one", [2, 2]), ("a", "two", [2, 1])]
)
def test_another_model_or_task_is_scored_anew(tmp_path, model_id, identity, calls):
    tasks = Counting(), Counting(name="another")
    evaluator, model = Evaluator(handmade.SETTINGS, tasks), handmade.make_model()
    evaluator.score(model, store=ScoreStore(tmp_path, "a"))
    tasks[0].identity = identity
    evaluator.score(model, store=ScoreStore(tmp_path, model_id))
    assert [task.calls for task in tasks] == calls


def test_quick_scoring_leaves_out_what_is_slow(evaluator):
    assert list(evaluator.score(handmade.make_model())) == ["questions", "text", "counting"]
    evaluator.tasks[-1].quick = False
    assert list(evaluator.score(handmade.make_model())) == ["questions", "text"]


def test_measurements_can_be_made_of_the_lines(evaluator, tmp_path):
    result = evaluator.measure(evaluator.score(handmade.make_model(), full=True, store=ScoreStore(tmp_path, "model")))

    def of(task, **chosen):
        lines = map(json.loads, next(tmp_path.glob(f"{task}.*.jsonl")).read_text().splitlines())
        return [line for line in lines if all(line[key] == value for key, value in chosen.items())]

    questions = of("questions", split="test", subject="forget")
    assert [line["item"] for line in questions] == list(range(9))
    assert all(np.argmax(q["log_likelihood"]) == q["answer"] for q in questions if q["correct"])
    assert find(result, "cloze_accuracy", "test").value == pytest.approx(np.mean([q["correct"] for q in questions]))
    rows = of("text", split="test", subject="general")
    nll = sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)
    assert len(rows) == 5 and find(result, "general_nll", "test").value == pytest.approx(nll)
    scores = [line["score"] for line in of("verbatim", split="validation")]
    assert find(result, "verbatim", "validation").value == pytest.approx(np.mean(scores))
    prompts = next(task.data for task in evaluator.tasks if task.name == "verbatim")
    first = of("verbatim", split="test", item=0)[0]
    assert first["ground_truth"] == " ".join(f"w{i}" for i in prompts["test"].continuation[0])
    assert len(first["generation"].split()) == 4 and first["prompt"].split()[-1] == f"w{prompts['test'].prompt[0][-1]}"
    shown = [line for line in questions if "options" in line]
    asked = next(task.data for task in evaluator.tasks if task.name == "questions")["test", "forget"]
    assert len(shown) == 5 and "options" not in of("questions", split="validation")[0]
    for line in shown:
        whole = [f"{line['question']} {option}".split() for option in line["options"]]
        padded = asked.tokens[line["item"]], asked.segments[line["item"]] > 0
        assert whole == [[f"w{t}" for t in row[own]] for row, own in zip(*padded, strict=True)]
    sides = [of("membership", split="test", side=side) for side in ("forget", "holdout")]
    wins = np.mean([[(h["min_k"] < f["min_k"]) + 0.5 * (h["min_k"] == f["min_k"]) for h in sides[1]] for f in sides[0]])
    assert find(result, "privleak_auc", "test").value == pytest.approx(wins)
    assert find(result, "membership_min_k_auc", "test").value == pytest.approx(1 - wins)


def test_no_text_is_written_where_it_may_not_be(tmp_path):
    settings = dataclasses.replace(handmade.SETTINGS, audit_text=False)
    evaluator = handmade.make_evaluator(settings=settings, tasks=[Counting()])
    evaluator.score(handmade.make_model(), full=True, store=ScoreStore(tmp_path, "model"))
    lines = [json.loads(line) for line in (tmp_path / "verbatim.items.jsonl").read_text().splitlines()]
    assert lines and all(set(line) == {"split", "item", "score"} for line in lines)
    for name in ("huggingface:cais/wmdp-corpora/cyber-forget-corpus:train", "data/WMDP-bio-forget.jsonl"):
        assert hazardous(["a.jsonl", name])
    assert not hazardous(["a.jsonl", "huggingface:muse-bench/MUSE-Books"])
    written = "".join(file.read_text() for file in tmp_path.glob("*.jsonl"))
    assert "secret" not in written and not any(f"w{i} " in written or f'w{i}"' in written for i in range(handmade.V))


def test_a_measurement_survives_the_way_through_json():
    accuracy = Measurement(0.5, 0.4, 0.6, 60, "forget_accuracy", "test")
    for one in (accuracy, Measurement(-57.5, -80, -30, 200, "privleak", "validation", "a note")):
        assert decode(Measurement, json.loads(json.dumps(one.to_json(), allow_nan=False))) == one
    plain = Measurement(0.5, math.nan, math.nan, 1, "verbatim", "test").to_json()
    assert next(iter(plain)) == "name" and plain["low"] is None and plain["high"] is None
    assert math.isnan(decode(Measurement, plain).low)
    assert find([accuracy], "forget_accuracy", "test") is accuracy
    assert find([accuracy], "forget_accuracy", "validation") is None
