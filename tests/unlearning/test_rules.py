"""Rules about evaluations: when a run ends, which state it keeps, and that an interruption changes neither."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unlearning.conftest import Stop
from trace_jax.checkpoints.state import StateStore
from trace_jax.io.files import read_lines
from trace_jax.io.signals import Interrupted
from trace_jax.unlearning.loop import Evaluated, Hook, Loop, Rules, TrainState

# Forgetting and utility of the state after each of ten steps: forgetting falls, utility falls and comes back.
FORGETTING = [1.0, 0.9, 0.8, 0.5, 0.4, 0.4, 0.3, 0.35, 0.3, 0.2, 0.1]
UTILITY = [1.0, 1.0, 0.9, 0.7, 0.5, 0.6, 0.8, 0.9, 0.7, 0.9, 0.3]


def best_at(forgetting, **stops):
    return Rules(keep={"name": "best_utility", "forgetting": forgetting}, **stops)


BEST = best_at(0.4)


def fresh():
    return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(3)}, {"m": jnp.ones(3)})


@jax.jit
def advance(state, loss):
    moment = state.optimizer["m"] * 1.5
    return TrainState(state.step + 1, {"w": state.trainable["w"] + 1.0}, {"m": moment}), {"loss": loss}


def stepping(stop=None, signal_at=None, nan_at=None):
    def step(state, given):
        index, loss = given
        if index == stop:
            raise Stop
        if index == signal_at:
            signal.raise_signal(signal.SIGTERM)
        return advance(state, loss)

    def inputs(index):
        return index, jax.device_put(np.float32(np.nan if index == nan_at else 0.0))

    return inputs, step


def evaluate(trainable):
    """The weight counts the steps."""
    step = int(trainable["w"][0])
    return Evaluated({"step": step}, FORGETTING[step], UTILITY[step])


def run(path, rules, *, every=1, save=4, **how):
    loop = Loop(path, "a", 10, save, "test", Hook(every, lambda _, trained: evaluate(trained)), rules=rules)
    return loop.run(fresh, *stepping(**how))


def kept(result):
    assert int(result.trainable["w"][0]) == result.step
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


@pytest.mark.parametrize(
    ("bound", "step"), [(1.0, 0), (0.8, 2), (0.4, 7), (0.3, 9), (0.15, 10), (0.01, 10)], ids=lambda x: str(x)
)
def test_the_best_state_is_kept(tmp_path, bound, step):
    """Of the evaluations at or below the bound that of the highest utility, of equals the first; else the lowest."""
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
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


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
        loop.run(fresh, *stepping())


def test_of_equal_evaluations_the_first_is_best():
    numbers = [(0.5, 1.0), (0.2, 0.5), (0.2, 0.6), (0.1, 0.6)]
    evaluations = {step: Evaluated(None, *pair) for step, pair in enumerate(numbers)}
    assert best_at(0.2).best(evaluations) == 2
    del evaluations[3]
    assert best_at(0.0).best(evaluations) == 1
