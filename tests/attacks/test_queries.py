"""Queries in other forms: their layout to the token, and that no answer stands in its own query."""

import dataclasses

import numpy as np
import pytest

from tests import tiny
from trace_jax.attacks import prompting
from trace_jax.attacks.prompting import Prompting
from trace_jax.config import ConfigError
from trace_jax.data.corpora import Item, Prompts, encode_questions
from trace_jax.data.rows import pack_documents, train_tokenizer
from trace_jax.data.sources import DataError
from trace_jax.models.model import Encoded, SpecialTokens, TextCodec

TEXT = "Glue holds wood. Wax holds light. Salt melts ice."


@pytest.fixture(scope="module")
def vocabulary():
    return TextCodec(train_tokenizer([TEXT] * 3, 400), SpecialTokens(), 400)


def decoded(vocabulary, tokens):
    return vocabulary.tokenizer.decode(list(tokens), skip_special_tokens=False)


def test_the_layout_of_a_question_behind_examples(vocabulary):
    asked = Item("Wax holds", (" wood", " light"), 1, 7)
    solved = [
        Item("Salt melts", (" ice", " snow"), 0, 3),
        Item("Glue holds", (" paper", " stone"), 1, 4),
        Item("Oil holds", (" light", " ink"), 0, 5),  # would give it away
        Item("Wax melts", (" ice", " snow"), 0, 7),  # of its own group
    ]
    with pytest.raises(ConfigError, match="examples = 3: only 2 can stand before"):
        prompting.items_with_examples([asked], solved, 3, np.random.default_rng(0))
    (result,) = prompting.items_with_examples([asked], solved, 2, np.random.default_rng(0))
    assert (result.options, result.answer, result.group) == (asked.options, 1, 7)
    examples = result.prompt.split("\n\n")
    assert sorted(examples[:2]) == ["Glue holds stone", "Salt melts ice"] and examples[2:] == ["Wax holds"]
    questions = encode_questions(vocabulary, [result])
    arrays = questions.tokens[0], questions.segments[0], questions.scored[0]
    for option, tokens, segments, scored in zip(asked.options, *arrays, strict=True):
        assert decoded(vocabulary, tokens[: segments.sum()]) == f"<bos>{result.prompt}{option}"
        assert decoded(vocabulary, tokens[1:][scored[:-1]]) == option


def test_the_layout_of_a_question_behind_what_else_is_known_of_its_group():
    items = [
        Item("A lies in", (" Rome", " Oslo"), 1, 1),
        Item("A is made of", (" tin", " oak"), 0, 1),
        Item("A holds", (" tea", " ink"), 1, 1),
        Item("B lies in", (" Rome", " Oslo"), 0, 2),
    ]
    half, all_of_it = (prompting.items_with_statements(items, share) for share in (0.5, 0.75))
    prompts = "A is made of tin. A lies in", "A lies in Oslo. A is made of", "A lies in Oslo. A holds", "B lies in"
    assert tuple(item.prompt for item in half) == prompts
    assert all_of_it[2].prompt == "A lies in Oslo. A is made of tin. A holds"
    assert [dataclasses.replace(h, prompt=i.prompt) for h, i in zip(half, items, strict=True)] == items


def test_the_layout_of_a_prompt_behind_another_text():
    asked = Prompts(np.array([[1, 10, 11]]), np.array([[12, 13]]))
    others = Prompts(np.array([[1, 20, 21], [1, 10, 11]]), np.array([[22, 23], [12, 13]]))  # the second gives it away
    result = prompting.prompts_with_examples(asked, others, 1, np.random.default_rng(0), [5, 6])
    assert result.prompt.tolist() == [[1, 20, 21, 22, 23, 5, 6, 10, 11]]
    assert result.continuation.tolist() == [[12, 13]] and result.lengths.tolist() == [[9, 2]]
    with pytest.raises(ConfigError, match="examples = 2: only 1 can stand before"):
        prompting.prompts_with_examples(asked, others, 2, np.random.default_rng(0), [5, 6])


def test_a_share_of_a_chunk_is_given_and_the_rest_is_to_come():
    rows = pack_documents([Encoded(np.arange(30, 38)), Encoded(np.arange(50, 55))], 18)
    assert len(rows) == 1  # two documents in one row
    asked = Prompts(np.array([[1, 50, 51], [1, 30, 31]]), np.array([[52, 53], [32, 33]]))
    half, most = (prompting.longer_prompts(asked, rows, share, 2) for share in (0.5, 0.75))
    assert half.lengths.tolist() == [[3, 3], [5, 4]]
    assert half.prompt.tolist() == [[1, 50, 51, 0, 0], [1, 30, 31, 32, 33]]
    assert half.continuation.tolist() == [[52, 53, 54, 0], [34, 35, 36, 37]]
    assert most.unpadded(most.continuation) == [[53, 54], [36, 37]]
    for share in (1e-9, 1 - 1e-9):  # always something given and something to come
        assert prompting.longer_prompts(asked, rows, share, 2).lengths.min() >= 1


def test_paraphrases_are_cut_where_their_texts_meet(vocabulary, tmp_path):
    rows = [{"prompt": "Wax", "continuation": " holds light"}, {"question": "Salt melts", "answer": " ice.", "id": 3}]
    pairs = prompting.read_paraphrases(tiny.write_lines(tmp_path / "own.jsonl", rows))
    result = prompting.written_prompts(pairs, vocabulary)
    beginnings = [decoded(vocabulary, row[:n]) for row, n in zip(result.prompt, result.lengths[:, 0], strict=True)]
    assert beginnings == ["<bos>Wax", "<bos>Salt melts"]
    assert [decoded(vocabulary, t) for t in result.unpadded(result.continuation)] == [" holds light", " ice."]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "secret", "answer": "hidden"}, "row 2 has prompt, answer; expected the texts prompt and"),
        ({"prompt": "secret", "continuation": 3}, "row 2 has prompt, continuation; expected the texts"),
        ({"prompt": "secret", "continuation": " "}, "row 2 has an empty prompt or continuation"),
        ({"question": "", "answer": "hidden"}, "row 2 has an empty question or answer"),
    ],
)
def test_paraphrases_of_another_form_are_refused_and_not_quoted(row, message, tmp_path):
    source = tiny.write_lines(tmp_path / "own.jsonl", [{"prompt": "Wax", "continuation": " holds"}, row])
    with pytest.raises(DataError, match=message) as error:
        Prompting(paraphrases=source).check_source()
    assert "secret" not in str(error.value) and "hidden" not in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        Prompting(paraphrases=str(tmp_path / "none.jsonl")).check_source()


def test_of_a_row_only_the_continuation_is_scored():
    prompts = Prompts(np.array([[1, 7, 8], [1, 9, 0]]), np.array([[5, 0], [6, 4]]), np.array([[3, 1], [2, 2]]))
    rows = prompting.continuation_rows(prompts)
    assert rows.tokens.tolist() == [[1, 7, 8, 5], [1, 9, 6, 4]] and rows.segments.all()
    assert rows.valid.tolist() == [[False, False, True, False], [False, True, True, False]]
