"""Every forget document has its beginning in both rows of a pair; a refusal takes the place of the rest."""

import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.rows import Rows, encode_refusals, train_tokenizer, with_refusals
from trace_jax.models.model import SpecialTokens

REFUSALS = [np.array([90, 91, 2], np.int32), np.array([95, 2], np.int32)]


def rows_of(*documents, length=16, domain=0):
    """One document a row: (tokens, first valid position)."""
    tokens, segments = np.zeros((2, len(documents), length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, (ids, first) in enumerate(documents):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        valid[row, first : len(ids) - 1] = True
    return Rows(tokens, segments, valid, np.full(len(documents), domain, np.int32))


def pieces(rows):
    """[(beginning, what is predicted)] of every document, in the order of rows."""
    found = []
    for tokens, segments, valid in zip(rows.tokens, rows.segments, rows.valid, strict=True):
        for number in range(1, segments.max() + 1):
            ids, scored = tokens[segments == number], valid[segments == number]
            first = int(np.argmax(scored)) + 1
            found.append((ids[:first].tolist(), ids[1:][scored[:-1]].tolist()))
    return found


def test_a_question_begins_its_answer_and_its_refusal():
    forget, refused = with_refusals(rows_of(([1, 10, 11, 12, 20, 21, 2], 3), ([1, 13, 14, 22, 2], 2)), REFUSALS)
    assert pieces(forget) == [([1, 10, 11, 12], [20, 21, 2]), ([1, 13, 14], [22, 2])]
    assert pieces(refused) == [([1, 10, 11, 12], [90, 91, 2]), ([1, 13, 14], [95, 2])]


def test_text_without_a_question_is_cut_in_the_middle():
    forget, refused = with_refusals(rows_of(([1, 10, 11, 12, 13, 14, 15, 2], 1)), REFUSALS)
    assert pieces(forget) == [([1, 10, 11, 12], [13, 14, 15, 2])]
    assert pieces(refused) == [([1, 10, 11, 12], [90, 91, 2])]


def test_both_of_a_pair_stand_in_rows_of_one_number():
    """Short answers with long refusals, and the other way round, so that neither side alone decides what fits."""
    rng, documents = np.random.default_rng(0), []
    for i in range(40):
        question, answer = rng.integers(2, 6), rng.integers(1, 7)
        documents.append(([1, *(100 + i for _ in range(question)), *(200 + i for _ in range(answer))], question))
    forget, refused = with_refusals(rows_of(*documents), REFUSALS)
    assert len(forget) == len(refused) < 40
    for mine, other in zip(forget.tokens, refused.tokens, strict=True):
        of_pair = [set(row[(row >= 100) & (row < 200)]) for row in (mine, other)]
        assert of_pair[0] == of_pair[1]
    left = sorted(forget.tokens[(forget.tokens >= 200)].tolist())
    assert left == sorted(t for ids, _ in documents for t in ids if t >= 200), "nothing that is to be forgotten is lost"


def test_a_question_that_fills_the_row_loses_its_beginning_not_the_refusal():
    _, refused = with_refusals(rows_of(([1, *range(10, 24), 30], 14)), REFUSALS)
    assert pieces(refused)[0] == (list(range(11, 24)), [90, 91, 2])
    forget, refused = with_refusals(rows_of(([1, 10, 2], 1)), REFUSALS)  # and a single prediction stays
    assert forget.valid.sum() == 1 and refused.valid.sum() == 3
    with pytest.raises(ConfigError, match="a refusal has 9 tokens, more than half of a row of 16"):
        with_refusals(rows_of(([1, 10, 11, 20, 2], 2)), [np.arange(9, dtype=np.int32)])


def test_topics_are_not_mixed_in_a_row():
    both = Rows.concatenate([rows_of(([1, 10, 11, 20, 2], 2)), rows_of(([1, 12, 13, 21, 2], 2), domain=1)])
    forget, refused = with_refusals(both, REFUSALS)
    assert forget.domain.tolist() == refused.domain.tolist() == [0, 1]


def test_refusals_follow_like_answers_and_end_the_text():
    tokenizer = train_tokenizer(["I do not know. No."] * 3, 300)
    encoded = encode_refusals(["I do not know.", " No. "], tokenizer, SpecialTokens())
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in encoded] == [" I do not know.", " No."]
    assert all(ids[-1] == 2 and ids.dtype == np.int32 for ids in encoded)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        encode_refusals(["No."], None, SpecialTokens())
