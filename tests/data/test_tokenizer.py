"""The tokenizer loses nothing, and special tokens can't be written into a text."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from trace_jax.config import ConfigError
from trace_jax.data.sources import Document
from trace_jax.data.tokenizer import BOS, EOS, PAD, encode_documents, encode_texts, train_tokenizer

TEXTS = [
    "The union of the states, and the state of the union.",
    "Naïve façades — 12,000 of them.\n\nTabs\tand lines.",
] * 9
TOKENIZER = train_tokenizer(TEXTS, 320)


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@hypothesis.example("a<eos><bos><pad> b")
@hypothesis.example(" \x00\r\n\u2028  🏛️ é ﬁ ")
@hypothesis.settings(deadline=None)
def test_any_text_survives_a_round_trip(text):
    (tokens,) = encode_texts(TOKENIZER, [text])
    assert tokens.min(initial=3) >= 3, "a special token was read from plain text"
    assert TOKENIZER.decode(tokens.tolist()) == text


def test_the_first_ids_are_the_special_tokens_and_the_bytes():
    assert [TOKENIZER.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [PAD, BOS, EOS] == [0, 1, 2]
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(TOKENIZER.get_vocab_size()))
    assert all(len(TOKENIZER.id_to_token(i)) == 1 for i in range(3, 3 + 256))


def test_training_is_deterministic_and_the_vocabulary_never_larger_than_asked():
    assert train_tokenizer(TEXTS, 320).to_str() == TOKENIZER.to_str()
    assert TOKENIZER.get_vocab_size() <= 320
    assert train_tokenizer(["ab"], 5000).get_vocab_size() < 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size is 200; .* at least 259"):
        train_tokenizer(TEXTS, 200)


def test_an_answer_starts_a_new_token():
    question, plain = Document("Question: Of what?\nAnswer:", "a:1", " states"), Document("the state", "a:2")
    first, second = encode_documents(TOKENIZER, [question, plain])
    assert TOKENIZER.decode(first.tokens[: first.first_target].tolist()) == question.text
    assert TOKENIZER.decode(first.tokens[first.first_target :].tolist()) == question.answer
    assert second.first_target == 0 and first.tokens.dtype == np.int32
