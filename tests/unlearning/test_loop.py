"""The loop: interrupted anywhere and started again it ends in the same numbers; it never ends in NaN."""

import contextlib
import dataclasses
import json
import re
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.unlearning.conftest import Stop
from trace_jax.checkpoints.state import StateStore
from trace_jax.io.files import read_lines
from trace_jax.io.signals import Interrupted
from trace_jax.unlearning.loop import Evaluated, Hook, Loop, TrainState
from trace_jax.unlearning.metrics import front_rows, read_items


def fresh(size=3):
    trainable = {"w": jnp.ones(size), "count": jnp.zeros(())}
    return TrainState(jnp.zeros((), jnp.int32), trainable, {"m": jnp.zeros(size)})


def placed(index):
    """(What the step reads, nothing more that is known of it.)"""
    return (index, jax.device_put(np.float32(index))), {}


@jax.jit
def update(state, number):
    """With momentum, so that a wrong optimizer state would show; "count" is the number of steps."""
    gradient = state.trainable["w"] * (jnp.float32(0.1) * (number + jnp.float32(1)))
    momentum = state.optimizer["m"] * 0.9 + gradient
    trainable = {"w": state.trainable["w"] - 0.1 * momentum, "count": state.trainable["count"] + 1.0}
    return TrainState(state.step + 1, trainable, {"m": momentum}), {"loss": number}


def step_until(stop=None, nan_at=None, signal_at=None, number=signal.SIGTERM, repeat=1):
    """A step in which an error, a NaN or a signal comes; Python runs the handler of a signal at the next chance."""

    def step(state, inputs):
        index, value = inputs
        if index == stop:
            raise Stop
        for _ in range(repeat if index == signal_at else 0):
            signal.raise_signal(number)
        state, metrics = update(state, value)
        return state, metrics | ({"loss": NAN} if index == nan_at else {})

    return step


HEAD = ("kind", "identity")
NAN = jax.device_put(np.float32(np.nan))


def first_weight(step, trained):
    return {"w": float(trained["w"][0])}


def make_loop(path, identity="a", evaluate=first_weight):
    return Loop(path, identity, steps=10, checkpoint_every=3, title="test", evaluation=Hook(4, evaluate))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(result, history, directory) of a run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole")
    result = make_loop(path).run(fresh, placed, step_until())
    steps = [row for row in read_lines(path / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert all(isinstance(value, (int, float)) for row in steps for name, value in row.items() if name not in HEAD)
    assert [row["step"] for row in front_rows(path)] == [0, 4, 8, 10]
    return result, tiny.history(path), path


def assert_continues_like_a_whole_run(path, whole):
    resumed = make_loop(path).run(fresh, placed, step_until())
    np.testing.assert_array_equal(resumed.trainable["w"], whole[0].trainable["w"])
    assert tiny.history(path) == whole[1]


def newest(path):
    with StateStore(path / "checkpoints", {"identity": "a", "seed": 0}) as store:
        return store.restore(fresh())[0]


def _line(of, change):
    """Changes the line of metrics.jsonl that has kind and step `of`."""

    def damage(path):
        file = path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        place = next(i for i, line in enumerate(lines) if (r := json.loads(line)) and (r["kind"], r["step"]) == of)
        lines[place] = change(lines[place])
        file.write_bytes(b"".join(lines))

    return damage


def _number(line):
    """Another number in the line, which stays valid JSON."""
    return re.sub(rb'("loss"|"w"): -?', rb"\g<0>1", line)


@pytest.mark.parametrize(
    ("damage", "after"),
    [
        (_line(("step", 2), _number), 0),
        (_line(("step", 5), _number), 3),
        (_line(("measurement", 4), _number), 3),
        (_line(("step", 2), lambda line: b""), 0),
        (_line(("step", 2), lambda line: line[:20] + b"\n"), 0),
        (lambda path: (path / "metrics.jsonl").write_bytes(b""), 0),
        (lambda path: (path / "metrics.jsonl").unlink(), 0),
        (lambda path: (path / "items.npz").write_bytes(b"x" + (path / "items.npz").read_bytes()[1:]), 0),
        (lambda path: (path / "items.npz").unlink(), 0),
        (lambda path: None, 6),
    ],
)
def test_a_run_continues_from_where_all_that_it_wrote_is_as_it_was(tmp_path, damage, after, capsys):
    def evaluate(step, trained):
        return Evaluated(first_weight(step, trained), items={"right": np.array([step, 1], np.int32)})

    expected = make_loop(tmp_path / "whole", evaluate=evaluate).run(fresh, placed, step_until())
    with pytest.raises(Stop):
        make_loop(tmp_path / "cut", evaluate=evaluate).run(fresh, placed, step_until(stop=8))
    damage(tmp_path / "cut")
    resumed = make_loop(tmp_path / "cut", evaluate=evaluate).run(fresh, placed, step_until())
    np.testing.assert_array_equal(resumed.trainable["w"], expected.trainable["w"])
    assert tiny.history(tmp_path / "cut") == tiny.history(tmp_path / "whole")
    steps, items = read_items(tmp_path / "cut")
    assert steps.tolist() == [0, 4, 8, 10] and items["right"][:, 0].tolist() == [0, 4, 8, 10]
    said = capsys.readouterr().err
    assert (f"continuing after step {after} of 10" in said) == (after > 0)
    assert ("is not as it was" in said) == (after < 6)


@pytest.mark.parametrize("stop", [2, 6, 10])
def test_what_a_callback_raises_leaves_a_run_that_continues(tmp_path, whole, stop):
    """Also where the step it comes from is one that was due to be saved."""
    seen = []

    def callback(step, metrics):
        seen.append((step, metrics["loss"]))
        if len(seen) == stop:
            raise Stop

    for _ in range(2):
        with contextlib.suppress(Stop):
            loop = dataclasses.replace(make_loop(tmp_path), callback=callback)
            result = loop.run(fresh, placed, step_until())
    np.testing.assert_array_equal(result.trainable["w"], whole[0].trainable["w"])
    assert tiny.history(tmp_path) == whole[1]
    first = (stop - 1) // 3 * 3  # saved before
    assert seen == [(step, step - 1.0) for step in [*range(1, stop + 1), *range(first + 1, 11)]]


def test_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    result = make_loop(tmp_path).run(fresh, placed, step_until(nan_at=7))
    assert "loss is not finite at step 8" in result.stopped
    assert result.failed and result.step == 6 and newest(tmp_path) == 6


def test_state_of_other_settings_is_not_continued(tmp_path):
    make_loop(tmp_path, "a").run(fresh, placed, step_until())
    other = make_loop(tmp_path, "b").run(fresh, placed, step_until())
    assert other.step == 10
    assert {row["identity"] for row in read_lines(tmp_path / "metrics.jsonl")} == {"b"}


def test_a_model_that_can_not_be_scored_any_more_stops_the_run(tmp_path):
    def evaluate(step, _):
        if step == 4:
            raise FloatingPointError("likelihoods are NaN")
        return {}

    with pytest.raises(Interrupted):  # also where the state is saved, and its evaluation comes later
        make_loop(tmp_path / "late").run(fresh, placed, step_until(signal_at=3))
    for name in ("plain", "late"):
        result = make_loop(tmp_path / name, evaluate=evaluate).run(fresh, placed, step_until())
        assert (result.step, result.stopped) == (3, "the evaluation at step 4 failed: likelihoods are NaN")


# --- signals


@pytest.mark.parametrize(
    ("number", "repeat", "at", "saved"),
    [(signal.SIGTERM, 3, 4, 5), (signal.SIGINT, 1, 4, 5), (signal.SIGTERM, 1, 8, 9), (signal.SIGTERM, 1, 0, 0)],
)
def test_a_signal_ends_the_run_once_the_step_in_flight_is_saved(tmp_path, whole, number, repeat, at, saved, capsys):
    """Step 5, that nothing was due at; step 9, after which a state is saved anyway; at the first step at once."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        make_loop(tmp_path).run(fresh, placed, step_until(signal_at=at, number=number, repeat=repeat))
    assert caught.value.signal == number and newest(tmp_path) == saved
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (f"the state after step {saved} is saved" in capsys.readouterr().err) == (saved > 0)
    assert_continues_like_a_whole_run(tmp_path, whole)


@pytest.mark.parametrize("step", [0, 4, 8, 10])
def test_a_signal_while_evaluating_saves_first_and_evaluates_on_continuing(tmp_path, whole, step):
    def evaluate(now, trained):
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return first_weight(now, trained)

    with pytest.raises(Interrupted):
        make_loop(tmp_path, evaluate=evaluate).run(fresh, placed, step_until())
    assert newest(tmp_path) == step
    assert_continues_like_a_whole_run(tmp_path, whole)


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    def last(*_):
        signal.raise_signal(signal.SIGTERM)

    make_loop(tmp_path).run(fresh, placed, step_until())
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(Interrupted):
        make_loop(tmp_path, evaluate=last).run(fresh, placed, step_until())


# --- the host works ahead of the device, and the device does not wait for it


def test_the_next_inputs_are_made_while_a_step_runs(tmp_path):
    made = [threading.Event() for _ in range(10)]
    plain = step_until()

    def inputs(index):
        made[index].set()
        return placed(index)

    def step(state, given):
        ahead = given[0] + 1
        assert ahead == 10 or made[ahead].wait(30)
        assert ahead >= 9 or not made[ahead + 1].is_set()
        return plain(state, given)

    assert make_loop(tmp_path).run(fresh, inputs, step).step == 10


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(tmp_path):
    order, plain = [], step_until()

    class Metric:
        def __init__(self, index):
            self.index = index

        def __array__(self, *_, **__):
            order.append(f"read {self.index}")
            return np.float32(0)

    def step(state, inputs):
        order.append(f"step {inputs[0]}")
        return plain(state, inputs)[0], {"loss": Metric(inputs[0])}

    Loop(tmp_path, "a", 4, 100, "test").run(fresh, placed, step)
    assert order == ["step 0", "step 1", "read 0", "step 2", "read 1", "step 3", "read 2", "read 3"]


def input_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("inputs")]


@pytest.mark.parametrize("failure", ["inputs", "step", None])
def test_errors_of_the_inputs_surface_and_their_thread_ends_with_the_loop(tmp_path, failure):
    def inputs(index):
        assert input_threads() == [threading.current_thread()]
        if failure == "inputs" and index == 5:
            raise OSError("the disk is gone")
        return placed(index)

    step = step_until(stop=5 if failure == "step" else None)
    expected = {"inputs": pytest.raises(OSError, match="the disk is gone"), "step": pytest.raises(Stop)}
    with expected.get(failure, contextlib.nullcontext()):
        make_loop(tmp_path).run(fresh, inputs, step)
    assert not input_threads()


def test_a_step_may_not_move_arrays_from_the_host(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        make_loop(tmp_path).run(fresh, lambda index: ((index, np.float32(index)), {}), step_until())


def test_no_two_states_are_in_memory_while_one_is_restored(tmp_path, monkeypatch):
    """Counted by the arrays of 64 KiB: the trainable half and the moments."""

    def start():
        return fresh(1 << 14)

    def large():
        return sum(x.nbytes >= 1 << 16 for x in jax.live_arrays())

    loop = Loop(tmp_path, "a", 4, 2, "test")
    loop.run(start, placed, step_until())
    before, seen, restore = large(), [], StateStore.restore

    def watched(store, *asked):
        seen.append(large())
        return restore(store, *asked)

    monkeypatch.setattr(StateStore, "restore", watched)
    result = loop.run(start, placed, step_until())
    assert seen == [before] and large() == before + 1 and result.step == 4


# --- what inputs depend on is refreshed from the model as it is


class Refreshing:
    """Inputs that depend on a number which each refresh takes from the model and leaves on disk, as a file would."""

    def __init__(self, signal_at=None):
        self.disk, self.scale, self.made, self.calls, self.signal_at = {0: 1.0}, 1.0, [], [], signal_at

    def refresh(self, step, trainable):
        if step == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        self.calls.append(("refresh", step))
        self.scale = self.disk[step] = float(trainable["w"][0])

    def resumed(self, step):
        self.calls.append(("resumed", step))
        self.scale = self.disk[max(n for n in self.disk if n <= step)]

    def inputs(self, index):
        self.made.append(index)
        assert max(n for n in (0, 3, 6, 9) if n <= index) == max(n for n in self.disk if n <= index)
        return (index, jax.device_put(np.float32(self.scale * index))), {}

    def loop(self, path, **more):
        settings = {"steps": 10, "checkpoint_every": 4, "title": "test", **more}
        refresh = Hook(3, self.refresh, self.resumed)
        return Loop(path, "a", evaluation=Hook(4, first_weight), refresh=refresh, **settings)


def test_it_refreshes_before_the_inputs_of_the_step_are_made_and_never_at_the_start_or_the_end(tmp_path):
    run = Refreshing()
    run.loop(tmp_path, steps=9).run(fresh, run.inputs, step_until())
    assert run.calls == [("refresh", 3), ("refresh", 6)]
    assert run.made == list(range(9)) and len(set(run.disk.values())) == 3


@pytest.mark.parametrize(
    ("stop", "signal_at", "calls"),
    [(2, None, []), (5, None, [("resumed", 4)]), (9, None, [("resumed", 8)]), (None, 6, [("resumed", 6)])],
)
def test_a_resumed_run_reads_what_an_earlier_refresh_left_and_repeats_later_ones(tmp_path, stop, signal_at, calls):
    """A signal while refreshing saves first; on continuing it refreshes again."""
    whole, cut = Refreshing(), Refreshing(signal_at)
    expected = whole.loop(tmp_path / "whole").run(fresh, whole.inputs, step_until())
    with pytest.raises((Stop, Interrupted)):
        cut.loop(tmp_path / "cut").run(fresh, cut.inputs, step_until(stop=stop))
    cut.calls.clear()
    cut.scale = cut.signal_at = None
    if not calls:  # nothing was saved
        cut.scale, cut.disk = 1.0, {0: 1.0}
    resumed = cut.loop(tmp_path / "cut").run(fresh, cut.inputs, step_until())
    np.testing.assert_array_equal(resumed.trainable["w"], expected.trainable["w"])
    assert cut.calls == calls + [("refresh", n) for n in (3, 6, 9) if not calls or n >= calls[0][1]]
    assert tiny.history(tmp_path / "cut") == tiny.history(tmp_path / "whole")
