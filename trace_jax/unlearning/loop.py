"""The training loop: resumable, interruptible, never ends in NaN."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from flax import struct

from trace_jax.checkpoints.state import StateStore
from trace_jax.io import files
from trace_jax.io.progress import progress, say
from trace_jax.io.signals import Interrupted, Interruption
from trace_jax.io.tracking import Tracker
from trace_jax.parallel.processes import broadcast_from_process_0
from trace_jax.unlearning.config import Rules
from trace_jax.unlearning.metrics import Metrics


@struct.dataclass
class TrainState:
    """What changes while training. The optimizer keeps float32, and the loss sees it rounded to the model's type: a
    bfloat16 weight has 8 significant bits, and a usual step, 1e-5 on a weight of 0.02, would be rounded away.
    """

    step: jax.Array  # i32 []
    trainable: dict[str, Any]  # parameters by path, float32
    optimizer: Any  # optax state
    alpha: Any = None  # f32 [], the coefficient of the retain loss, where the objective adapts it


class LoopResult(NamedTuple):
    trainable: dict[str, Any]  # float32, of the state that is kept
    step: int  # after which the run was in that state
    stopped: str  # why it ended before its last step, or ""
    seconds_per_step: float
    failed: bool = False  # by an error; then the state is the last good one, or the best one where the best is kept


class Hook(NamedTuple):
    """What a loop calls beside its steps: `call(n, trained)` after step n, for every multiple n of `every`; it may not
    hold on to the arrays. `resumed(n)` is called first where a run continues after step n, to read what a call left.
    """

    every: int
    call: Callable[[int, dict[str, Any]], Any]
    resumed: Callable[[int], None] | None = None


class Evaluated(NamedTuple):
    """What an evaluation gave: `rows` (JSON), of which each is a line of metrics.jsonl, and the two numbers that rules
    read, where measured.
    """

    rows: Any
    forgetting: float | None = None  # lower means more forgotten
    utility: float | None = None  # higher is better
    items: Mapping[str, np.ndarray] | None = None  # what each item gave, arrays [N] by name for items.npz
    note: str = ""  # for the progress of the run


class Stop(NamedTuple):
    """Why a run ends early. `failed`: by an error, so that the state it was in is of no use."""

    reason: str
    failed: bool


@dataclasses.dataclass
class Loop:
    """Steps, and all that goes on around them. `identity` and `seed` are of what is run, see `StateStore`.

    directory: holds `checkpoints/`, `metrics.jsonl` and `items.npz`.
    evaluation: is also called at step 0 (if `evaluate_first`) and at the end; what it returns, or the `rows` of the
      `Evaluated` that it returns, goes into metrics.jsonl, and the `items` into items.npz. A FloatingPointError from it
      ends the run like a NaN loss.
    refresh: for what inputs depend on and the model changes: it is called before the inputs of the next step are made,
      never at the end. A run that continues after step n calls it again with the same arrays. A mapping that it returns
      is a line of kind "recalibration".
    callback: gets each step's number and metrics once they are read, on every process; what it raises ends the run.
    tracker: shows what is written.
    """

    directory: Path
    identity: str
    steps: int
    checkpoint_every: int
    title: str
    evaluation: Hook | None = None
    refresh: Hook | None = None
    seed: int = 0
    rules: Rules = dataclasses.field(default_factory=Rules)
    evaluate_first: bool = True
    callback: Callable[[int, dict[str, float]], Any] | None = None
    tracker: Tracker | None = None

    def should_checkpoint(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.steps

    def should_evaluate(self, step: int) -> bool:
        if self.evaluation is None or step == 0:
            return self.evaluation is not None and self.evaluate_first
        return step % self.evaluation.every == 0 or step == self.steps

    def should_refresh(self, step: int) -> bool:
        return self.refresh is not None and 0 < step < self.steps and step % self.refresh.every == 0

    def run(
        self, start: Callable[[], TrainState], inputs: Callable[[int], tuple[Any, dict[str, float]]], step: Callable
    ) -> LoopResult:
        """Runs `state, metrics = step(state, rows)` with `rows, known = inputs(i)` for i = 0..steps-1, from the newest
        saved state or `start()`.

        `inputs` depends on i alone, so that a resumed run repeats the uninterrupted one. It runs in a thread of its
        own, one step ahead, and returns arrays that are where the step wants them: the step itself is not allowed to
        move any. Step i+1 is dispatched before the metrics of step i are read. Where a signal asks to stop, what was
        done until then is saved, and Interrupted is raised; the same call continues. `known`, what the host knows of
        the step, is written with its metrics; its "tokens" per second, too.
        """
        about = {"identity": self.identity, "seed": self.seed}
        self._start, self._metrics = start, Metrics(self.directory, self.identity, self.tracker)
        self._evaluations: dict[int, Evaluated] = {}  # by step; on continuing only process 0 knows the earlier ones
        with Interruption() as self._signals, StateStore(self.directory / "checkpoints", about) as self._store:
            done, state, stop, seconds = self._steps(*self._restored(), inputs, step)
            failed, best = stop is not None and stop.failed, self._best()
            if failed or best not in (None, done):
                del state  # memory is for one
                done, state = self._restored(best)
        reason = stop.reason if stop else ""
        if stop or best is not None:
            say(f"{self.title}: {reason or 'finished'}. The state after step {done} is kept.")
        return LoopResult(state.trainable, done, reason, seconds, failed)

    def _begin(self, done: int, state: TrainState) -> Stop | None:
        """Takes up the run so far, and does what is due before the next step. Returns why it ends there, or None."""
        rows = self._metrics.trim(done)
        evaluations = [row for row in rows if row["kind"] == "evaluation"]
        for row in evaluations:
            self._evaluations[row["step"]] = Evaluated(None, row.get("forgetting"), row.get("utility"))
        if done:
            say(f"{self.title}: continuing after step {done} of {self.steps}")
            if self.refresh is not None and self.refresh.resumed is not None:
                self.refresh.resumed(done)
        if (best := self._best()) is not None:
            self._store.protected = best
        # A run may end between the save of a state and its evaluation.
        evaluated = broadcast_from_process_0(any(row["step"] == done for row in evaluations))
        stop = self._evaluate(done, state) if self.should_evaluate(done) and not evaluated else self._reached(done)
        if stop and stop.failed:
            self._store.remove(done)
        if not stop and self.should_refresh(done):
            self._refresh(done, state, written=any((r["kind"], r["step"]) == ("recalibration", done) for r in rows))
        return stop

    def _steps(self, first: int, state: TrainState, inputs, step) -> tuple[int, TrainState, Stop | None, float]:
        """(steps done, state, why they ended early, seconds per step)."""
        done, pending, began, aside = first, None, time.monotonic(), 0.0
        self._loss = self._note = ""  # of the last step and evaluation
        self._read = math.nan  # when the metrics of the step before were there; the first step compiles
        if stop := self._begin(first, state):
            return first, state, stop, math.nan
        ahead = contextlib.closing(_one_ahead(inputs, range(first, self.steps), self.should_refresh))
        with progress(self.title, self.steps, start=first, first="compiling") as advance, ahead as prepared:
            for index, (rows, known) in prepared:
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, rows)
                self._signals.unsaved, done = True, index + 1
                if index == first:  # the first step compiles; the rate is that of the others
                    jax.block_until_ready(state.step)
                    began = time.monotonic()
                asked = self._signals.asked()
                stop, pending = self._log(pending), (done, metrics, known)  # of the step before
                due = self.should_checkpoint(done) or self.should_evaluate(done) or self.should_refresh(done)
                if not stop and (asked or due):
                    stop, pending = self._log(pending), None
                    paused = time.monotonic()
                    stop = stop or self._after(done, state, asked)
                    self._read = time.monotonic()
                    aside += self._read - paused
                if stop:
                    break
                advance(done, ", ".join(note for note in (self._loss, self._note) if note))
        self._signals.unsaved = False
        timed, seconds = done - first - 1, time.monotonic() - began - aside
        return done, state, stop, seconds / timed if timed > 0 and not (stop and stop.failed) else math.nan

    def _after(self, step: int, state: TrainState, asked: int) -> Stop | None:
        """Evaluates, saves and refreshes what is due after a step; returns why the run ends here, or None. If `asked`,
        or a signal came while evaluating, it saves and raises: the state is evaluated on continuing.
        """
        stop = None
        if self.should_evaluate(step) and not asked:
            try:
                with self._signals.at_once():
                    stop = self._evaluate(step, state)
            except Interrupted as error:
                asked = error.signal
            if stop and stop.failed:
                return stop
        if asked:
            self._end(step, state, asked)
        if stop or self.should_checkpoint(step) or step == self._store.protected:
            self._save(step, state)
        if not stop and self.should_refresh(step):
            self._refresh(step, state)
        return stop

    def _refresh(self, step: int, state: TrainState, *, written: bool = False) -> None:
        assert self.refresh is not None
        try:
            with self._signals.at_once():
                values = self.refresh.call(step, state.trainable)
        except Interrupted as error:
            self._end(step, state, error.signal)
        if values and not written:
            self._metrics.write("recalibration", step, values)

    def _log(self, pending: tuple[int, dict, dict[str, float]] | None) -> Stop | None:
        """Writes the metrics of a step; returns why they end the run, or None."""
        if pending is None:
            return None
        index, metrics, known = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if bad := ", ".join(name for name, value in values.items() if not math.isfinite(value)):
            return Stop(f"{bad} is not finite at step {index}; lower the learning rate or the coefficients", True)
        if dropped := values.get("dropped"):
            lost = f"{dropped:.0f} choices of experts had no room at step {index}"
            return Stop(f"{lost}; raise parallel.expert_buffer", True)
        now = time.monotonic()
        if "tokens" in known and not math.isnan(self._read):
            known = known | {"tokens_per_second": round(known["tokens"] / (now - self._read), 1)}
        self._read = now
        values = {"time": round(time.time(), 3), **known, **values}
        self._loss = f"loss {values['loss']:.3f}" if "loss" in values else ""
        self._metrics.write("step", index, values)
        if self.callback is not None:
            self.callback(index, values)
        return None

    # --- evaluations

    def _evaluate(self, step: int, state: TrainState) -> Stop | None:
        """Writes the evaluation of a state; returns why it ends the run, or None. At step 0 an error is raised."""
        assert self.evaluation is not None
        try:
            result = self.evaluation.call(step, state.trainable)
        except FloatingPointError as error:
            if step == 0:
                raise
            return Stop(f"the evaluation at step {step} failed: {error}", True)
        result = result if isinstance(result, Evaluated) else Evaluated(result)
        self.rules.check(step, result)
        self._evaluations[step], self._note = result._replace(rows=None, items=None), result.note
        if result.items:
            self._metrics.write_items(step, result.items)
        numbers = {"forgetting": result.forgetting, "utility": result.utility}
        measured = {name: float(value) for name, value in numbers.items() if value is not None}
        rows = result.rows if isinstance(result.rows, (list, tuple)) else [result.rows] * (result.rows is not None)
        for row in rows:
            self._metrics.write("measurement", step, row if isinstance(row, Mapping) else {"value": row})
        self._metrics.write("evaluation", step, {"time": round(time.time(), 3), **measured})
        if self._best() == step:
            self._store.protected = step
        return self._reached(step)

    def _reached(self, step: int) -> Stop | None:
        """Why the evaluation after `step` steps ends the run; None if it does not, or there was none."""
        if not self.rules.needs_evaluation:
            return None
        reason = self.rules.stops(step, self._evaluations[step]) if step in self._evaluations else ""
        return Stop(reason or "a rule ended the run", False) if broadcast_from_process_0(bool(reason)) else None

    def _best(self) -> int | None:
        """The evaluated step whose state is the result, or None if that is the last state."""
        if not self.rules.keeps_best:
            return None
        return broadcast_from_process_0(self.rules.best(self._evaluations) if self._evaluations else 0)

    # --- states on disk

    def _restored(self, step: int | None = None) -> tuple[int, TrainState]:
        """(step, state) after `step`; None, or where that can't be read: after the newest saved step, or the start."""
        state = self._start()
        if step == 0 or self._store.empty:
            return 0, state
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state  # there are never two in memory
        step, state = self._store.restore(like, step)
        while state is not None and not broadcast_from_process_0(self._metrics.whole(step)):
            say(f"{self.title}: what was written until step {step} is not as it was; its state is not used")
            self._store.remove(step)
            del state
            step, state = self._store.restore(like)
        return step, self._start() if state is None else state

    def _save(self, step: int, state: TrainState) -> None:
        files.flush_lines()
        self._store.save(step, state)
        self._signals.unsaved = False

    def _end(self, step: int, state: TrainState, asked: int) -> NoReturn:
        self._save(step, state)
        self._store.wait()
        say(f"{self.title}: stopped by {signal.Signals(asked).name}; the state after step {step} is saved")
        raise Interrupted(asked)


def _one_ahead(inputs: Callable, indices: range, waits: Callable[[int], bool]) -> Generator[tuple[int, Any]]:
    """(i, inputs(i)) in order; a thread makes the next while the caller works on one, unless `waits(i)`. Its errors are
    raised here, and it ends with the generator: close it where the loop may end early.
    """
    with ThreadPoolExecutor(1, "inputs") as pool:
        following = None
        for index in indices:
            current = following or pool.submit(inputs, index)
            ahead = index + 1 in indices and not waits(index + 1)
            following = pool.submit(inputs, index + 1) if ahead else None
            yield index, current.result()
