"""Progress without a terminal: the first step compiles, and its time is none of the others'."""

from types import SimpleNamespace

import pytest

from trace_jax.io import progress as module
from trace_jax.io.progress import duration, progress, timed


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_first_step_is_not_in_the_rate(clock, capsys):
    with progress("training", 101, first="compiling") as advance:
        clock.now = 30.0
        advance(1, "loss 3.100")
        clock.now = 50.0
        advance(41, "loss 2.000")
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["training: compiling", "training: 1/101 steps, loss 3.100"]
    assert said[2:] == ["training: 41/101 steps, 2.0/s, 30 s left, loss 2.000"]


def test_a_stage_says_how_long_it_took_where_that_is_more_than_a_moment(clock, capsys):
    for seconds in (1.0, 143.0):
        with timed("evaluation"):
            clock.now += seconds
    assert capsys.readouterr().err == "evaluation: done in 2 min 23 s\n"
    assert (duration(0.25), duration(7265), duration(119.8)) == ("250 ms", "2 h 1 min", "2 min 0 s")
