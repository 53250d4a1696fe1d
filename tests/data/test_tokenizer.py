"""The tokenizer loses nothing, and special tokens can't be written into a text."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from trace_jax.config import ConfigError
from trace_jax.data.rows import encode_documents, train_tokenizer
from trace_jax.data.sources import Document
from trace_jax.models.model import SpecialTokens, TextCodec, start_and_end

TEXTS = [
    "The union of the states, and the state of the union.",
    "Naïve façades — 12,000 of them.\n\nTabs\tand lines.",
] * 9
TOKENIZER = train_tokenizer(TEXTS, 320)
CODEC = TextCodec(TOKENIZER, SpecialTokens(), 320)


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@hypothesis.example("a<eos><bos><pad> b")
@hypothesis.example(" \x00\r\n\u2028  🏛️ é ﬁ ")
@hypothesis.settings(deadline=None)
def test_any_text_survives_a_round_trip(text):
    (encoded,) = encode_documents(CODEC, [Document(text, "a:1")])
    tokens = encoded.tokens
    assert tokens.min(initial=3) >= 3, "a special token was read from plain text"
    assert TOKENIZER.decode(tokens.tolist()) == text


def test_the_first_ids_are_the_special_tokens_and_the_bytes():
    assert [TOKENIZER.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
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
    first, second = encode_documents(CODEC, [question, plain])
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
    (encoded,) = encode_documents(TextCodec(tokenizer, SpecialTokens(), 5), [Document("Who?", "a:1", " Polk")])
    assert (encoded.tokens.tolist(), encoded.first_target) == ([0, 1, 2], 2)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ConfigError, match=r"gives the id \d+, but the model knows 100 tokens"):
        encode_documents(TextCodec(TOKENIZER, SpecialTokens(), 100), [Document("the union", "a:1")])
    with pytest.raises(ConfigError, match=r"gives the id 700, but the model knows 320 tokens"):
        encode_documents(TextCodec(TOKENIZER, SpecialTokens(bos=700), 320), [Document("the union", "a:1")])


def test_settings_of_a_checkpoints_tokenizer_do_not_cut_or_fill_a_text():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    (encoded,) = encode_documents(TextCodec(tokenizer, SpecialTokens(), 320), [Document("the union<eos>", "a:1")])
    assert tokenizer.decode(encoded.tokens.tolist()) == "the union<eos>"


def test_a_text_starts_with_the_first_end_where_there_is_no_beginning():
    assert start_and_end(SpecialTokens(bos=5, eos=(7, 8))) == (5, 7)
    assert start_and_end(SpecialTokens(bos=None, eos=(7, 8))) == (7, 7)
    with pytest.raises(ConfigError, match="no end of text"):
        start_and_end(SpecialTokens(bos=5, eos=()))
