"""Rows hold every token of every document once as a target, and never let two documents touch."""

import collections

import hypothesis
import numpy as np
from hypothesis import strategies as st

from trace_jax.data.rows import BOS, EOS, PAD, chunks, pack_documents, rows_of_chunks
from trace_jax.models.model import Encoded, SpecialTokens


def documents_of(lengths, first_targets=None):
    """Documents whose tokens are all different, so that each can be found again."""
    starts = np.cumsum([10, *lengths])
    first_targets = first_targets or [0] * len(lengths)
    return [
        Encoded(np.arange(s, s + n, dtype=np.int32), f) for s, n, f in zip(starts, lengths, first_targets, strict=False)
    ]


def test_a_row_by_hand():
    rows = pack_documents([Encoded(np.array([10, 11, 12], np.int32)), Encoded(np.array([20], np.int32))], 10)
    np.testing.assert_array_equal(rows.tokens, [[BOS, 10, 11, 12, EOS, BOS, 20, EOS, PAD, PAD]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    # Neither BOS nor the last token of a document predicts; the token before EOS does.
    np.testing.assert_array_equal(rows.valid, np.array([[0, 1, 1, 1, 0, 0, 1, 0, 0, 0]], bool))
    assert (rows.tokens.dtype, rows.segments.dtype, rows.domain.dtype) == (np.int32, np.int32, np.int32)


def test_without_a_beginning_mark_the_first_end_starts_a_document_and_padding_may_look_like_it():
    special = SpecialTokens(bos=None, eos=(7, 8), pad=7)
    rows = pack_documents([Encoded(np.array([10, 7, 11], np.int32))], 7, special=special)
    np.testing.assert_array_equal(rows.tokens, [[7, 10, 7, 11, 7, 7, 7]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.valid, np.array([[0, 1, 1, 1, 0, 0, 0]], bool))


def test_only_answers_are_predicted():
    rows = pack_documents([Encoded(np.array([10, 11, 12, 13], np.int32), first_target=2)], 8, domain=1)
    np.testing.assert_array_equal(rows.tokens, [[BOS, 10, 11, 12, 13, EOS, PAD, PAD]])
    np.testing.assert_array_equal(rows.valid, np.array([[0, 0, 1, 1, 1, 0, 0, 0]], bool))
    np.testing.assert_array_equal(rows.domain, [1])


def test_a_long_document_goes_on_with_one_token_of_context():
    pieces = list(chunks(Encoded(np.arange(10, 16, dtype=np.int32)), 4))
    assert [p.tokens.tolist() for p in pieces] == [[BOS, 10, 11, 12], [BOS, 12, 13, 14], [BOS, 14, 15, EOS]]
    assert all(p.valid.tolist() == [False, True, True, False] for p in pieces)


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=30), st.integers(3, 17)
)
@hypothesis.settings(deadline=None)
def test_every_token_but_the_first_is_a_target_exactly_once(shapes, row_length):
    lengths, starts = zip(*shapes, strict=True)
    documents = documents_of(lengths, [min(n - 1, f) for n, f in zip(lengths, starts, strict=True)])
    expected = collections.Counter()
    for d in documents:
        expected.update([*d.tokens[max(1, d.first_target) :].tolist(), EOS])
    for rows in (pack_documents(documents, row_length), rows_of_chunks(documents, row_length)):
        r, t = np.nonzero(rows.valid)
        assert collections.Counter(rows.tokens[r, t + 1].tolist()) == expected
        assert (rows.segments[r, t] == rows.segments[r, t + 1]).all() and (rows.segments[r, t] > 0).all()
        assert (rows.tokens[r, t] != BOS).all()


def slow_first_fit(documents, row_length):
    """Rows as plain lists, by trying every row in turn."""
    rows = []
    for document in documents:
        for piece in chunks(document, row_length):
            home = next((row for row in rows if sum(map(len, row)) + len(piece.tokens) <= row_length), None)
            if home is None:
                rows.append(home := [])
            home.append(piece.tokens.tolist())
    return rows


@hypothesis.given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(8, 20))
@hypothesis.settings(deadline=None)
def test_packing_equals_a_slow_first_fit(lengths, row_length):
    documents = documents_of(lengths)
    rows = pack_documents(documents, row_length)
    expected = slow_first_fit(documents, row_length)
    assert len(rows) == len(expected)
    for i, row in enumerate(expected):
        flat = [token for piece in row for token in piece]
        segments = [number for number, piece in enumerate(row, start=1) for _ in piece]
        padding = [0] * (row_length - len(flat))
        assert rows.tokens[i].tolist() == flat + padding
        assert rows.segments[i].tolist() == segments + padding


def test_one_chunk_a_row_leaves_out_shreds():
    rows = rows_of_chunks(documents_of([9, 3]), 8, shortest=6)
    assert rows.segments.sum(axis=1).tolist() == [8] and rows.segments.max() == 1
