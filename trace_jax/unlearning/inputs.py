"""Which rows a step of unlearning reads: a function of the step alone, so that a resumed run repeats itself."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from trace_jax.data.batches import Batches, EpochSampler, IndexSampler, retain_batches
from trace_jax.data.rows import Batch, Rows
from trace_jax.routing.weights import RetainWeights
from trace_jax.unlearning.config import UnlearningConfig


@struct.dataclass
class StepRows:
    """What one step reads; parts that the objective doesn't read are None. Every leaf has the rows first.

    weights f32 [B, S]: multiply the retain losses (or their weights, where the step weighs tokens by their present
    routing). topic i32 [B]: which topic a forget row is of. refusals: for each
    forget row, its beginnings with a refusal after each. reference_nll, refusal_reference_nll f32 [B, S]: of both under
    the original model, where they were computed before.
    """

    forget: Batch
    retain: Batch | None = None
    weights: Any = None
    topic: Any = None
    refusals: Batch | None = None
    reference_nll: Any = None
    refusal_reference_nll: Any = None


def pad_rows(rows: Any, multiple: int) -> Any:
    """Adds empty rows (no segment, nothing valid) to arrays [B, ...] until the devices share the rows evenly."""

    def pad(x):
        missing = -len(x) % multiple
        return np.concatenate([np.asarray(x), np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x

    return jax.tree.map(pad, rows)


class Reference(NamedTuple):
    """-log p of every token under the original model: of the forget rows f32 [N, S], and of their refusals."""

    nll: np.ndarray | None = None
    refusal_nll: np.ndarray | None = None


def _at(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]


class Inputs:
    """`at(step)` is the `StepRows` of a step, NumPy arrays padded to a multiple of rows."""

    def __init__(
        self,
        forget: Rows,
        retain: Rows | None,
        weights: RetainWeights | None,
        config: UnlearningConfig,
        *,
        seed: int,
        multiple: int,
        refusals: Rows | None = None,
        reference: Reference | None = None,
    ):
        """
        Args:
          forget, refusals: row i of one belongs to row i of the other. `forget.domain` numbers the topics.
          retain, weights: None where there is no retain term; no weights: all the same.
          reference: log-probabilities of `forget` and `refusals` that were computed before.
        """
        self._multiple, self._refusals, self._reference = multiple, refusals, reference or Reference()
        self.forget = Batches(forget, forget_sampler(forget.domain, config, seed=seed))
        self._retain, self._weights = None, None
        self._retained, self._size, self._seed = retain if config.retains else None, config.retain_batch_size, seed
        self.weigh(weights)

    def weigh(self, weights: RetainWeights | None) -> None:
        """Draws and weighs retain rows with `weights` from now on; None: all the same."""
        if self._retained is None:
            return
        assert self._size is not None
        probability = weights.row_probability if weights is not None else None
        self._retain = retain_batches(self._retained, self._size, seed=self._seed + 1, probability=probability)
        self._weights = self._retained.valid.astype(np.float32) if weights is None else weights.step_weights

    def at(self, step: int) -> StepRows:
        chosen = self.forget.indices(step)
        rows = StepRows(
            self.forget.rows.batch(chosen),
            topic=self.forget.rows.domain[chosen],
            refusals=None if self._refusals is None else self._refusals.batch(chosen),
            reference_nll=_at(self._reference.nll, chosen),
            refusal_reference_nll=_at(self._reference.refusal_nll, chosen),
        )
        padded = pad_rows(rows, self._multiple)
        if self._retain is None or self._weights is None:
            return padded
        drawn = self._retain.indices(step)
        retain, weights = pad_rows((self._retain.rows.batch(drawn), self._weights[drawn]), self._multiple)
        return dataclasses.replace(padded, retain=retain, weights=weights)


def forget_sampler(topics: np.ndarray, config: UnlearningConfig, *, seed: int) -> IndexSampler:
    """Which forget rows a step reads. Several topics are mixed, or take turns: step i is of topic i mod n.

    topics: i32 [N], of each row. Every topic is gone through in its own epochs, reshuffled each.
    """
    rows = [np.flatnonzero(topics == topic) for topic in np.unique(topics)]
    if config.topics == "mixed" or len(rows) == 1:
        return EpochSampler(len(topics), config.forget_batch_size, seed=seed)
    return _Alternating(rows, config.forget_batch_size, seed=seed)


class _Alternating:
    """Batches of one topic after the other (as RMU trains on bio and cyber, 2403.03218)."""

    def __init__(self, rows: list[np.ndarray], batch_size: int, *, seed: int):
        self._rows = rows
        self._samplers = [EpochSampler(len(of_topic), batch_size, seed=seed + i) for i, of_topic in enumerate(rows)]

    def __getitem__(self, step: int) -> np.ndarray:
        turn, topic = divmod(step, len(self._rows))
        return self._rows[topic][self._samplers[topic][turn]]
