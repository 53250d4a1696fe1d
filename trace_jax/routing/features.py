"""What is reweighted (tokens, windows or rows), as a matrix of expert activations that the solver can match.

Two units with the same activations always get the same weight, so only distinct patterns are kept, in an order that
depends on the patterns alone. The solver therefore returns bit for bit the same multipliers however the corpus was
shuffled, batched or sharded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse as sparse

Matrix = Any  # np.ndarray or scipy.sparse.csr_array, f64


@dataclasses.dataclass(frozen=True)
class Patterns:
    """The distinct activation patterns of a corpus of T tokens, for C selected experts.

    Attributes:
      features: f64 [P, C]; a_c of the unit (0 or 1 for a token, a mean over tokens for a row or window). Sparse for
        unit "token", dense otherwise.
      tokens: f64 [P]; how many of the T tokens belong to units with the pattern (whole numbers, so that
        sums are exact).
      of_token: i64 [T]; the pattern of each token's unit.
    """

    features: Matrix
    tokens: np.ndarray
    of_token: np.ndarray


def find_patterns(
    indices: np.ndarray, matched: np.ndarray, *, unit: str, rows: np.ndarray | None = None, window: int | None = None
) -> Patterns:
    """Distinct activation patterns of the units of a corpus.

    Args:
      indices: integer [L, T, K]; the chosen experts of every valid token.
      matched: bool [L, E]; columns of the features, in the order of `np.nonzero(matched)`.
      unit: "token", "row" or "window" (the last `window` tokens of the row, fewer at its beginning).
      rows: integer [T]; the row of each token, for "row" and "window". Tokens of a row stand in reading order.
    """
    activations = activation_matrix(indices, matched)
    key = _keys(activations)
    if unit == "token":
        of_token, first, tokens = _distinct(key)
        features = activations[first]
        features.sort_indices()  # so that sums over a pattern don't depend on the order of a token's experts
        return Patterns(features, tokens.astype(np.float64), of_token)

    assert rows is not None
    members, unit_of_token = _members(rows, unit, window)
    of_unit, first, _ = _distinct(members.astype(np.uint64) @ (key + _LENGTH_KEY))
    members = members[first]
    lengths = (members @ np.ones(len(key))).reshape(-1, 1)
    features = (members @ activations).toarray() / lengths
    of_token = of_unit[unit_of_token]
    tokens = np.bincount(of_token, minlength=len(first))
    return Patterns(features, tokens.astype(np.float64), of_token)


def activation_matrix(indices: np.ndarray, matched: np.ndarray, chunk: int = 65_536) -> Matrix:
    """a_c(t) as a sparse f64 [T, C]: 1 where the expert of column c is among the token's top K.

    indices: integer [L, T, K]; matched: bool [L, E], its C true entries are the columns.
    """
    columns = np.full(matched.shape, -1, np.int32)
    columns[matched] = np.arange(matched.sum())
    found, per_token = [], []
    for start in range(0, indices.shape[1], chunk):
        pairs = zip(columns, indices[:, start : start + chunk], strict=True)
        table = np.concatenate([layer_columns[chosen] for layer_columns, chosen in pairs], axis=1)  # [chunk, L K]
        kept = table >= 0
        found.append(table[kept])
        per_token.append(kept.sum(axis=1))
    column = np.concatenate(found)
    ends = np.concatenate([[0], np.cumsum(np.concatenate(per_token))]).astype(np.int32 if len(column) < 2**31 else int)
    return sparse.csr_array((np.ones(len(column)), column, ends), (indices.shape[1], int(matched.sum())))


def unit_means(values: np.ndarray, rows: np.ndarray, *, unit: str, window: int | None = None) -> np.ndarray:
    """Each token's value f64 [T] replaced by the mean over its unit."""
    if unit == "token":
        return values
    members, unit_of_token = _members(rows, unit, window)
    return ((members @ values) / (members @ np.ones(len(values))))[unit_of_token]


# A random number of 64 bits stands for each column; a pattern's key is the sum over its activations, modulo 2^64. Sums
# have no order, and two of 10^6 different patterns share a key with probability 10^-7.
_LENGTH_KEY = np.uint64(0x9E3779B97F4A7C15)  # counted once per token, so that a row's key holds its length


def _keys(activations: Matrix) -> np.ndarray:
    """uint64 [T]; equal for tokens with the same activations."""
    numbers = np.random.default_rng(0).integers(0, 2**64, activations.shape[1], np.uint64, endpoint=False)
    ones = np.ones(activations.nnz, np.uint64)
    return sparse.csr_array((ones, activations.indices, activations.indptr), activations.shape) @ numbers


def _distinct(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pattern of each unit, first unit of each pattern, units per pattern)."""
    _, first, of_unit, units = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    return of_unit, first, units


def _members(rows: np.ndarray, unit: str, window: int | None) -> tuple[Matrix, np.ndarray]:
    """(0/1 matrix [units, T] of the tokens of each unit, i64 [T] the unit of each token)."""
    return _row_members(rows) if unit == "row" else _window_members(rows, window or 1)


def _row_members(rows: np.ndarray) -> tuple[Matrix, np.ndarray]:
    """(0/1 matrix [rows, T], the row number of each token from 0)."""
    _, row = np.unique(rows, return_inverse=True)
    tokens = np.arange(len(rows))
    members = sparse.csr_array((np.ones(len(rows)), (row, tokens)), (int(row.max()) + 1, len(rows)))
    return members, row


def _window_members(rows: np.ndarray, window: int) -> tuple[Matrix, np.ndarray]:
    """(0/1 matrix [T, T]: line t marks the last `window` tokens of t's row up to t, the identity)."""
    order = np.argsort(rows, kind="stable")  # reading order within each row is kept
    ordered = rows[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    begin = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
    reach = np.minimum(np.arange(len(rows)) - begin + 1, window)  # tokens in each window
    ends = np.concatenate([[0], np.cumsum(reach)])
    start = np.arange(len(rows)) - reach + 1
    tokens = np.repeat(start - ends[:-1], reach) + np.arange(ends[-1])
    members = sparse.csr_array((np.ones(ends[-1]), order[tokens], ends), (len(rows), len(rows)))
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return members[back], np.arange(len(rows))
