"""The training loop: resumable, interruptible, never ends in NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from trace_jax.checkpoints.state import StateStore
from trace_jax.files import append_line, as_path, flush_lines, read_lines, replacing
from trace_jax.interruption import Interrupted, Interruption
from trace_jax.parallel.agreement import main_says
from trace_jax.parallel.hosts import is_main
from trace_jax.progress import progress, say
from trace_jax.unlearning.state import TrainState

Evaluate = Callable[[dict[str, jax.Array]], Any]


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """`trainable` (float32) at the last good step; `stopped` says why the loop ended early, or is empty."""

    trainable: dict[str, jax.Array]
    step: int
    stopped: str
    seconds_per_step: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """What surrounds the step.

    directory: holds `checkpoints/` and `metrics.jsonl`. identity, seed: of what is run, see `StateStore`.
    evaluate: called with the trainable parameters at step 0, every `evaluate_every` steps and at the end; what
      it returns goes into metrics.jsonl under "evaluation". A FloatingPointError from it ends the run like a NaN loss.
    refresh: called as `refresh(n, trainable)` before step n is taken and before its inputs are made, for every multiple
      n of `refresh_every` in 1..steps-1: for what inputs depend on and the model changes. It may not hold on to the
      arrays. A run that continues after step n calls it again with the same arrays.
    resumed: called as `resumed(n)` before anything else when a run continues after step n, so that what `refresh` left
      at an earlier step is read again.
    """

    directory: Path
    identity: str
    steps: int
    checkpoint_every: int
    title: str
    evaluate: Evaluate | None = None
    evaluate_every: int = 0
    seed: int = 0
    refresh_every: int = 0
    refresh: Callable[[int, dict[str, jax.Array]], None] | None = None
    resumed: Callable[[int], None] | None = None

    def run(
        self,
        start: Callable[[], TrainState],
        inputs: Callable[[int], Any],
        step: Callable[[TrainState, Any], tuple[TrainState, dict]],
    ) -> LoopResult:
        """Runs `step(state, inputs(i))` for i = 0..steps-1 from the newest saved state on, or from `start()`.

        `inputs` depends on i alone, so that a resumed run repeats the uninterrupted one. It runs in a thread of its
        own, one step ahead, and returns arrays that are where the step wants them: the step itself is not allowed to
        move any. Step i+1 is dispatched before the metrics of step i are read.

        Raises:
          Interrupted: a signal asked to stop. What was done until then is saved, and the same call continues.
        """
        about = {"identity": self.identity, "seed": self.seed}
        with Interruption() as interruption, StateStore(self.directory / "checkpoints", about) as store:
            result = self._steps(*self._newest(store, start), inputs, step, store, interruption)
            if not result.stopped:
                return result
            # What was saved is the good state; no copy of it was held in memory.
            good, state = self._newest(store, start)
            say(f"{self.title}: {result.stopped}. The state after step {good} is kept.")
            return dataclasses.replace(result, trainable=state.trainable, step=good)

    @staticmethod
    def _newest(store: StateStore, start: Callable[[], TrainState]) -> tuple[int, TrainState]:
        """(step, state) of the newest saved state, or (0, start()); never two states in memory."""
        first = start()
        if store.empty:
            return 0, first
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first)
        del first
        done, state = store.restore(like)
        return done, start() if state is None else state

    @property
    def _metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def _trim_metrics(self, done: int) -> bool:
        """Drops lines of steps after the restored state; they are about to be written again.

        Returns whether the restored state has been evaluated: a run may end between its save and its evaluation.
        """
        rows = []
        if is_main():
            if done:
                of_this_run = (r for r in read_lines(self._metrics) if r.get("identity") == self.identity)
                rows = [r for r in of_this_run if r["step"] <= done]
            with replacing(self._metrics) as temporary:
                temporary.touch()
                for row in rows:
                    append_line(temporary, row)
        return bool(main_says(any(row["step"] == done and "evaluation" in row for row in rows)))

    def _saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.steps

    def _evaluates(self, step: int) -> bool:
        often = self.evaluate_every
        due = step == 0 or (often > 0 and (step % often == 0 or step == self.steps))
        return due and self.evaluate is not None

    def _refreshes(self, step: int) -> bool:
        due = self.refresh_every > 0 and step % self.refresh_every == 0 and 0 < step < self.steps
        return due and self.refresh is not None

    def _steps(
        self, done: int, state: TrainState, inputs, step, store: StateStore, interruption: Interruption
    ) -> LoopResult:
        evaluated = self._trim_metrics(done)
        if done:
            say(f"{self.title}: continuing after step {done} of {self.steps}")
            if self.resumed is not None:
                self.resumed(done)
        if self._evaluates(done) and not evaluated and (stopped := self._evaluate(state, done)):
            store.remove(done)
            return LoopResult({}, done, stopped, math.nan)
        if self._refreshes(done):
            self._refresh(done, state, store, interruption)
        stopped, pending = "", None
        began, aside = time.monotonic(), 0.0
        ahead = contextlib.closing(_one_ahead(inputs, range(done, self.steps), self._refreshes))
        with progress(self.title, self.steps, start=done) as advance, ahead as prepared:
            for index, placed in prepared:
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, placed)
                interruption.unsaved = True
                if index == done:  # the first step compiles; the rate is that of the others
                    jax.block_until_ready(state.step)
                    began = time.monotonic()
                asked = interruption.asked()
                stopped = self._log(pending)
                pending = (index + 1, metrics)
                due = self._saves(index + 1) or self._evaluates(index + 1) or self._refreshes(index + 1)
                if not stopped and (asked or due):
                    stopped, pending = self._log(pending), None
                    start = time.monotonic()
                    stopped = stopped or self._keep(index + 1, state, store, interruption, asked)
                    aside += time.monotonic() - start
                if stopped:
                    break
                advance(index + 1, "")
        interruption.unsaved = False
        if stopped:
            return LoopResult({}, done, stopped, math.nan)
        seconds = (time.monotonic() - began - aside) / max(1, self.steps - done - 1)
        return LoopResult(state.trainable, self.steps, "", seconds if self.steps > done + 1 else math.nan)

    def _keep(self, step: int, state: TrainState, store: StateStore, interruption: Interruption, asked: int) -> str:
        """Evaluates, saves and refreshes what is due after a step; returns a reason to stop, or nothing.

        Raises:
          Interrupted: `asked`, or a signal came while evaluating. The state is saved; it is evaluated on continuing.
        """
        if self._evaluates(step) and not asked:
            try:
                with interruption.at_once():
                    stopped = self._evaluate(state, step)
            except Interrupted as error:
                stopped, asked = "", error.signal
            if stopped:
                return stopped
        if asked:
            self._end(step, state, store, interruption, asked)
        if self._saves(step):
            self._save(step, state, store, interruption)
        if self._refreshes(step):
            self._refresh(step, state, store, interruption)
        return ""

    def _save(self, step: int, state: TrainState, store: StateStore, interruption: Interruption) -> None:
        flush_lines()
        store.save(step, state)
        interruption.unsaved = False

    def _end(self, step: int, state: TrainState, store: StateStore, interruption: Interruption, asked: int) -> None:
        self._save(step, state, store, interruption)
        store.wait()
        say(f"{self.title}: stopped by {signal.Signals(asked).name}; the state after step {step} is saved")
        raise Interrupted(asked)

    def _refresh(self, step: int, state: TrainState, store: StateStore, interruption: Interruption) -> None:
        assert self.refresh is not None
        try:
            with interruption.at_once():
                self.refresh(step, state.trainable)
        except Interrupted as error:
            self._end(step, state, store, interruption, error.signal)

    def _log(self, pending: tuple[int, dict] | None) -> str:
        """Writes the metrics of a step; returns a reason to stop, or nothing."""
        if pending is None:
            return ""
        index, metrics = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            return f"{', '.join(bad)} is not finite at step {index}; lower the learning rate or the coefficients"
        if values.get("dropped"):
            return (
                f"{values['dropped']:.0f} choices of experts had no room at step {index}; raise parallel.expert_buffer"
            )
        self._write({"step": index, "identity": self.identity, **values})
        return ""

    def _evaluate(self, state: TrainState, index: int) -> str:
        """Writes the evaluation of a state; returns a reason to stop, or nothing. At step 0 the reason is raised."""
        assert self.evaluate is not None
        try:
            evaluation = self.evaluate(state.trainable)
        except FloatingPointError as error:
            if index == 0:
                raise
            return f"the evaluation at step {index} failed: {error}"
        self._write({"step": index, "identity": self.identity, "evaluation": evaluation})
        return ""

    def _write(self, row: dict) -> None:
        if is_main():
            append_line(self._metrics, row)


def _one_ahead(inputs: Callable[[int], Any], indices: range, held: Callable[[int], bool]) -> Generator[tuple[int, Any]]:
    """(i, inputs(i)) in order; a thread makes the next while the caller works on one. Its errors are raised here.

    Inputs of which `held(i)` is true are not made ahead, but when the caller asks for them. The thread ends with the
    generator: close it where the loop may end early.
    """
    with ThreadPoolExecutor(1, "inputs") as pool:
        following = None
        for index in indices:
            current = following or pool.submit(inputs, index)
            ahead = index + 1 in indices and not held(index + 1)
            following = pool.submit(inputs, index + 1) if ahead else None
            yield index, current.result()


def front_rows(directory: str | os.PathLike, identity: str | None = None) -> list[dict]:
    """Evaluations of a run in the order of its steps: [{"step", "evaluation": {...}}]."""
    rows = read_lines(as_path(directory) / "metrics.jsonl")
    return [row for row in rows if "evaluation" in row and identity in (None, row.get("identity"))]
