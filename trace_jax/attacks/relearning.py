"""Training goes on: on some of the forget rows, or on benign text. What comes back was hidden, not unlearned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.attacks.attack import Case, Point
from trace_jax.attacks.config import BenignRelearningConfig, RelearningConfig
from trace_jax.data.batches import Batches, EpochSampler
from trace_jax.data.packing import pack_documents
from trace_jax.data.rows import Rows
from trace_jax.data.sources import read_source
from trace_jax.data.tokenizer import encode_documents
from trace_jax.evaluation.measurement import Measurement
from trace_jax.io.files import remove
from trace_jax.models.model import Model
from trace_jax.parallel.processes import barrier, broadcast_from_process_0
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.train import train_on


def relearning(settings: RelearningConfig, case: Case) -> list[Point]:
    """Trains on a share of the forget rows, drawn by the run's seed; a point for every evaluation."""
    rows = case.corpora.forget
    number = max(1, round(settings.share * len(rows)))
    drawn = np.random.default_rng([case.seed, 5]).permutation(len(rows))[:number]
    return _trained(settings, case, rows.take(np.sort(drawn)), "relearning")


def benign_relearning(settings: BenignRelearningConfig, case: Case) -> list[Point]:
    """Trains on text that has nothing to do with the forget set; a point for every evaluation.

    Raises:
      DataError: the source can't be read.
    """
    return _trained(settings, case, benign_rows(settings, case), "benign relearning")


def benign_rows(settings: BenignRelearningConfig, case: Case) -> Rows:
    """The source's text in rows like those of the run; without one, retain rows that are not of neighbours."""
    if settings.source is None:
        retain = case.corpora.retain
        return retain.take(np.flatnonzero(retain.domain == 0)) if (retain.domain == 0).any() else retain
    documents = encode_documents(case.vocabulary, read_source(settings.source).documents)
    return pack_documents(documents, case.data.row_length, special=case.vocabulary.special)


def _trained(settings: RelearningConfig | BenignRelearningConfig, case: Case, rows: Rows, title: str) -> list[Point]:
    """Trains the unlearned model, and the retrained one in the same way if there is one."""
    found = _evaluations(settings, case, lambda: case.unlearned, rows, case.directory, case.identity, title)
    control, others = case.control, {}
    if control is not None:
        title = f"{title} of the retrained model"
        others = _evaluations(settings, case, control.load, rows, control.directory, control.identity, title)
    return [Point(f"{step} steps", measured, retrained=others.get(step, ())) for step, measured in found.items()]


def _evaluations(
    settings: RelearningConfig | BenignRelearningConfig,
    case: Case,
    load: Callable[[], Model],
    rows: Rows,
    directory: Path,
    identity: str,
    title: str,
) -> dict[int, list[Measurement]]:
    """Measurements by step. A diverging run ends early, and what was measured until then is the result."""

    def kept() -> dict[int, list[Measurement]]:
        evaluated = front_rows(directory, identity)
        return {row["step"]: [Measurement.from_json(m) for m in row["evaluation"]] for row in evaluated}

    def evaluate(params: Any) -> list[dict[str, Any]]:
        scores = case.evaluator.score(case.original.replace(params=params), full=True)
        return [m.to_json() for m in case.evaluator.measure(scores)]

    if not broadcast_from_process_0(settings.steps in kept()):
        batches = Batches(rows, EpochSampler(len(rows), settings.batch_size, seed=case.seed))
        train_on(
            load(),
            settings.optimization,
            batches.__getitem__,
            steps=settings.steps,
            evaluate=evaluate,
            evaluate_every=settings.evaluate_every,
            seed=case.seed,
            mesh=case.mesh,
            directory=directory,
            identity=identity,
            title=title,
        )
        remove(directory / "checkpoints")
        barrier(f"{title}: measured")  # all processes read it
    return kept()
