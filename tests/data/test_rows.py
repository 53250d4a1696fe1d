"""Tokens lose no text, rows hold each once as a target, refusals pair with them, and a step fixes its rows."""

import collections
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from trace_jax.config import ConfigError
from trace_jax.data import rows as module
from trace_jax.data.rows import Rows, epoch_sampler, pack_documents, retain_sampler, train_tokenizer, with_refusals
from trace_jax.data.sources import Document
from trace_jax.models.model import Encoded, SpecialTokens, TextCodec, start_and_end

PAD, BOS, EOS = 0, 1, 2
OWN = SpecialTokens()


# --- text as tokens

TEXTS = ["The union of the states, and the state of the union.", "Naïve façades — 12,000 of them.\n\nTabs\t."] * 9
TOKENIZER = train_tokenizer(TEXTS, 320)


def encoded(document, tokenizer=TOKENIZER, special=OWN, size=320):
    return module.encode_documents(TextCodec(tokenizer, special, size), [document])[0]


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@hypothesis.example("a<eos><bos><pad> b")
@hypothesis.example(" \x00\r\n\u2028  🏛️ é ﬁ ")
@hypothesis.settings(deadline=None)
def test_any_text_survives_a_round_trip(text):
    tokens = encoded(Document(text, "a:1")).tokens
    assert tokens.min(initial=3) >= 3, "a special token was read from plain text"
    assert TOKENIZER.decode(tokens.tolist()) == text


def test_a_vocabulary_starts_with_special_tokens_and_bytes_and_is_never_larger_than_asked():
    assert [TOKENIZER.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [PAD, BOS, EOS]
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(TOKENIZER.get_vocab_size()))
    assert all(len(TOKENIZER.id_to_token(i)) == 1 for i in range(3, 3 + 256))
    assert train_tokenizer(TEXTS, 320).to_str() == TOKENIZER.to_str(), "training is deterministic"
    assert TOKENIZER.get_vocab_size() <= 320 and train_tokenizer(["ab"], 5000).get_vocab_size() < 300
    with pytest.raises(ConfigError, match=r"vocab_size is 200; .* at least 259"):
        train_tokenizer(TEXTS, 200)


def test_an_answer_starts_a_new_token():
    question = Document("Question: Of what?\nAnswer:", "a:1", " states")
    first, second = encoded(question), encoded(Document("the state", "a:2"))
    assert TOKENIZER.decode(first.tokens[: first.first_target].tolist()) == question.text
    assert TOKENIZER.decode(first.tokens[first.first_target :].tolist()) == question.answer
    assert second.first_target == 0 and first.tokens.dtype == np.int32


def test_a_question_reads_like_running_text_with_a_tokenizer_that_marks_beginnings():
    """Metaspace tokenizers put a space before every text they are given; an answer alone would get a second one."""
    words = {"▁Who": 0, "?": 1, "▁Polk": 2, "▁": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    question = encoded(Document("Who?", "a:1", " Polk"), tokenizer, size=5)
    assert (question.tokens.tolist(), question.first_target) == ([0, 1, 2], 2)


@pytest.mark.parametrize(("special", "size", "largest"), [(OWN, 100, r"\d+"), (SpecialTokens(700), 320, "700")])
def test_a_tokenizer_of_another_model_is_refused(special, size, largest):
    with pytest.raises(ConfigError, match=f"gives the id {largest}, but the model knows {size} tokens"):
        encoded(Document("the union", "a:1"), special=special, size=size)


def test_settings_of_a_checkpoints_tokenizer_do_not_cut_or_fill_a_text():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokens = encoded(Document("the union<eos>", "a:1"), tokenizer).tokens
    assert tokenizer.decode(tokens.tolist()) == "the union<eos>"


def test_a_text_starts_with_the_first_end_where_there_is_no_beginning():
    assert start_and_end(SpecialTokens(bos=5, eos=(7, 8))) == (5, 7)
    assert start_and_end(SpecialTokens(bos=None, eos=(7, 8))) == (7, 7)
    with pytest.raises(ConfigError, match="no end of text"):
        start_and_end(SpecialTokens(bos=5, eos=()))


# --- tokens in rows


def documents_of(lengths, first_targets=None):
    """Documents whose tokens are all different, so that each can be found again."""
    stops = zip(10 + np.cumsum(lengths), lengths, first_targets or [0] * len(lengths), strict=True)
    return [Encoded(np.arange(stop - n, stop, dtype=np.int32), first) for stop, n, first in stops]


@pytest.mark.parametrize(
    ("special", "document", "tokens", "valid"),
    [
        # Neither BOS nor the last token of a document predicts; the token before EOS does.
        (OWN, Encoded(np.array([10, 11])), [BOS, 10, 11, EOS, PAD, PAD], [0, 1, 1, 0, 0, 0]),
        # Without a beginning mark the first end starts a document, and padding may look like it.
        (SpecialTokens(None, (7, 8), 7), Encoded(np.array([10, 7])), [7, 10, 7, 7, 7, 7], [0, 1, 1, 0, 0, 0]),
        # Only the answer is predicted.
        (OWN, Encoded(np.arange(10, 14), 2), [BOS, 10, 11, 12, 13, EOS], [0, 0, 1, 1, 1, 0]),
    ],
)
def test_a_row_by_hand(special, document, tokens, valid):
    rows = pack_documents([document, Encoded(np.array([20]))], 6, domain=1, special=special)
    assert rows.tokens.tolist() == [tokens, [tokens[0], 20, special.eos[0], *[special.pad] * 3]]
    length = len(document.tokens) + 2
    assert rows.segments.tolist() == [[1] * length + [0] * (6 - length), [1, 1, 1, 0, 0, 0]]
    assert rows.valid.tolist() == [list(map(bool, valid)), [False, True, False, False, False, False]]
    assert {x.dtype for x in (rows.tokens, rows.segments, rows.domain)} == {np.dtype(np.int32)}
    assert rows.domain.tolist() == [1, 1]


def test_a_long_document_goes_on_with_one_token_of_context():
    pieces = [(p.tokens.tolist(), p.first_target) for p in module.chunks(documents_of([6]), 4)]
    assert pieces == [([BOS, 10, 11, 12], 2), ([BOS, 12, 13, 14], 2), ([BOS, 14, 15, EOS], 2)]
    rows = module.rows_of_chunks(documents_of([9, 3]), 8, shortest=6)  # one a row, without shreds
    assert rows.segments.sum(axis=1).tolist() == [8] and rows.segments.max() == 1


SHAPES = st.tuples(st.integers(1, 40), st.integers(0, 9)).map(lambda shape: (shape[0], min(shape[0] - 1, shape[1])))


@hypothesis.given(st.lists(SHAPES, min_size=1, max_size=30), st.integers(3, 17))
@hypothesis.settings(deadline=None)
def test_every_token_but_the_first_is_a_target_exactly_once(shapes, row_length):
    documents = documents_of(*zip(*shapes, strict=True))
    expected = collections.Counter()
    for d in documents:
        expected.update([*d.tokens[max(1, d.first_target) :].tolist(), EOS])
    for rows in (pack_documents(documents, row_length), module.rows_of_chunks(documents, row_length)):
        r, t = np.nonzero(rows.valid)
        assert collections.Counter(rows.tokens[r, t + 1].tolist()) == expected
        assert (rows.segments[r, t] == rows.segments[r, t + 1]).all() and (rows.segments[r, t] > 0).all()
        assert (rows.tokens[r, t] != BOS).all()


@hypothesis.given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(8, 20))
@hypothesis.settings(deadline=None)
def test_packing_equals_a_slow_first_fit(lengths, row_length):
    documents, expected = documents_of(lengths), []
    for piece in module.chunks(documents, row_length):
        home = next((row for row in expected if sum(map(len, row)) + len(piece.tokens) <= row_length), None)
        if home is None:
            expected.append(home := [])
        home.append(piece.tokens.tolist())
    rows = pack_documents(documents, row_length)
    for tokens, segments, row in zip(rows.tokens, rows.segments, expected, strict=True):
        flat = [token for piece in row for token in piece]
        padding = [0] * (row_length - len(flat))
        assert tokens.tolist() == flat + padding
        assert segments.tolist() == [n for n, piece in enumerate(row, start=1) for _ in piece] + padding


# --- refusals

REFUSALS = [np.array([90, 91, 2], np.int32), np.array([95, 2], np.int32)]


def asked(*documents, length=16, domain=0):
    """One document a row: (tokens, first valid position)."""
    tokens, segments = np.zeros((2, len(documents), length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, (ids, first) in enumerate(documents):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        valid[row, first : len(ids) - 1] = True
    return Rows(tokens, segments, valid, np.full(len(documents), domain, np.int32))


def pieces(rows):
    """[(beginning, what is predicted)] of every document, in the order of rows."""
    split = [(d.tokens.tolist(), d.first_target) for d in rows.documents()]
    assert rows.valid.sum() == sum(len(tokens) - first for tokens, first in split)
    return [(tokens[:first], tokens[first:]) for tokens, first in split]


@pytest.mark.parametrize(
    ("documents", "forgotten", "answered"),
    [
        (  # a question begins its answer and its refusal
            [([1, 10, 11, 12, 20, 21, 2], 3), ([1, 13, 14, 22, 2], 2)],
            [([1, 10, 11, 12], [20, 21, 2]), ([1, 13, 14], [22, 2])],
            [([1, 10, 11, 12], [90, 91, 2]), ([1, 13, 14], [95, 2])],
        ),
        (  # text without a question is cut in the middle
            [([1, 10, 11, 12, 13, 14, 15, 2], 1)],
            [([1, 10, 11, 12], [13, 14, 15, 2])],
            [([1, 10, 11, 12], [90, 91, 2])],
        ),
        (  # a question that fills the row loses its beginning, not the refusal
            [([1, *range(10, 24), 30], 14)],
            [([1, *range(10, 24)], [30])],
            [(list(range(11, 24)), [90, 91, 2])],
        ),
        ([([1, 10, 2], 1)], [([1, 10], [2])], [([1, 10], [90, 91, 2])]),  # a single prediction stays
    ],
)
def test_a_beginning_stands_in_both_rows_of_a_pair(documents, forgotten, answered):
    forget, refused = with_refusals(asked(*documents), REFUSALS)
    assert pieces(forget) == forgotten and pieces(refused) == answered


def test_both_of_a_pair_stand_in_rows_of_one_number():
    """Short answers with long refusals, and the other way round, so that neither side alone decides what fits."""
    sizes = enumerate(np.random.default_rng(0).integers([2, 1], [6, 7], (40, 2)))
    documents = [([1, *[100 + i] * q, *[200 + i] * a], q) for i, (q, a) in sizes]
    forget, refused = with_refusals(asked(*documents), REFUSALS)
    assert len(forget) == len(refused) < 40
    for mine, other in zip(forget.tokens, refused.tokens, strict=True):
        of_pair = [set(row[(row >= 100) & (row < 200)]) for row in (mine, other)]
        assert of_pair[0] == of_pair[1]
    left = sorted(forget.tokens[(forget.tokens >= 200)].tolist())
    assert left == sorted(t for ids, _ in documents for t in ids if t >= 200), "nothing that is to be forgotten is lost"
    both = Rows.concatenate([asked(([1, 10, 11, 20, 2], 2)), asked(([1, 12, 13, 21, 2], 2), domain=1)])
    for rows in with_refusals(both, REFUSALS):  # topics are not mixed in a row
        assert rows.domain.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="a refusal has 9 tokens, more than half of a row of 16"):
        with_refusals(both, [np.arange(9, dtype=np.int32)])


def test_refusals_follow_like_answers_and_end_the_text():
    tokenizer = train_tokenizer(["I do not know. No."] * 3, 300)
    encoded = module.encode_refusals(["I do not know.", " No. "], tokenizer, OWN)
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in encoded] == [" I do not know.", " No."]
    assert all(ids[-1] == 2 and ids.dtype == np.int32 for ids in encoded)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        module.encode_refusals(["No."], None, OWN)


# --- rows of a step


def rows_of(count, first=0, length=4):
    tokens = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], length, axis=1)
    return Rows(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool), np.zeros(count, np.int32))


SHARES = {"forget": 0.25, "neighbour": 0.25, "general": 0.5}
TRAIN = {"general": rows_of(30), "neighbour": rows_of(6, first=100), "forget": rows_of(4, first=200)}


def mixed(seed=1):
    batch_at = module.mixture_batches(TRAIN, SHARES, 8, seed=seed)
    return lambda step: batch_at(step).tokens[:, 0]


SAMPLERS = {
    "epochs": lambda: epoch_sampler(11, 4, seed=3),
    "weighted": lambda: retain_sampler(11, 4, seed=3, probability=np.arange(11) / 55),
    "mixture": mixed,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_resuming_at_a_step_gives_the_rows_of_an_unbroken_run(name):
    unbroken, resumed = SAMPLERS[name](), SAMPLERS[name]()
    run = [unbroken(step) for step in range(12)]
    for step in (7, 8, 11, 2):
        np.testing.assert_array_equal(resumed(step), run[step])
    assert any((a != b).any() for a, b in itertools.pairwise(run))


def test_an_epoch_visits_every_row_once_and_the_next_one_in_another_order():
    sampler = epoch_sampler(12, 5, seed=0)
    drawn = np.concatenate([sampler(step) for step in range(24)]).reshape(-1, 12)
    assert drawn.dtype == np.int64 and (np.sort(drawn, axis=1) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in drawn}) == len(drawn)
    assert (epoch_sampler(50, 20, seed=0)(0) != epoch_sampler(50, 20, seed=1)(0)).any()
    assert collections.Counter(epoch_sampler(3, 7, seed=0)(0).tolist()).most_common(1)[0][1] == 3


def test_rows_are_drawn_as_often_as_asked():
    probability = np.array([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    sampler = retain_sampler(6, 64, seed=5, probability=7.0 * probability)
    drawn = np.bincount(np.concatenate([sampler(s) for s in range(200)]), minlength=6)
    total = drawn.sum()
    error = np.sqrt(probability * (1 - probability) / total)
    assert (np.abs(drawn / total - probability) <= 4 * error).all()
    assert drawn[1] == drawn[5] == 0
    plain, equal = (retain_sampler(9, 4, seed=2, probability=p) for p in (None, np.full(9, 1 / 9)))
    assert all((plain(s) == equal(s)).all() for s in range(9)), "equal probabilities draw exactly as none"


def test_counts_by_largest_remainder():
    counts = module.batch_counts({"general": 0.50, "neighbour": 0.32, "forget": 0.18}, 32)
    assert counts == {"general": 16, "neighbour": 10, "forget": 6}
    assert module.batch_counts({"a": 1, "b": 1, "c": 1}, 7) == {"a": 3, "b": 2, "c": 2}
    assert module.batch_counts({"a": 3.0, "b": 0.0, "c": 1.0}, 8) == {"a": 6, "c": 2}


def test_every_batch_has_the_mixture_and_every_source_its_own_epochs():
    rows_at = mixed()
    seen = np.concatenate([rows_at(step) for step in range(30)]).reshape(30, 8)
    assert (np.sort(seen // 100, axis=1) == [0, 0, 0, 0, 1, 1, 2, 2]).all()
    neighbours = seen[seen // 100 == 1].reshape(-1, 6)
    assert (np.sort(neighbours, axis=1) == np.arange(100, 106)).all()
    assert len({tuple(epoch) for epoch in neighbours}) > 1


def test_a_pass_over_the_rows_sees_each_once_and_in_order():
    batches = list(module.sequential_batches(rows_of(7, first=1), 3))
    assert [b.tokens.shape for b in batches] == [(3, 4), (3, 4), (1, 4)]
    assert np.concatenate([b.tokens[:, 0] for b in batches]).tolist() == list(range(1, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: epoch_sampler(0, 4, seed=0), "no rows"),
        (lambda: epoch_sampler(4, 0, seed=0), "batch_size is 0"),
        (lambda: retain_sampler(2, 2, seed=0, probability=np.array([1.0, -1.0])), "non-negative"),
        (lambda: retain_sampler(2, 2, seed=0, probability=np.array([1.0, np.nan])), "finite"),
        (lambda: retain_sampler(3, 2, seed=0, probability=np.zeros(3)), "not all zero"),
        (lambda: retain_sampler(3, 2, seed=0, probability=np.ones(4)), r"probabilities \[4\] are given for 3 rows"),
        (lambda: module.batch_counts({"a": 0.99, "b": 0.01}, 4), "batch of 4 rows has no room for the sources b"),
        (lambda: module.batch_counts({"a": -1.0, "b": 2.0}, 4), "non-negative"),
        (lambda: module.mixture_batches({"a": rows_of(2)}, {"b": 1.0}, 4, seed=0), "names b, but the sources are a"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
