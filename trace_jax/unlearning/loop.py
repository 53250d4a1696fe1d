"""The training loop: resumable, interruptible, never ends in NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from trace_jax.checkpoints.state import StateStore
from trace_jax.files import append_line, read_lines, replacing
from trace_jax.progress import progress, say
from trace_jax.unlearning.step import TrainState

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

    directory: holds `checkpoints/` and `metrics.jsonl`. identity: hash of the settings, see `StateStore`.
    evaluate: called with the trainable parameters at step 0, every `evaluate_every` steps and at the end; what
      it returns goes into metrics.jsonl under "evaluation". A FloatingPointError from it ends the run like a NaN loss.
    """

    directory: Path
    identity: str
    steps: int
    checkpoint_every: int
    title: str
    evaluate: Evaluate | None = None
    evaluate_every: int = 0

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
        """
        with StateStore(self.directory / "checkpoints", identity=self.identity) as store:
            done, state = self._newest(store, start)
            self._trim_metrics(done)
            if done:
                say(f"{self.title}: continuing after step {done} of {self.steps}")
            result = self._steps(store, state, inputs, step, done)
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

    def _trim_metrics(self, done: int) -> None:
        """Drops lines of steps after the restored state; they are about to be written again."""
        rows = [
            row for row in read_lines(self._metrics) if row.get("identity") == self.identity and row["step"] <= done
        ]
        if done == 0:
            rows = []
        with replacing(self._metrics) as temporary:
            temporary.touch()
            for row in rows:
                append_line(temporary, row)

    def _steps(self, store: StateStore, state: TrainState, inputs, step, done: int) -> LoopResult:
        stopped, pending = "", None
        began, evaluating = time.monotonic(), 0.0
        ahead = contextlib.closing(_one_ahead(inputs, range(done, self.steps)))
        with progress(self.title, self.steps, start=done) as advance, ahead as prepared:
            if done == 0:
                self._evaluate(state, 0)
            for index, placed in prepared:
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, placed)
                if index == done:  # the first step compiles; the rate is that of the others
                    jax.block_until_ready(state.step)
                    began = time.monotonic()
                stopped = self._log(pending)
                if stopped:
                    break
                pending = (index + 1, metrics)
                saving = (index + 1) % self.checkpoint_every == 0 or index + 1 == self.steps
                evaluates = self.evaluate_every and ((index + 1) % self.evaluate_every == 0 or index + 1 == self.steps)
                if saving or evaluates:
                    stopped, pending = self._log(pending), None
                    if stopped:
                        break
                    start = time.monotonic()
                    if evaluates:
                        try:
                            self._evaluate(state, index + 1)
                        except FloatingPointError as error:
                            stopped = f"the evaluation at step {index + 1} failed: {error}"
                            break
                    if saving:
                        store.save(index + 1, state)
                    evaluating += time.monotonic() - start
                advance(index + 1, "")
            else:
                stopped = self._log(pending)
        if stopped:
            return LoopResult({}, done, stopped, math.nan)
        seconds = (time.monotonic() - began - evaluating) / max(1, self.steps - done - 1)
        return LoopResult(state.trainable, self.steps, "", seconds if self.steps > done + 1 else math.nan)

    def _log(self, pending: tuple[int, dict] | None) -> str:
        """Writes the metrics of a step; returns a reason to stop, or nothing."""
        if pending is None:
            return ""
        index, metrics = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            return f"{', '.join(bad)} is not finite at step {index}; lower the learning rate or the coefficients"
        append_line(self._metrics, {"step": index, "identity": self.identity, **values})
        return ""

    def _evaluate(self, state: TrainState, index: int) -> None:
        if self.evaluate is not None:
            row = {"step": index, "identity": self.identity, "evaluation": self.evaluate(state.trainable)}
            append_line(self._metrics, row)


def _one_ahead(inputs: Callable[[int], Any], indices: range) -> Generator[tuple[int, Any]]:
    """(i, inputs(i)) in order; a thread makes the next while the caller works on one. Its errors are raised here.

    The thread ends with the generator: close it where the loop may end early.
    """
    with ThreadPoolExecutor(1, "inputs") as pool:
        following = None
        for index in indices:
            current = following or pool.submit(inputs, index)
            following = pool.submit(inputs, index + 1) if index + 1 in indices else None
            yield index, current.result()


def front_rows(directory: str | os.PathLike, identity: str | None = None) -> list[dict]:
    """Evaluations of a run in the order of its steps: [{"step", "evaluation": {...}}]."""
    rows = read_lines(Path(directory) / "metrics.jsonl")
    return [row for row in rows if "evaluation" in row and identity in (None, row.get("identity"))]
