"""Retain weights that are replaced while a run goes on, and kept on disk so that a continued run has the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trace_jax.io.codec import encode
from trace_jax.io.files import read_json, remove, write_json
from trace_jax.io.progress import say
from trace_jax.models.model import Model
from trace_jax.routing.statistics import DamagedRouting
from trace_jax.routing.weights import Recalibration, RetainWeights
from trace_jax.unlearning.metrics import Metrics


class Recalibrated:
    """What `Loop.refresh` and `Loop.resumed` call.

    Every recalibration has a directory of its own, `recalibration/step-NNNNNN`: the weights from step NNNNNN on (see
    `RetainWeights.save`), then drift.json, without which they do not count. What was found is also a line of
    metrics.jsonl.
    """

    def __init__(
        self,
        solve: Recalibration,
        weights: RetainWeights,
        use: Callable[[RetainWeights], None],
        *,
        directory: Path,
        identity: str,
        title: str,
    ):
        """
        Args:
          weights: before the first recalibration. use: called with those that replace them.
          directory, identity, title: as in `Loop`.
        """
        self._solve, self._use = solve, use
        self._first = self._last = weights
        self._directory, self._identity, self._title = directory, identity, title
        self._metrics = Metrics(directory, identity)

    def refresh(self, step: int, current: Model) -> None:
        """Solves for the weights of the steps from `step` on, under the model before that step."""
        where = self._at(step)
        if step == self._solve.every:  # what is there is of an earlier run
            remove(where.parent)
        try:
            weights, drift = self._solve(current, self._last)
            found, words = encode(drift), drift.text()
        except DamagedRouting as error:  # the next step's loss says so too, and ends the run
            weights, found, words = self._last, {"problem": str(error)}, f"{error} The last weights are kept."
        weights.save(where)
        write_json(where / "drift.json", {"step": step, "identity": self._identity, **found})
        if not self._metrics.has(step, "recalibration"):  # a run that continues after this very step has it
            self._metrics.write(step, recalibration=found)
        say(f"{self._title}: recalibration after step {step}: {words}")
        self._replace(weights)

    def resumed(self, step: int) -> None:
        """Reads the weights that step `step - 1` was taken with; those of `step` are solved for again where due.

        Raises:
          ValueError: they are not there.
        """
        newest = (step - 1) // self._solve.every * self._solve.every
        if newest == 0:
            self._replace(self._first)
            return
        where = self._at(newest)
        about = read_json(where / "drift.json")
        if about is None or about.get("identity") != self._identity:
            raise ValueError(
                f"{where}: the weights that this run had solved for after step {newest} are not there, and it can't "
                f"go on as it was. Remove {self._directory / 'checkpoints'} to run it from the beginning."
            )
        self._replace(RetainWeights.load(where))

    def _replace(self, weights: RetainWeights) -> None:
        self._last = weights
        self._use(weights)

    def _at(self, step: int) -> Path:
        return self._directory / "recalibration" / f"step-{step:06d}"
