"""Rows of tokens with their document boundaries: what every stage consumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct


@struct.dataclass
class Batch:
    """Rows on their way to a device, numpy or JAX arrays.

    `segments` numbers the documents of a row from 1; 0 is padding.
    """

    tokens: Any  # i32 [B, S]
    segments: Any  # i32 [B, S]
    valid: Any  # bool [B, S]: position t predicts token t+1 and carries loss and statistics


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows on the host.

    Attributes:
      tokens: i32 [N, S].
      segments: i32 [N, S]; documents of a row are numbered from 1, padding is 0 (from lengths, never from token ids).
      valid: bool [N, S]; position t is valid if token t and token t+1 are real tokens of one document and token t is
        not the start mark; for question-answer text only positions that predict answer tokens are valid.
      domain: i32 [N]. Of retain rows: 1 where the row is neighbour text, else 0; known on embedded benchmarks and with
        a neighbour file only, used by the domain oracle and by evaluation, never by a method. Of forget rows: the
        number of the row's topic, from 0.
    """

    tokens: np.ndarray
    segments: np.ndarray
    valid: np.ndarray
    domain: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        return Rows(self.tokens[indices], self.segments[indices], self.valid[indices], self.domain[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows at `indices` as one batch [len(indices), S]."""
        return Batch(self.tokens[indices], self.segments[indices], self.valid[indices])

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one after the other. Parts must share one row length."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))
