"""Rules about evaluations: when a run ends, which state it keeps, and that an interruption changes neither.

What each item gave is kept by step: an interrupted run leaves the file of an uninterrupted one.
"""

import numpy as np
import pytest

from tests.tiny import history
from tests.unlearning.conftest import Stop
from tests.unlearning.test_loop import fresh, placed, step_until
from trace_jax.checkpoints.state import StateStore
from trace_jax.io.files import read_lines
from trace_jax.io.signals import Interrupted
from trace_jax.unlearning.loop import Evaluated, Hook, Loop, Rules
from trace_jax.unlearning.metrics import Metrics, read_items

# Forgetting and utility of the state after each of ten steps: forgetting falls, utility falls and comes back.
FORGETTING = [1.0, 0.9, 0.8, 0.5, 0.4, 0.4, 0.3, 0.35, 0.3, 0.2, 0.2]
UTILITY = [1.0, 1.0, 0.9, 0.7, 0.5, 0.6, 0.8, 0.9, 0.7, 0.9, 0.3]


def best_at(forgetting, **stops):
    return Rules(keep={"name": "best_utility", "forgetting": forgetting}, **stops)


BEST = best_at(0.4)


def run(path, rules, *, every=1, save=4, **how):
    def evaluate(step, _):
        return Evaluated({"step": step}, FORGETTING[step], UTILITY[step])

    loop = Loop(path, "a", 10, save, "test", Hook(every, evaluate), rules=rules)
    return loop.run(fresh, placed, step_until(**how))


def kept(result):
    assert int(result.trainable["count"]) == result.step
    return result.step


@pytest.mark.parametrize(
    ("rules", "step", "reason"),
    [
        (Rules(), 10, ""),
        (Rules(stop_forgetting=0.4), 4, "forgetting 0.4 reached stop_forgetting 0.4 at step 4"),
        (Rules(stop_utility=0.6), 4, "utility 0.5 fell below stop_utility 0.6 at step 4"),
        (Rules(stop_forgetting=0.05), 10, ""),
        (Rules(stop_forgetting=1.0), 0, "forgetting 1 reached stop_forgetting 1 at step 0"),
    ],
)
def test_a_rule_ends_the_run_and_that_is_no_failure(tmp_path, rules, step, reason):
    result = run(tmp_path, rules)
    assert (kept(result), result.stopped, result.failed) == (step, reason, False)
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == step
    again = run(tmp_path, rules, stop=step)  # an ended run takes no further step
    assert (kept(again), again.stopped) == (step, reason)


@pytest.mark.parametrize(("bound", "step"), [(1.0, 0), (0.8, 2), (0.4, 7), (0.3, 9), (0.15, 9)], ids=str)
def test_the_best_state_is_kept(tmp_path, bound, step):
    """Of the evaluations at or below the bound that of the highest utility; else the lowest; of equals the first."""
    assert kept(run(tmp_path, best_at(bound))) == step


@pytest.mark.parametrize("save", [1, 4, 100])
def test_at_most_one_state_is_kept_beside_the_two_newest(tmp_path, monkeypatch, save):
    seen, save_state = [], StateStore.save

    def watched(store, step, state):
        save_state(store, step, state)
        store.wait()
        seen.append(sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()))

    monkeypatch.setattr(StateStore, "save", watched)
    assert kept(run(tmp_path, BEST, save=save)) == 7
    assert max(map(len, seen)) <= 3 and seen[-1][0] == 7 and seen[-1][-1] == 10


@pytest.mark.parametrize(
    ("how", "at", "every", "save"),
    [("stop", 5, 1, 4), ("stop", 8, 3, 100), ("signal_at", 3, 3, 100), ("signal_at", 8, 1, 4)],
)
def test_a_resumed_run_keeps_the_state_of_an_uninterrupted_one(tmp_path, how, at, every, save):
    rules = best_at(0.4, stop_forgetting=0.2)
    whole = run(tmp_path / "whole", rules, every=every, save=save)
    with pytest.raises(Stop if how == "stop" else Interrupted):
        run(tmp_path / "cut", rules, every=every, save=save, **{how: at})
    resumed = run(tmp_path / "cut", rules, every=every, save=save)
    assert kept(resumed) == kept(whole) and resumed.stopped == whole.stopped
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def test_after_an_error_the_best_state_is_still_the_result(tmp_path):
    result = run(tmp_path, BEST, save=3, nan_at=8)
    assert (kept(result), result.failed) == (7, True)


def test_a_best_state_that_can_not_be_read_gives_way_to_the_newest(tmp_path, caplog):
    run(tmp_path, BEST, save=3)
    for file in (tmp_path / "checkpoints" / "7" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    result = run(tmp_path, BEST, save=3)
    assert kept(result) == 10 and "the state of step 7 can't be restored" in caplog.text


def test_an_evaluation_without_the_number_that_a_rule_reads_is_refused(tmp_path):
    loop = Loop(tmp_path, "a", 10, 4, "test", Hook(1, lambda *_: {"accuracy": 1.0}), rules=Rules(stop_utility=0.5))
    with pytest.raises(ValueError, match="the evaluation at step 0 gives no utility"):
        loop.run(fresh, placed, step_until())


# --- what each item gave


def items(step):
    return {"test/forget/correct": np.array([True, step > 3, False]), "test/general/nll": np.float32([step, 2.5])}


def write(path, steps, identity="a"):
    metrics = Metrics(path, identity)
    for step in steps:
        metrics.write_items(step, items(step))
    return metrics


def same(path, steps, identity="a"):
    stored, arrays = read_items(path, identity)
    assert stored.tolist() == steps
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, np.stack([items(step)[name] for step in steps]))
        assert values.dtype == items(0)[name].dtype


def test_a_step_that_is_evaluated_again_replaces_itself_and_later_ones(tmp_path):
    write(tmp_path, [0, 3, 6, 9])
    write(tmp_path, [6])
    same(tmp_path, [0, 3, 6])
    assert not list(tmp_path.glob(".*"))


def test_continuing_drops_what_comes_after_the_state_and_starting_anew_drops_all(tmp_path):
    metrics = write(tmp_path, [0, 3, 6])
    metrics.trim(4)
    same(tmp_path, [0, 3])
    metrics.trim(0)
    assert not read_items(tmp_path)[0].size


def test_items_of_another_run_are_not_continued(tmp_path):
    write(tmp_path, [0, 3])
    assert not read_items(tmp_path, "b")[0].size
    write(tmp_path, [0], identity="b")
    same(tmp_path, [0], identity="b")
    assert not read_items(tmp_path, "a")[0].size
