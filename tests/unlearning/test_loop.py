"""The loop: interrupted anywhere and started again it ends in the same numbers; it never ends in NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.checkpoints.state import StateStore
from trace_jax.files import read_lines
from trace_jax.unlearning.loop import Loop, front_rows
from trace_jax.unlearning.step import TrainState


class Stop(Exception):
    """Stands for Ctrl-C or a kill between two steps."""


def fresh():
    return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)})


def placed(index):
    return index, jax.device_put(np.float32(index))


def step_until(stop=None, nan_at=None):
    """A step with momentum, so that a wrong optimizer state would show."""

    @jax.jit
    def update(state, number):
        gradient = state.trainable["w"] * (jnp.float32(0.1) * (number + jnp.float32(1)))
        momentum = state.optimizer["m"] * 0.9 + gradient
        loss = jnp.where(number == (-1 if nan_at is None else nan_at), jnp.nan, number)
        return TrainState(state.step + 1, {"w": state.trainable["w"] - 0.1 * momentum}, {"m": momentum}), {"loss": loss}

    def step(state, inputs):
        index, number = inputs
        if index == stop:
            raise Stop
        return update(state, number)

    return step


def make_loop(path, identity="a"):
    evaluate = lambda trainable: {"w": float(trainable["w"][0])}  # noqa: E731
    return Loop(path, identity, steps=10, checkpoint_every=3, title="test", evaluate=evaluate, evaluate_every=4)


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 9])
def test_resuming_equals_an_uninterrupted_run(tmp_path, stop):
    whole = make_loop(tmp_path / "whole").run(fresh, placed, step_until())
    with pytest.raises(Stop):
        make_loop(tmp_path / "cut").run(fresh, placed, step_until(stop=stop))
    resumed = make_loop(tmp_path / "cut").run(fresh, placed, step_until())
    np.testing.assert_array_equal(resumed.trainable["w"], whole.trainable["w"])
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert [row["step"] for row in lines[0] if "loss" in row] == list(range(1, 11))


def test_evaluates_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    make_loop(tmp_path).run(fresh, placed, step_until())
    assert [row["step"] for row in front_rows(tmp_path)] == [0, 4, 8, 10]


def test_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    result = make_loop(tmp_path).run(fresh, placed, step_until(nan_at=7))
    assert "loss is not finite at step 8" in result.stopped
    assert result.step == 6
    reference = Loop(tmp_path / "short", "a", steps=6, checkpoint_every=3, title="test").run(
        fresh, placed, step_until()
    )
    np.testing.assert_array_equal(result.trainable["w"], reference.trainable["w"])


def test_state_of_other_settings_is_not_continued(tmp_path):
    make_loop(tmp_path, "a").run(fresh, placed, step_until())
    other = make_loop(tmp_path, "b").run(fresh, placed, step_until())
    assert other.step == 10
    assert {row["identity"] for row in read_lines(tmp_path / "metrics.jsonl")} == {"b"}


def test_a_finished_run_is_not_run_again(tmp_path):
    first = make_loop(tmp_path).run(fresh, placed, step_until())
    again = make_loop(tmp_path).run(fresh, placed, step_until(stop=0))
    np.testing.assert_array_equal(first.trainable["w"], again.trainable["w"])


def test_a_damaged_state_is_skipped_for_the_one_before(tmp_path, caplog):
    make_loop(tmp_path).run(fresh, placed, step_until())
    newest = tmp_path / "checkpoints" / "10" / "state"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with StateStore(tmp_path / "checkpoints", {"identity": "a", "seed": 0}) as store:
        step, _ = store.restore(fresh())
    assert step == 9
    assert "step 10 can't be restored" in caplog.text


def test_a_model_that_can_not_be_scored_any_more_stops_the_run(tmp_path):
    def evaluate(trainable):
        if float(trainable["w"][0]) < 0.99:
            raise FloatingPointError("likelihoods are NaN")
        return {}

    loop = Loop(tmp_path, "a", 10, checkpoint_every=3, title="test", evaluate=evaluate, evaluate_every=4)
    result = loop.run(fresh, placed, step_until())
    assert result.stopped == "the evaluation at step 4 failed: likelihoods are NaN"
    assert result.step == 3
