"""The training loop: resumable, interruptible, never ends in NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from trace_jax.checkpoints.state import StateStore
from trace_jax.io.files import flush_lines
from trace_jax.io.progress import progress, say
from trace_jax.io.signals import Interrupted, Interruption
from trace_jax.parallel.processes import broadcast_from_process_0
from trace_jax.unlearning.metrics import Metrics
from trace_jax.unlearning.rules import NO_RULES, Evaluated, Point, Rules, Stop
from trace_jax.unlearning.state import TrainState

Flat = dict[str, jax.Array]
Evaluate = Callable[[Flat], Any]


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """The outcome of a run.

    Attributes:
      trainable: float32, of the state that is kept.
      step: the step after which it was in that state.
      stopped: why the run ended before its last step, or "".
      failed: whether that was an error; then the state is the last good one, or the best one where the best is kept.
    """

    trainable: Flat
    step: int
    stopped: str
    seconds_per_step: float
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Loop:
    """What surrounds the step.

    directory: holds `checkpoints/`, `metrics.jsonl` and `items.npz`. identity, seed: of what is run, see `StateStore`.
    evaluate: called with the trainable parameters at step 0 (if `evaluate_first`), every `evaluate_every` steps and at
      the end; what it returns, or the `rows` of the `Evaluated` that it returns, goes into metrics.jsonl under
      "evaluation", and the `items` into items.npz. A FloatingPointError from it ends the run like a NaN loss.
    refresh: called as `refresh(n, trainable)` before step n is taken and before its inputs are made, for every multiple
      n of `refresh_every` in 1..steps-1: for what inputs depend on and the model changes. It may not hold on to the
      arrays. A run that continues after step n calls it again with the same arrays.
    resumed: called as `resumed(n)` before anything else when a run continues after step n, so that what `refresh` left
      at an earlier step is read again.
    rules: when the run ends early, and which evaluated state is its result.
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
    refresh: Callable[[int, Flat], None] | None = None
    resumed: Callable[[int], None] | None = None
    rules: Rules = NO_RULES
    evaluate_first: bool = True

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
            return _Run(self, start, store, interruption).result(inputs, step)

    def saves(self, step: int) -> bool:
        """Whether a state is saved after so many steps, whatever is found there."""
        return step % self.checkpoint_every == 0 or step == self.steps

    def evaluates(self, step: int) -> bool:
        """Whether the state after so many steps is evaluated."""
        often = self.evaluate_every
        due = (step == 0 and self.evaluate_first) or (
            step > 0 and often > 0 and (step % often == 0 or step == self.steps)
        )
        return due and self.evaluate is not None

    def refreshes(self, step: int) -> bool:
        """Whether `refresh` is called after so many steps."""
        due = self.refresh_every > 0 and step % self.refresh_every == 0 and 0 < step < self.steps
        return due and self.refresh is not None


class _Run:
    """One call of `Loop.run`."""

    def __init__(self, loop: Loop, start: Callable[[], TrainState], store: StateStore, interruption: Interruption):
        self._loop, self._start, self._store, self._interruption = loop, start, store, interruption
        self._metrics = Metrics(loop.directory, loop.identity)
        self._points: list[Point] = []  # evaluations so far; on continuing only process 0 knows the earlier ones

    def result(self, inputs, step) -> LoopResult:
        done, state, stop, seconds = self._steps(*self._newest(), inputs, step)
        failed = stop is not None and stop.failed
        best = self._best()
        if state is None or best not in (None, done):
            del state  # memory is for one
            done, state = self._newest() if best is None else self._saved(best)
        reason = stop.reason if stop else ""
        if stop or best is not None:
            say(f"{self._loop.title}: {reason or 'finished'}. The state after step {done} is kept.")
        return LoopResult(state.trainable, done, reason, seconds, failed)

    # --- states

    def _newest(self) -> tuple[int, TrainState]:
        """(step, state) of the newest saved state, or (0, start()); never two states in memory."""
        first = self._start()
        if self._store.empty:
            return 0, first
        like = _shapes(first)
        del first
        done, state = self._store.restore(like)
        return done, self._start() if state is None else state

    def _saved(self, step: int) -> tuple[int, TrainState]:
        """(step, state) after that step, or of the newest saved state if it can't be read."""
        state = self._start()
        if step:
            like = _shapes(state)
            del state
            state = self._store.restore_step(step, like)
        return self._newest() if state is None else (step, state)

    def _best(self) -> int | None:
        """The evaluated step whose state is the result, or None if that is the last state."""
        if not self._loop.rules.keeps_best:
            return None
        return broadcast_from_process_0(self._loop.rules.best(self._points) if self._points else 0)

    # --- the steps

    def _steps(self, done: int, state: TrainState, inputs, step) -> tuple[int, TrainState | None, Stop | None, float]:
        """(steps done, state, why it ended early, seconds per step); no state if it ended by an error."""
        loop, interruption = self._loop, self._interruption
        evaluated = self._continue(done)
        stop = self._evaluate(state, done) if loop.evaluates(done) and not evaluated else self._reached(done)
        if stop:
            if stop.failed:
                self._store.remove(done)
            return done, None if stop.failed else state, stop, math.nan
        if loop.refreshes(done):
            self._refresh(done, state)
        first, pending = done, None
        began, aside = time.monotonic(), 0.0
        ahead = contextlib.closing(_one_ahead(inputs, range(first, loop.steps), loop.refreshes))
        with progress(loop.title, loop.steps, start=first) as advance, ahead as prepared:
            for index, placed in prepared:
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, placed)
                interruption.unsaved = True
                done = index + 1
                if index == first:  # the first step compiles; the rate is that of the others
                    jax.block_until_ready(state.step)
                    began = time.monotonic()
                asked = interruption.asked()
                stop = self._log(pending)
                pending = (done, metrics)
                if not stop and (asked or loop.saves(done) or loop.evaluates(done) or loop.refreshes(done)):
                    stop, pending = self._log(pending), None
                    start = time.monotonic()
                    stop = stop or self._after(done, state, asked)
                    aside += time.monotonic() - start
                if stop:
                    break
                advance(done, "")
        interruption.unsaved = False
        if stop and stop.failed:
            return done, None, stop, math.nan
        timed = done - first - 1
        return done, state, stop, (time.monotonic() - began - aside) / timed if timed > 0 else math.nan

    def _continue(self, done: int) -> bool:
        """Takes up the lines of the run so far. Returns whether the state has been evaluated, or the run ended there.

        A run may end between the save of a state and its evaluation.
        """
        loop = self._loop
        evaluations = [row for row in self._metrics.trim(done) if "evaluation" in row]
        for row in evaluations:
            point = loop.rules.point(row["step"], Evaluated(None, row.get("forgetting"), row.get("utility")))
            self._points += [point] if point else []
        if done:
            say(f"{loop.title}: continuing after step {done} of {loop.steps}")
            if loop.resumed is not None:
                loop.resumed(done)
        best = self._best()
        if best is not None:
            self._store.protect(best)
        return bool(broadcast_from_process_0(any(row["step"] == done for row in evaluations)))

    def _after(self, step: int, state: TrainState, asked: int) -> Stop | None:
        """Evaluates, saves and refreshes what is due after a step; returns why the run ends here, or None.

        Raises:
          Interrupted: `asked`, or a signal came while evaluating. The state is saved; it is evaluated on continuing.
        """
        loop, stop = self._loop, None
        if loop.evaluates(step) and not asked:
            try:
                with self._interruption.at_once():
                    stop = self._evaluate(state, step)
            except Interrupted as error:
                asked = error.signal
            if stop and stop.failed:
                return stop
        if asked:
            self._end(step, state, asked)
        if stop or loop.saves(step) or step == self._store.protected:
            self._save(step, state)
        if not stop and loop.refreshes(step):
            self._refresh(step, state)
        return stop

    def _save(self, step: int, state: TrainState) -> None:
        flush_lines()
        self._store.save(step, state)
        self._interruption.unsaved = False

    def _end(self, step: int, state: TrainState, asked: int) -> None:
        self._save(step, state)
        self._store.wait()
        name = signal.Signals(asked).name
        say(f"{self._loop.title}: stopped by {name}; the state after step {step} is saved")
        raise Interrupted(asked)

    def _refresh(self, step: int, state: TrainState) -> None:
        assert self._loop.refresh is not None
        try:
            with self._interruption.at_once():
                self._loop.refresh(step, state.trainable)
        except Interrupted as error:
            self._end(step, state, error.signal)

    def _log(self, pending: tuple[int, dict] | None) -> Stop | None:
        """Writes the metrics of a step; returns why they end the run, or None."""
        if pending is None:
            return None
        index, metrics = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            names = ", ".join(bad)
            return Stop(f"{names} is not finite at step {index}; lower the learning rate or the coefficients", True)
        if dropped := values.get("dropped"):
            lost = f"{dropped:.0f} choices of experts had no room at step {index}"
            return Stop(f"{lost}; raise parallel.expert_buffer", True)
        self._metrics.write(index, **values)
        return None

    def _evaluate(self, state: TrainState, step: int) -> Stop | None:
        """Writes the evaluation of a state; returns why it ends the run, or None. At step 0 an error is raised."""
        loop = self._loop
        assert loop.evaluate is not None
        try:
            found = loop.evaluate(state.trainable)
        except FloatingPointError as error:
            if step == 0:
                raise
            return Stop(f"the evaluation at step {step} failed: {error}", True)
        found = found if isinstance(found, Evaluated) else Evaluated(found)
        numbers = {"forgetting": found.forgetting, "utility": found.utility}
        known = {name: value for name, value in numbers.items() if value is not None}
        if point := loop.rules.point(step, found):
            self._points.append(point)
        if found.items:
            self._metrics.write_items(step, found.items)
        self._metrics.write(step, evaluation=found.rows, **known)
        if self._best() == step:
            self._store.protect(step)
        return self._reached(step)

    def _reached(self, step: int) -> Stop | None:
        """Why the evaluation after `step` steps ends the run; None if it does not, or there was none."""
        if not self._loop.rules.asks:
            return None
        here = self._points and self._points[-1].step == step
        reason = self._loop.rules.stops(self._points[-1]) if here else ""
        return Stop(reason or "a rule ended the run", False) if broadcast_from_process_0(bool(reason)) else None


def _shapes(state: TrainState) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


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
