"""Passages that two sets of documents share: runs of words, found by hashes of all runs of a length."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trace_jax.data.sources import Document

N = 13  # words; the length at which GPT-3 (2005.14165, appendix C) and others call text shared
_WORDS = 1 << 20  # that are hashed at once


class Shared(NamedTuple):
    """How much of `left` also stands in `right`, in numbers of documents, and the first place where it does."""

    left: int
    right: int
    ngrams: int  # different ones
    example: tuple[Document, Document]


def shared_ngrams(left: Sequence[Document], right: Sequence[Document], n: int = N) -> Shared | None:
    """The documents that share runs of `n` words, whatever their case and white space, or None where none do."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys(w for d in left for w in _words(d)), start=1)}
    keys = np.random.default_rng(0).integers(1 << 64, size=len(numbers) + 1, dtype=np.uint64)
    known, owners = map(np.concatenate, zip(*_hashes(left, numbers, keys, n), strict=True))
    order = np.argsort(known, kind="stable")
    known, owners = known[order], owners[order]
    found, holders = [], []
    for hashes, documents in _hashes(right, numbers, keys, n):
        place = np.searchsorted(known, hashes)
        same = np.append(known, np.uint64(0))[place] == hashes
        found.append(place[same])
        holders.append(documents[same])
    found, holders = np.concatenate(found), np.concatenate(holders)
    if not len(found):
        return None
    ngrams = np.unique(known[found])
    sharing = np.unique(owners[np.isin(known, ngrams)])
    return Shared(
        len(sharing), len(np.unique(holders)), len(ngrams), (left[int(owners[found[0]])], right[int(holders[0])])
    )


def _words(document: Document) -> list[str]:
    return f"{document.text} {document.answer or ''}".casefold().split()


def _hashes(
    documents: Sequence[Document], numbers: dict[str, int], keys: np.ndarray, n: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hash u64, index of its document) of every run of `n` words that all have a number, in parts."""
    factors = np.random.default_rng(1).integers(1 << 63, size=n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    words, ends, first = [], [], 0
    for index, document in enumerate(documents):
        words.extend(map(numbers.get, _words(document), itertools.repeat(0)))
        words.append(0)  # no run goes on into the next
        ends.append(len(words))
        if len(words) > _WORDS or index == len(documents) - 1:
            numbered = np.array(words + [0] * n)
            starts = np.flatnonzero(np.convolve(numbered == 0, np.ones(n), "valid") == 0)
            hashes = np.zeros(len(starts), np.uint64)
            for offset in range(n):
                hashes += keys[numbered[starts + offset]] * factors[offset]
            yield hashes, first + np.searchsorted(ends, starts, side="right")
            words, ends, first = [], [], index + 1
