"""Forget rows paired with rows that refuse: the same beginnings, with a refusal instead of what is to be forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.data.packing import Chunk, pack_pairs
from trace_jax.data.rows import Rows
from trace_jax.data.tokenizer import start_and_end
from trace_jax.models.model import SpecialTokens


def encode_refusals(texts: Sequence[str], tokenizer: Any, special: SpecialTokens) -> list[np.ndarray]:
    """Token ids i32 [r] of each refusal as it follows a question or a text, with the mark that ends a text."""
    if tokenizer is None:
        raise ConfigError("the objective answers with refusals, which need a tokenizer; this model has none.")
    _, end = start_and_end(special)
    encoded = tokenizer.encode_batch([f" {text.strip()}" for text in texts], add_special_tokens=False)
    return [np.array([*e.ids, end], np.int32) for e in encoded]


def with_refusals(rows: Rows, refusals: Sequence[np.ndarray], *, pad: int = 0) -> tuple[Rows, Rows]:
    """(forget rows, refusal rows) [N', S]: row i of one belongs to row i of the other.

    Every document (or chunk of one) in `rows` gives a pair: its beginning, then how it goes on, and its beginning, then
    a refusal; only what comes after the beginning is valid. The beginning of an answer is its question; text without a
    question is cut in the middle. Refusals are taken in turn.

    Args:
      refusals: token ids i32 [r] of each.

    Raises:
      ConfigError: a refusal of more than half a row.
    """
    length = rows.tokens.shape[1]
    if (longest := max(map(len, refusals))) > length // 2:
        raise ConfigError(
            f"a refusal has {longest} tokens, more than half of a row of {length}; shorten it, or raise row_length."
        )
    parts = []
    for topic in np.unique(rows.domain):
        pieces = _pieces(rows.take(np.flatnonzero(rows.domain == topic)))
        pairs = [_pair(piece, refusals[i % len(refusals)], length) for i, piece in enumerate(pieces)]
        parts.append(pack_pairs(pairs, length, domain=int(topic), pad=pad))
    forget, refused = zip(*parts, strict=True)
    return Rows.concatenate(forget), Rows.concatenate(refused)


def _pieces(rows: Rows) -> Iterator[Chunk]:
    """The documents of every row that predict something, in order."""
    for tokens, segments, valid in zip(rows.tokens, rows.segments, rows.valid, strict=True):
        for document in range(1, int(segments.max(initial=0)) + 1):
            inside = segments == document
            if valid[inside].any():
                yield Chunk(tokens[inside], valid[inside])


def _pair(piece: Chunk, refusal: np.ndarray, length: int) -> tuple[Chunk, Chunk]:
    first = int(np.argmax(piece.valid))  # the position that predicts the first answer token
    if first <= 1:  # no question, only the start mark
        first = max(1, len(piece.tokens) // 2 - 1)
    after = piece.valid & (np.arange(len(piece.valid)) >= first)
    beginning = piece.tokens[: first + 1][-(length - len(refusal)) :]
    tokens = np.concatenate([beginning, refusal]).astype(np.int32)
    valid = np.zeros(len(tokens), bool)
    valid[len(beginning) - 1 : -1] = True
    return Chunk(piece.tokens, after if after.any() else piece.valid), Chunk(tokens, valid)
