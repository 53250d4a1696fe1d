"""The user's text as rows: a list of texts, or whatever source of documents there is, in the tokens of a model."""

import os
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from trace_jax.config import ConfigError
from trace_jax.data.rows import Rows, encode_documents, pack_documents
from trace_jax.data.sources import DataError, Document, document_of, read_source
from trace_jax.models.model import Model, SpecialTokens, TextCodec

SHORTEST_ROW = 8  # tokens
_OWN = SpecialTokens()  # of `train_tokenizer`


def pack(
    texts: Iterable[str | tuple[str, str]], model: Model | Tokenizer, *, row_length: int = 256,
    special: SpecialTokens | None = None,
) -> Rows:  # fmt: skip
    """Texts as rows of tokens, for statistics, calibration and unlearning.

    Args:
      texts: each a document, or a pair (question, answer), which is read as "Question: Q", a new line and "Answer: A";
        only the answer carries loss and statistics.
      model: whose tokens these will be; or a tokenizer alone.
      row_length: tokens per row, S. Short documents share a row and do not see each other; long ones are cut.
      special: ids of the marks around a text, of a tokenizer alone; default: those of `train_tokenizer`.

    Raises:
      DataError: a text that is empty, or none; which one it is, is said.
      ConfigError: a model without a tokenizer, marks that the tokenizer doesn't have, a row length below 8.

    Example:
      >>> rows = tj.pack(["The council met.", ("Who decided?", "The council.")], model, row_length=128)
      >>> rows.tokens.shape
      (1, 128)
    """
    documents = [document_of(_item(text, f"texts[{i}]"), f"texts[{i}]") for i, text in enumerate(texts)]
    if not documents:
        raise DataError("texts is empty; expected a list of texts, or of pairs (question, answer).")
    return rows_of_documents(_codec(model, special), documents, row_length)


def read_rows(
    path: str | os.PathLike, model: Model | Tokenizer, *, row_length: int = 256,
    special: SpecialTokens | None = None, min_length: int = 0,
) -> Rows:  # fmt: skip
    """`pack` of the documents at a path: what `trace_jax.data.sources.read_source` reads.

    Args:
      path: a JSONL file (a line is {"text"} or {"question", "answer"}), a text file, a directory of such files, or a
        data set "huggingface:NAME[/CONFIG][:SPLIT]" or "tfds:NAME[/CONFIG][:SPLIT]".
      min_length: texts of fewer characters are left out, such as the empty lines of wikitext.

    Raises:
      DataError: a source that can't be read; file and line are named.

    Example:
      >>> with open("notes.txt", "w") as file:
      ...     _ = file.write("The harbour was closed in winter.")
      >>> len(tj.read_rows("notes.txt", model, row_length=64))
      1
    """
    codec = _codec(model, special)
    return rows_of_documents(codec, read_source(os.fspath(path), min_length=min_length)[0], row_length)


def rows_of_documents(codec: TextCodec, documents: Sequence[Document], row_length: int) -> Rows:
    """The documents of one source, encoded and packed."""
    if row_length < SHORTEST_ROW:
        raise ConfigError(f"row_length is {row_length}; expected at least {SHORTEST_ROW} (tokens per row).")
    rows = pack_documents(encode_documents(codec, documents), row_length, special=codec.special)
    if not len(rows):
        raise DataError(f"{documents[0].origin}: no token of the text can be predicted; give more text.")
    return rows


def _codec(model: Model | Tokenizer, special: SpecialTokens | None) -> TextCodec:
    """How a model, or a tokenizer alone, reads text."""
    if isinstance(model, Model):
        if special is not None:
            raise ConfigError("special is given with a model, which has its own marks (model.special); leave it out.")
        return TextCodec.of(model)
    if special is None and not {_OWN.bos, *_OWN.eos} <= (marks := model.get_added_tokens_decoder()).keys():
        named = ", ".join(f"{id} {mark.content!r}" for id, mark in sorted(marks.items())[:8]) or "none"
        there = f"the ids 1 and 2 are no marks of this tokenizer (it has {named})"
        raise ConfigError(f"{there}; name those around a text: special=SpecialTokens(bos=..., eos=(...,), pad=...).")
    return TextCodec(model, special or _OWN, 1 + max(model.get_vocab().values(), default=0))


def _item(text: Any, origin: str) -> dict[str, Any]:
    """A text, or a question with its answer, as a line of a JSONL file has it."""
    if isinstance(text, str):
        return {"text": text}
    if not isinstance(text, (tuple, list)) or len(text) != 2:
        raise DataError(f"{origin} is {reprlib.repr(text)}; expected text, or a pair (question, answer).")
    return dict(zip(("question", "answer"), text, strict=True))
