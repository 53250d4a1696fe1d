"""Training goes on: on some of the forget rows, or on benign text. What comes back was hidden, not unlearned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.attacks.attack import Attack, Case, Context, Point
from trace_jax.config import ConfigError, option
from trace_jax.data.rows import Rows, encode_documents, epoch_sampler, pack_documents
from trace_jax.data.sources import read_source
from trace_jax.evaluation.intervals import Measurement
from trace_jax.io.files import read_json, remove, write_json
from trace_jax.models.model import Model
from trace_jax.parallel.processes import barrier, broadcast_from_process_0
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.optimizer import Optimizer, OptimizerConfig
from trace_jax.unlearning.train import train_on


class TrainingOn(Attack):
    """Training of all parameters goes on. Defaults: MUSE's relearning (100 steps of 4 rows at 1e-5)."""

    steps: int = option(100, help="optimizer steps", minimum=1)
    evaluate_every: int = option(25, help="steps between evaluations, of which the worst counts", minimum=1)
    batch_size: int = option(4, help="rows per step", minimum=1)
    learning_rate: float = option(1e-5, help="learning rate, constant", minimum=0.0)
    optimizer: Optimizer = option("adamw", help="how gradients become updates")

    @property
    def optimization(self) -> OptimizerConfig:
        """The optimizer's settings."""
        return OptimizerConfig(optimizer=self.optimizer, learning_rate=self.learning_rate)

    def points(self, case: Case) -> list[Point]:
        """A point for every evaluation; the retrained model is trained in the same way, once for all methods."""
        context, title = case.context, case.directory.name.replace("_", " ")
        evaluated = self._evaluations(context, lambda: case.unlearned, case.directory, case.identity, title)
        others: dict[int, list[Measurement]] = {}
        if context.load_retrained is not None:
            control = (context.load_retrained, context.directory, context.identity, f"{title} of the retrained model")
            others = self._evaluations(context, *control)
        return [
            Point(f"{step} steps", measured, retrained=others.get(step, ())) for step, measured in evaluated.items()
        ]

    def _evaluations(
        self, context: Context, load: Callable[[], Model], directory: Path, identity: str, title: str
    ) -> dict[int, list[Measurement]]:
        """Measurements by step. A diverging run ends early, and what was measured until then is the result."""

        def evaluate(params: Any) -> list[dict[str, Any]]:
            scores = context.evaluator.score(context.original.replace(params=params), full=True)
            return [m.to_json() for m in context.evaluator.measure(scores)]

        finished = directory / "finished.json"
        if not broadcast_from_process_0(read_json(finished) == identity):
            rows: Rows = context.prepared
            sampler = epoch_sampler(len(rows), self.batch_size, seed=context.seed)
            train_on(
                load(),
                self.optimization,
                lambda step: rows.batch(sampler(step)),
                steps=self.steps,
                evaluate=evaluate,
                evaluate_every=self.evaluate_every,
                seed=context.seed,
                mesh=context.mesh,
                directory=directory,
                identity=identity,
                title=title,
            )
            write_json(finished, identity)
            remove(directory / "checkpoints")
            barrier(f"{title}: measured")  # all processes read it
        rows_of = front_rows(directory, identity)
        return {row["step"]: [Measurement.from_json(m) for m in row["evaluation"]] for row in rows_of}


class Relearning(TrainingOn):
    """Training goes on, on a share of the forget rows that is drawn by the run's seed."""

    share: float = option(0.1, help="share of the forget rows that is trained on; 1 = all", minimum=0.0, maximum=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.share == 0:
            raise ConfigError("share is 0; the attack needs forget rows to train on. Give a share above 0, at most 1.")

    def prepare(self, context: Context) -> Rows:
        """The rows that are trained on."""
        rows = context.corpora.forget
        number = max(1, round(self.share * len(rows)))
        drawn = np.random.default_rng([context.seed, 5]).permutation(len(rows))[:number]
        return rows.take(np.sort(drawn))


class BenignRelearning(TrainingOn):
    """Training goes on, on text that has nothing to do with the forget set (2406.13356, 2409.18025)."""

    source: str | None = option(
        None, help="that text (`trace_jax.data.sources.read_source`); None: rows of the retain corpus, neighbours aside"
    )

    def check_source(self) -> None:
        if self.source:
            read_source(self.source)

    def prepare(self, context: Context) -> Rows:
        """The source's text in rows like those of the run; without one, retain rows that are not of neighbours."""
        if self.source is None:
            retain = context.corpora.retain
            return retain.take(np.flatnonzero(retain.domain == 0)) if (retain.domain == 0).any() else retain
        documents = encode_documents(context.codec, read_source(self.source).documents)
        return pack_documents(documents, context.data.row_length, special=context.codec.special)
