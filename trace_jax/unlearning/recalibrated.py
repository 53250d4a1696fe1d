"""Retain weights that are replaced while a run goes on, and kept on disk so that a continued run has the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from trace_jax.io.codec import encode
from trace_jax.io.files import read_json, remove, write_json
from trace_jax.io.progress import say
from trace_jax.models.model import Model
from trace_jax.routing.statistics import DamagedRouting
from trace_jax.routing.weights import Recalibration, RetainWeights
from trace_jax.unlearning.metrics import Metrics


@dataclasses.dataclass
class Recalibrated:
    """What a loop calls to solve weights anew (`trace_jax.unlearning.loop.Hook`).

    Every recalibration has a directory of its own, `recalibration/step-NNNNNN`: the weights from step NNNNNN on (see
    `RetainWeights.save`), then drift.json, without which they do not count. The drift is also a line of metrics.jsonl.

    weights: before the first recalibration. use: called with those that replace them.
    directory, identity, title: as in `Loop`.
    """

    solve: Recalibration
    weights: RetainWeights
    use: Callable[[RetainWeights], None]
    directory: Path
    identity: str
    title: str

    def __post_init__(self):
        self._last, self._metrics = self.weights, Metrics(self.directory, self.identity)

    def refresh(self, step: int, current: Model) -> None:
        """Solves for the weights of the steps from `step` on, under the model before that step."""
        folder = self._folder(step)
        if step == self.solve.every:  # what is there is of an earlier run
            remove(folder.parent)
        try:
            weights, drift = self.solve(current, self._last)
            values, words = encode(drift), drift.text()
        except DamagedRouting as error:  # the next step's loss says so too, and ends the run
            weights, values, words = self._last, {"problem": str(error)}, f"{error} The last weights are kept."
        weights.save(folder)
        write_json(folder / "drift.json", {"step": step, "identity": self.identity, **values})
        if not self._metrics.has(step, "recalibration"):  # a run that continues after this very step has it
            self._metrics.write(step, recalibration=values)
        say(f"{self.title}: recalibration after step {step}: {words}")
        self._replace(weights)

    def resumed(self, step: int) -> None:
        """Reads the weights that step `step - 1` was taken with; those of `step` are solved for again where due.

        Raises:
          ValueError: they are not there.
        """
        newest = (step - 1) // self.solve.every * self.solve.every
        if newest == 0:
            self._replace(self.weights)
            return
        folder = self._folder(newest)
        about = read_json(folder / "drift.json")
        if about is None or about.get("identity") != self.identity:
            raise ValueError(
                f"{folder}: the weights that this run had solved for after step {newest} are not there, and it can't "
                f"go on as it was. Remove {self.directory / 'checkpoints'} to run it from the beginning."
            )
        self._replace(RetainWeights.load(folder))

    def _replace(self, weights: RetainWeights) -> None:
        self._last = weights
        self.use(weights)

    def _folder(self, step: int) -> Path:
        return self.directory / "recalibration" / f"step-{step:06d}"
