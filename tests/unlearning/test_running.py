"""Unlearning as a process that is killed, and as one that must not stall: the real step inside the loop."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time

import jax
import numpy as np
import pandas as pd
import pytest

from tests import tiny
from trace_jax.data.rows import epoch_sampler
from trace_jax.models.architecture import flatten
from trace_jax.parallel.mesh import make_mesh
from trace_jax.unlearning import step as step_module
from trace_jax.unlearning import unlearn as unlearn_module
from trace_jax.unlearning.inputs import Inputs
from trace_jax.unlearning.optimizer import TrainingConfig
from trace_jax.unlearning.step import train_model
from trace_jax.unlearning.unlearn import unlearn

STEPS = 7


def unlearn_in(path):
    from tests.unlearning.conftest import CONFIG, ONE, make_rows

    config = dataclasses.replace(CONFIG, steps=STEPS, checkpoint_every=2, evaluate_every=3)
    rows = make_rows(8, seed=1), make_rows(16, seed=2)

    def evaluate(params):
        return {"head": float(np.asarray(params["head"]).sum())}

    return unlearn(tiny.make_model(), *rows, config=config, directory=path, evaluate=evaluate, mesh=ONE)


def _killed(path):
    import tests.conftest  # noqa: F401  (the same devices as this process)

    def watch():
        while not any((path / "checkpoints").glob("*tmp*")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    unlearn_in(path)


def test_killed_while_saving_it_ends_in_the_same_numbers(tmp_path):
    """kill -9 of the process. Stops at any other moment are tried on the loop alone (`test_loop`)."""
    whole, cut = unlearn_in(tmp_path / "whole"), tmp_path / "cut"
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(cut,))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    resumed = unlearn_in(cut)
    assert resumed.step == whole.step == STEPS
    assert tiny.timeless(resumed.history) == tiny.timeless(whole.history)
    assert [row["step"] for row in whole.history] == list(range(1, STEPS + 1))
    assert {"loss", "forget_loss", "retain_loss", "gradient_norm"} <= whole.history[0].keys()
    for path, leaf in flatten(resumed.model.params).items():
        np.testing.assert_array_equal(leaf, flatten(whole.model.params)[path], err_msg=path)
    assert tiny.history(cut) == tiny.history(tmp_path / "whole")


def test_a_step_is_written_with_its_tokens_their_rate_the_learning_rate_and_the_time(model, forget, retain, tmp_path):
    from tests.unlearning.conftest import CONFIG, ONE

    began = time.time()
    config = dataclasses.replace(CONFIG, learning_rate=0.08, schedule="linear", warmup_steps=2)
    unlearn(model, forget, retain, config=config, directory=tmp_path, mesh=ONE)
    frame = pd.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert set(frame.kind) == {"step"} and list(frame.step) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(frame.learning_rate, [0.04, 0.06, 0.08, 0.06, 0.04, 0.02], rtol=1e-5)
    of_step = Inputs(forget, retain, None, config, seed=0, multiple=1)
    counts = [rows.forget.valid.sum() + rows.retain.valid.sum() for rows in map(of_step.at, range(6))]
    assert list(frame.tokens) == counts and frame.time.between(began - 1, time.time() + 1).all()
    assert frame.tokens_per_second.isna().tolist() == [True] + [False] * 5  # the first step compiles
    seconds = frame.tokens / frame.tokens_per_second - frame.time.diff()  # the time is written in whole milliseconds
    assert (seconds[1:].abs() < 0.002).all()


@pytest.fixture
def compilations():
    """Grows by one with every program that XLA compiles."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("kind", ["unlearning", "training"])
def test_nothing_is_compiled_after_the_first_step_and_no_step_moves_arrays(tmp_path, monkeypatch, compilations, kind):
    """The loop runs each step under `jax.transfer_guard("disallow")`. Its first save compiles the sum of the bits."""
    jax.clear_caches()
    module, name = (unlearn_module, "unlearning_step") if kind == "unlearning" else (step_module, "training_step")
    step, counts = getattr(module, name), []

    def counted(*arguments, **settings):
        assert jax.config.jax_transfer_guard_host_to_device == "disallow"
        counts.append(len(compilations))
        result = step(*arguments, **settings)
        counts.append(len(compilations))
        return result

    monkeypatch.setattr(module, name, counted)
    if kind == "unlearning":
        unlearn_in(tmp_path)
    else:
        rows, sampler = tiny.make_rows(8, seed=1), epoch_sampler(8, 3, seed=0)
        train_model(
            tiny.CONFIG, TrainingConfig(steps=STEPS, checkpoint_every=2), lambda step: rows.batch(sampler(step)),
            seed=0, mesh=make_mesh(jax.devices()[:2]), directory=tmp_path, identity="a", title="test",
        )  # fmt: skip
    assert len(counts) == 2 * STEPS
    first_step, first_save, rest = counts[1] - counts[0], counts[4] - counts[3], counts[-1] - counts[4]
    assert first_step > 0 and counts[3] == counts[1] and first_save <= 1 and rest == 0
