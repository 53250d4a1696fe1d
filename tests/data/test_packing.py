"""Texts in the hand become the rows that the same texts give in a file; what can't be one is said in a sentence."""

import dataclasses

import numpy as np
import pytest

from tests import tiny
from trace_jax.config import ConfigError
from trace_jax.data.rows import train_tokenizer
from trace_jax.data.sources import DataError
from trace_jax.data.text import pack, read_rows
from trace_jax.models.model import SpecialTokens

TEXTS = ["The council met.", ("Who decided?", "The council."), "It decided nothing, and met again in winter."]
TOKENIZER = train_tokenizer([], 300)
MODEL = tiny.make_model(dataclasses.replace(tiny.CONFIG, vocab_size=300)).replace(tokenizer=TOKENIZER)


def assert_same(one, other):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_a_list_of_texts_and_pairs_gives_the_rows_of_the_file_that_holds_them(tmp_path):
    lines = [{"text": t} if isinstance(t, str) else {"question": t[0], "answer": t[1]} for t in TEXTS]
    path = tiny.write_lines(tmp_path / "all.jsonl", [*lines, {"text": " short "}])
    rows = pack(TEXTS, MODEL, row_length=64)
    assert_same(rows, read_rows(path, MODEL, row_length=64, min_length=6))
    assert_same(rows, pack(iter(TEXTS), TOKENIZER, row_length=64))
    targets = {TOKENIZER.decode(d.tokens[d.first_target :]) for d in rows.documents()}
    assert targets == {TEXTS[0][1:], " The council.", TEXTS[2][1:]}, "of a question the answer alone"


@pytest.mark.parametrize(
    ("texts", "model", "options", "message"),
    [
        ([], MODEL, {}, "texts is empty; expected"),
        (["a", " "], MODEL, {}, r"^texts\[1\]: text is empty"),
        (["a", float("nan")], MODEL, {}, r"^texts\[1\] is nan; expected text, or a pair"),
        ([("q",)], MODEL, {}, r"^texts\[0\] is \('q',\); expected text, or a pair"),
        ([("q", None)], MODEL, {}, r"^texts\[0\]: answer is a NoneType; expected text"),
        (["a"], MODEL, {"row_length": 4}, "row_length is 4; expected at least 8"),
        (["a"], tiny.make_model(), {}, "the model has no tokenizer"),
        (["a"], MODEL, {"special": SpecialTokens()}, "the model, which has its own|with a model"),
        (["a"], tiny.make_tokenizer(), {}, r"no marks of this tokenizer \(it has none\)"),
        (["a"], TOKENIZER, {"special": SpecialTokens(eos=(900,))}, "gives the id 900, but the model knows 259 tokens"),
    ],
)
def test_what_gives_no_rows_is_answered_in_a_sentence(texts, model, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        pack(texts, model, **options)
