"""Rows of tokens, what every stage consumes: documents encoded and packed into them, refusals paired with them."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import struct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.pretrained import read_tokenizer, special_tokens
from trace_jax.config import ConfigError
from trace_jax.data.sources import Document
from trace_jax.models.families import model_config
from trace_jax.models.model import Encoded, SpecialTokens, TextCodec, start_and_end, whole_text

_OPEN_ROWS = 64  # keeps packing linear in the number of documents
_OWN = SpecialTokens()  # of a tokenizer that is trained here
PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


@struct.dataclass
class Batch:
    """Rows on their way to a device, numpy or JAX arrays.

    `segments` numbers the documents of a row from 1; 0 is padding.
    """

    tokens: Any  # i32 [B, S]
    segments: Any  # i32 [B, S]
    valid: Any  # bool [B, S]: position t predicts token t+1 and carries loss and statistics


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows on the host."""

    tokens: np.ndarray  # i32 [N, S]
    segments: np.ndarray  # i32 [N, S]; documents of a row are numbered from 1, padding is 0, whatever its token id
    # bool [N, S]; position t is valid if token t and token t+1 are real tokens of one document and token t is not the
    # start mark; for question-answer text only positions that predict answer tokens are valid
    valid: np.ndarray
    # i32 [N]. Of retain rows: 1 where the row is neighbour text (embedded benchmarks and a neighbour file say so), else
    # 0; for the domain oracle and evaluation, never for a method. Of forget rows: the row's topic, from 0
    domain: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: np.ndarray) -> "Rows":
        """The rows at `indices`, in that order."""
        return Rows(self.tokens[indices], self.segments[indices], self.valid[indices], self.domain[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows at `indices` as one batch [len(indices), S]."""
        return Batch(self.tokens[indices], self.segments[indices], self.valid[indices])

    @classmethod
    def concatenate(cls, parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, one after the other. Parts must share one row length."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))


# --- text as tokens


def read_codec(checkpoint: str) -> TextCodec:
    """The codec of a checkpoint, without its parameters.

    Raises:
      ConfigError: it has no tokenizer.json.
      CheckpointError: it is no checkpoint.
    """
    directory, config_json = Path(checkpoint), open_checkpoint(checkpoint).config
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        raise ConfigError(
            f"{directory / 'tokenizer.json'} is missing; it is the tokenizer in the form that every model can be read "
            f"in. transformers makes it: AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')."
        )
    size = model_config(config_json, dtype="float32").vocab_size
    return TextCodec(tokenizer, special_tokens(directory, config_json), size, directory)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same vocabulary.

    Ids 0, 1, 2 are padding, BOS and EOS and the next 256 the bytes, so that every text can be encoded and decoded
    without loss. The vocabulary is smaller than `vocab_size` where the texts hold too few different words. Whoever
    lets the tokenizer add marks gets BOS before a text, as in training.

    Raises:
      ConfigError: `vocab_size` has no room for the bytes and the special tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {smallest}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, BOS)])
    return whole_text(tokenizer, literal=True)


def encode_documents(codec: TextCodec, documents: Sequence[Document]) -> list[Encoded]:
    """Encodes documents; of a question with an answer only the answer carries loss."""
    encoded = codec.pairs([(d.text, d.answer or "") for d in documents])
    return [
        e if d.answer is not None else dataclasses.replace(e, first_target=0)
        for d, e in zip(documents, encoded, strict=True)
    ]


# --- tokens in rows


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a document that fits a row: tokens i32 [n] (the first is the start mark), valid bool [n]."""

    tokens: np.ndarray
    valid: np.ndarray


def chunks(document: Encoded, row_length: int, special: SpecialTokens = _OWN) -> Iterator[Chunk]:
    """Cuts start + tokens + EOS into chunks of at most `row_length` tokens, each with the start mark (`start_and_end`).

    A later chunk repeats the last token of the one before as context. So every token of a document but its first,
    EOS included, is a target exactly once: at the valid position just before it.
    """
    start_mark, end_mark = start_and_end(special)
    tokens = np.append(document.tokens, np.int32(end_mark))
    span = row_length - 1
    for start in range(0, max(len(tokens) - 1, 1), span - 1):
        piece = tokens[start : start + span]
        valid = np.zeros(len(piece) + 1, bool)
        # Position 1 + i holds token start + i and predicts start + i + 1; the last position predicts nothing.
        valid[1:-1] = np.arange(start + 1, start + len(piece)) >= document.first_target
        yield Chunk(np.concatenate([[np.int32(start_mark)], piece]), valid)


def pack_documents(
    documents: Sequence[Encoded], row_length: int, *, domain: int = 0, special: SpecialTokens = _OWN
) -> Rows:
    """Packs the chunks of documents of one source into rows: each chunk goes to the first open row that has room.

    Rows stand in the order in which they were opened, documents inside a row in their own order.

    Args:
      documents: encoded documents, none empty.
      row_length: tokens per row, S >= 3.
      domain: `Rows.domain` of every row.
      special: the tokenizer's marks.
    """
    pieces = [c for d in documents for c in chunks(d, row_length, special) if c.valid.any()]
    places = _first_fit([len(c.tokens) for c in pieces], row_length)
    return _fill(pieces, places, row_length, domain, special.pad)


def rows_of_chunks(
    documents: Sequence[Encoded], row_length: int, *, shortest: int = 0, special: SpecialTokens = _OWN
) -> Rows:
    """One chunk a row, in document order; chunks of fewer than `shortest` tokens are left out."""
    pieces = [c for d in documents for c in chunks(d, row_length, special)]
    pieces = [c for c in pieces if c.valid.any() and len(c.tokens) >= shortest]
    return _fill(pieces, range(len(pieces)), row_length, 0, special.pad)


def _first_fit(lengths: Sequence[int], row_length: int) -> list[int]:
    """Row number of each length. Rows too full for the shortest length are closed, and the oldest of too many."""
    smallest = min(lengths, default=0)
    room: dict[int, int] = {}  # open rows in order of opening
    rows, opened = [], 0
    for length in lengths:
        row = next((r for r, free in room.items() if free >= length), None)
        if row is None:
            if len(room) == _OPEN_ROWS:
                del room[next(iter(room))]
            row, opened = opened, opened + 1
            room[row] = row_length
        room[row] -= length
        if room[row] < smallest:
            del room[row]
        rows.append(row)
    return rows


def _fill(pieces: Sequence[Chunk], row_of: Sequence[int], row_length: int, domain: int, pad: int) -> Rows:
    count = max(row_of, default=-1) + 1
    tokens = np.full((count, row_length), pad, np.int32)
    segments = np.zeros((count, row_length), np.int32)
    valid = np.zeros((count, row_length), bool)
    used, documents = np.zeros(count, int), np.zeros(count, int)
    for piece, row in zip(pieces, row_of, strict=True):
        place = slice(used[row], used[row] + len(piece.tokens))
        documents[row] += 1
        tokens[row, place], valid[row, place], segments[row, place] = piece.tokens, piece.valid, documents[row]
        used[row] = place.stop
    return Rows(tokens, segments, valid, np.full(count, domain, np.int32))


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
    """
    length = rows.tokens.shape[1]
    if (longest := max(map(len, refusals))) > length // 2:
        raise ConfigError(
            f"a refusal has {longest} tokens, more than half of a row of {length}; shorten it, or raise row_length."
        )
    forget, refused = [], []
    for topic in np.unique(rows.domain):
        pieces = _pieces(rows.take(np.flatnonzero(rows.domain == topic)))
        pairs = [_pair(piece, refusals[i % len(refusals)], length) for i, piece in enumerate(pieces)]
        places = _first_fit([max(len(a.tokens), len(b.tokens)) for a, b in pairs], length)
        for side, packed in enumerate((forget, refused)):
            packed.append(_fill([pair[side] for pair in pairs], places, length, int(topic), pad))
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
