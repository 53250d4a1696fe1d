"""Documents -> rows of equal length, with the boundaries kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from trace_jax.data.rows import Rows
from trace_jax.data.tokenizer import Encoded, start_and_end
from trace_jax.models.model import SpecialTokens

_OPEN_ROWS = 64  # keeps packing linear in the number of documents
_OWN = SpecialTokens()  # of a tokenizer that is trained here


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a document that fits a row: tokens i32 [n] (the first is the start mark), valid bool [n]."""

    tokens: np.ndarray
    valid: np.ndarray


def chunks(document: Encoded, row_length: int, special: SpecialTokens = _OWN) -> Iterator[Chunk]:
    """Cuts start + tokens + EOS into chunks of at most `row_length` tokens, each with the start mark (`start_and_end`).

    A later chunk repeats the last token of the one before as context. So every token of a document but its first,
    EOS included, is a target exactly once: at the valid position just before it.
    """
    start_mark, end_mark = start_and_end(special)
    tokens = np.append(document.tokens, np.int32(end_mark))
    span = row_length - 1
    for start in range(0, max(len(tokens) - 1, 1), span - 1):
        piece = tokens[start : start + span]
        valid = np.zeros(len(piece) + 1, bool)
        # Position 1 + i holds token start + i and predicts start + i + 1; the last position predicts nothing.
        valid[1:-1] = np.arange(start + 1, start + len(piece)) >= document.first_target
        yield Chunk(np.concatenate([[np.int32(start_mark)], piece]), valid)


def pack_documents(
    documents: Sequence[Encoded], row_length: int, *, domain: int = 0, special: SpecialTokens = _OWN
) -> Rows:
    """Packs the chunks of documents of one source into rows: each chunk goes to the first open row that has room.

    Rows stand in the order in which they were opened, documents inside a row in their own order.

    Args:
      documents: encoded documents, none empty.
      row_length: tokens per row, S >= 3.
      domain: `Rows.domain` of every row.
      special: the tokenizer's marks.
    """
    pieces = [c for d in documents for c in chunks(d, row_length, special) if c.valid.any()]
    rows = _first_fit([len(c.tokens) for c in pieces], row_length)
    return _fill(pieces, rows, row_length, domain, special.pad)


def rows_of_chunks(
    documents: Sequence[Encoded], row_length: int, *, shortest: int = 0, special: SpecialTokens = _OWN
) -> Rows:
    """One chunk a row, in document order; chunks of fewer than `shortest` tokens are left out."""
    pieces = [c for d in documents for c in chunks(d, row_length, special)]
    pieces = [c for c in pieces if c.valid.any() and len(c.tokens) >= shortest]
    return _fill(pieces, list(range(len(pieces))), row_length, 0, special.pad)


def pack_pairs(
    pairs: Sequence[tuple[Chunk, Chunk]], row_length: int, *, domain: int = 0, pad: int = _OWN.pad
) -> tuple[Rows, Rows]:
    """(rows of the first chunks, rows of the second ones); both chunks of a pair stand in rows of the same number."""
    rows = _first_fit([max(len(a.tokens), len(b.tokens)) for a, b in pairs], row_length)
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    return _fill(first, rows, row_length, domain, pad), _fill(second, rows, row_length, domain, pad)


def _first_fit(lengths: Sequence[int], row_length: int) -> list[int]:
    """Row number of each length. Rows too full for the shortest length are closed, and the oldest of too many."""
    smallest = min(lengths, default=0)
    room: dict[int, int] = {}  # open rows in order of opening
    rows, opened = [], 0
    for length in lengths:
        row = next((r for r, free in room.items() if free >= length), None)
        if row is None:
            if len(room) == _OPEN_ROWS:
                del room[next(iter(room))]
            row, opened = opened, opened + 1
            room[row] = row_length
        room[row] -= length
        if room[row] < smallest:
            del room[row]
        rows.append(row)
    return rows


def _fill(pieces: Sequence[Chunk], row_of: Sequence[int], row_length: int, domain: int, pad: int) -> Rows:
    count = max(row_of, default=-1) + 1
    tokens = np.full((count, row_length), pad, np.int32)
    segments = np.zeros((count, row_length), np.int32)
    valid = np.zeros((count, row_length), bool)
    used, documents = np.zeros(count, int), np.zeros(count, int)
    for piece, row in zip(pieces, row_of, strict=True):
        place = slice(used[row], used[row] + len(piece.tokens))
        documents[row] += 1
        tokens[row, place], valid[row, place], segments[row, place] = piece.tokens, piece.valid, documents[row]
        used[row] = place.stop
    return Rows(tokens, segments, valid, np.full(count, domain, np.int32))
