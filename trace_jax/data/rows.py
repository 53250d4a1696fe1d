"""Rows of tokens, what every stage consumes: packing, refusals that pair with them, and which a step reads.

An index sampler maps a step to the row numbers i64 [B] that it reads. It is a pure function of (seed, step): it depends
neither on the number of devices nor on the steps before, so that resuming needs the step number and nothing else.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import struct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.pretrained import read_tokenizer
from trace_jax.config import ConfigError
from trace_jax.data.sources import Document
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.families import model_config
from trace_jax.models.model import Encoded, SpecialTokens, TextCodec, start_and_end, whole_text

IndexSampler = Callable[[int], np.ndarray]
_OPEN_ROWS = 64  # keeps packing linear in the number of documents
_OWN = SpecialTokens()  # of a tokenizer that is trained here


@struct.dataclass
class Batch:
    """Rows on their way to a device, numpy or JAX arrays.

    Example:
      >>> batch = tj.Batch(retain.tokens[:4], retain.segments[:4], retain.valid[:4])
      >>> tj.expert_statistics(model, [batch]).tokens == int(retain.valid[:4].sum())
      True
    """

    tokens: Any  # i32 [B, S]
    segments: Any  # i32 [B, S], numbers of the documents of a row from 1; 0 is padding
    valid: Any  # bool [B, S]: position t predicts token t+1 and carries loss and statistics


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows on the host.

    Example:
      >>> rows = tj.Rows.concatenate([forget, retain.take(np.arange(4))])
      >>> len(rows) == len(forget) + 4, rows.tokens.shape[1]
      (True, 32)
    """

    tokens: np.ndarray  # i32 [N, S]
    segments: np.ndarray  # i32 [N, S]; documents of a row are numbered from 1, padding is 0, whatever its token id
    # bool [N, S]; position t is valid if token t and token t+1 are real tokens of one document and token t is not the
    # start mark; for question-answer text only positions that predict answer tokens are valid
    valid: np.ndarray
    # i32 [N]. Of retain rows: 1 where the row is neighbour text (embedded benchmarks and a neighbour file say so), else
    # 0; for the domain oracle and evaluation, never for a method. Of forget rows: the row's topic, from 0
    domain: np.ndarray

    made_by: ClassVar = "pack(texts, model) makes them"  # for who gives something else

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        documents, (count, length) = self.segments.max(axis=1, initial=0).sum(), self.tokens.shape
        return f"Rows({count:,} rows x {length}, {documents:,} documents, {self.valid.sum():,} tokens to predict)"

    @property
    def digest(self) -> str:
        """Hash of what stands in the rows: what was made for some of equal size is not for these."""
        arrays = (self.tokens, self.segments, self.valid)
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]

    def take(self, indices: np.ndarray) -> "Rows":
        """The rows at `indices`, in that order."""
        return Rows(self.tokens[indices], self.segments[indices], self.valid[indices], self.domain[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows at `indices` as one batch [len(indices), S]."""
        return Batch(self.tokens[indices], self.segments[indices], self.valid[indices])

    def documents(self) -> Iterator[Encoded]:
        """Every document, or chunk of one, that has a target, with its marks; from the first on all are targets."""
        for tokens, segments, valid in zip(self.tokens, self.segments, self.valid, strict=True):
            for document in range(1, int(segments.max(initial=0)) + 1):
                inside = segments == document
                if valid[inside].any():
                    yield Encoded(tokens[inside], 1 + int(np.argmax(valid[inside])))

    @classmethod
    def concatenate(cls, parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, one after the other. Parts must share one row length."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))


# --- text as tokens


def read_codec(checkpoint: str) -> TextCodec:
    """The codec of a checkpoint, without its parameters. Raises ConfigError: it has no tokenizer.json."""
    directory, config_json = Path(checkpoint), open_checkpoint(checkpoint).config
    tokenizer, special = read_tokenizer(directory, config_json)
    if tokenizer is None:
        call = f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')"
        raise ConfigError(f"{directory / 'tokenizer.json'} is missing; transformers makes it: {call}.")
    size = model_config(config_json, dtype="float32").vocab_size
    return TextCodec(tokenizer, special, size, directory)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` entries; the same texts in the same order give the same one.

    Ids 0, 1, 2 are padding, BOS and EOS (`SpecialTokens`) and the next 256 the bytes, so that no text is lost. Whoever
    lets the tokenizer add marks gets BOS before a text, as in training.

    Example:
      >>> tj.train_tokenizer(["The council met.", "It decided nothing."], vocab_size=280).encode("It met.").tokens[0]
      '<bos>'
    """
    marks, alphabet = ["<pad>", "<bos>", "<eos>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (smallest := len(marks) + len(alphabet)):
        raise ConfigError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {smallest}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return whole_text(tokenizer, literal=True)


def encode_documents(codec: TextCodec, documents: Sequence[Document]) -> list[Encoded]:
    """Encodes documents; of a question with an answer only the answer carries loss."""
    encoded = codec.pairs([(d.text, d.answer or "") for d in documents])
    return [
        e if d.answer is not None else dataclasses.replace(e, first_target=0)
        for d, e in zip(documents, encoded, strict=True)
    ]


# --- tokens in rows


def chunks(documents: Sequence[Encoded], row_length: int, special: SpecialTokens = _OWN) -> Iterator[Encoded]:
    """Cuts start + tokens + EOS into chunks of at most `row_length` tokens with a target, each with the start mark. A
    later one repeats the last token before it as context: all but a document's first token are targets exactly once.
    """
    start_mark, end_mark = start_and_end(special)
    for document in documents:
        tokens = np.append(document.tokens, np.int32(end_mark))
        for start in range(0, max(len(tokens) - 1, 1), row_length - 2):
            chunk = np.concatenate([[np.int32(start_mark)], tokens[start : start + row_length - 1]])
            first = max(2, document.first_target - start + 1)  # the document's first token is none
            if first < len(chunk):
                yield Encoded(chunk, first)


def pack_documents(
    documents: Sequence[Encoded], row_length: int, *, domain: int = 0, special: SpecialTokens = _OWN
) -> Rows:
    """Packs the chunks of documents of one source into rows: each goes to the first open row that has room, in order.
    Row length S >= 3.
    """
    pieces = list(chunks(documents, row_length, special))
    return _fill(pieces, _first_fit([len(c.tokens) for c in pieces], row_length), row_length, domain, special.pad)


def rows_of_chunks(
    documents: Sequence[Encoded], row_length: int, *, shortest: int = 0, special: SpecialTokens = _OWN
) -> Rows:
    """One chunk a row, in document order; chunks of fewer than `shortest` tokens are left out."""
    pieces = [c for c in chunks(documents, row_length, special) if len(c.tokens) >= shortest]
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


def _fill(pieces: Sequence[Encoded], row_of: Sequence[int], row_length: int, domain: int, pad: int) -> Rows:
    count = max(row_of, default=-1) + 1
    tokens = np.full((count, row_length), pad, np.int32)
    segments, valid = np.zeros((count, row_length), np.int32), np.zeros((count, row_length), bool)
    used, documents = np.zeros(count, int), np.zeros(count, int)
    for piece, row in zip(pieces, row_of, strict=True):
        start, stop = used[row], used[row] + len(piece.tokens)
        documents[row] += 1
        tokens[row, start:stop], segments[row, start:stop] = piece.tokens, documents[row]
        valid[row, start + piece.first_target - 1 : stop - 1] = True  # the position before a target predicts it
        used[row] = stop
    return Rows(tokens, segments, valid, np.full(count, domain, np.int32))


def encode_refusals(texts: Sequence[str], tokenizer: Any, special: SpecialTokens) -> list[np.ndarray]:
    """Token ids i32 [r] of each refusal as it follows a question or a text, with the mark that ends a text."""
    if tokenizer is None:
        raise ConfigError("the objective answers with refusals, which need a tokenizer; this model has none.")
    _, end = start_and_end(special)
    encoded = tokenizer.encode_batch([f" {text.strip()}" for text in texts], add_special_tokens=False)
    return [np.array([*e.ids, end], np.int32) for e in encoded]


def with_refusals(rows: Rows, refusals: Sequence[np.ndarray], *, pad: int = 0) -> tuple[Rows, Rows]:
    """(forget rows, refusal rows) [N', S], whose rows of one number belong together: every document (chunk) gives its
    beginning, then how it goes on, and its beginning, then a refusal (ids i32 [r], taken in turn). Only what follows a
    beginning is valid: a question, or of text without one the first half.
    """
    length = rows.tokens.shape[1]
    if (longest := max(map(len, refusals))) > length // 2:
        half = f"more than half of a row of {length}; shorten it, or raise row_length"
        raise ConfigError(f"a refusal has {longest} tokens, {half}.")
    forget, refused = [], []
    for topic in np.unique(rows.domain):
        texts, answers = [], []
        for i, document in enumerate(rows.take(np.flatnonzero(rows.domain == topic)).documents()):
            tokens, first, refusal = document.tokens, document.first_target, refusals[i % len(refusals)]
            first = max(2, len(tokens) // 2) if first <= 2 else first  # no question, only the start mark
            beginning = tokens[:first][-(length - len(refusal)) :]
            texts.append(Encoded(tokens, first))
            answers.append(Encoded(np.concatenate([beginning, refusal]), len(beginning)))
        places = _first_fit([max(len(a.tokens), len(b.tokens)) for a, b in zip(texts, answers, strict=True)], length)
        forget.append(_fill(texts, places, length, int(topic), pad))
        refused.append(_fill(answers, places, length, int(topic), pad))
    return Rows.concatenate(forget), Rows.concatenate(refused)


# --- rows of a step


def epoch_sampler(num_rows: int, batch_size: int, *, seed: int) -> IndexSampler:
    """Every row once per epoch, reshuffled each epoch. A batch may span two epochs."""
    import grain  # here, because importing it takes half a second

    _check_sizes(num_rows, batch_size)
    batches = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat().batch(batch_size)
    return lambda step: np.asarray(batches[int(step)], np.int64)


def retain_sampler(num_rows: int, batch_size: int, *, seed: int, probability: np.ndarray | None = None) -> IndexSampler:
    """Rows drawn independently, with replacement, with probability [N] proportional to `probability`. Equal ones, or
    none, visit every row once per epoch: so uniform weights train exactly as no weights do.
    """
    if probability is None:
        return epoch_sampler(num_rows, batch_size, seed=seed)
    weights = np.asarray(probability, np.float64)
    if weights.shape != (num_rows,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        expected = "expected one finite, non-negative number per row, and not all zero"
        raise ValueError(f"row probabilities [{weights.size}] are given for {num_rows} rows; {expected}.")
    if np.ptp(weights) == 0:
        return epoch_sampler(num_rows, batch_size, seed=seed)
    import grain

    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]

    def draw(_: int, rng: np.random.Generator) -> np.ndarray:
        # side="right" never returns a row of probability zero.
        return np.searchsorted(cumulative, rng.random(batch_size), side="right")

    batches = grain.MapDataset.range(1).repeat().seed(seed).random_map(draw)
    return lambda step: np.asarray(batches[int(step)], np.int64)


def mixture_batches(
    train: Mapping[str, Rows], mixture: Mapping[str, float], batch_size: int, *, seed: int
) -> Callable[[int], Batch]:
    """The batch of a step: a fixed number of rows per source (`batch_counts`), each reshuffled at its own epochs."""
    if unknown := [name for name in mixture if name not in train]:
        raise ValueError(f"The mixture names {', '.join(unknown)}, but the sources are {', '.join(train)}.")
    offsets = dict(zip(train, np.cumsum([0, *map(len, train.values())])[:-1], strict=True))
    parts = [
        (offsets[name], epoch_sampler(len(train[name]), count, seed=seed + order))
        for order, (name, count) in enumerate(batch_counts(mixture, batch_size).items())
    ]
    rows = Rows.concatenate(list(train.values()))
    return lambda step: rows.batch(np.concatenate([sampler(step) + offset for offset, sampler in parts]))


def batch_counts(mixture: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Rows per source in a batch, by largest remainder of the shares; sources of share 0 are left out."""
    total = sum(mixture.values())
    if total <= 0 or min(mixture.values()) < 0:
        raise ValueError(f"The shares of a mixture must be non-negative and not all zero; given {dict(mixture)}.")
    exact = {name: batch_size * share / total for name, share in mixture.items() if share > 0}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])  # stable: ties keep the given order
    for name in by_remainder[: batch_size - sum(counts.values())]:
        counts[name] += 1
    if empty := ", ".join(name for name, count in counts.items() if not count):
        raise ValueError(f"A batch of {batch_size} rows has no room for the sources {empty}; raise batch_size.")
    return counts


def batches_of(rows: Rows | Iterable[Batch], batch_size: int, config: ModelConfig | None) -> Iterator[Batch]:
    """Rows in batches of `batch_size`; batches as they are. Raises: there is none, or one that can't be read (by the
    model of `config`, where it is known).
    """
    empty = True
    for batch in sequential_batches(rows, batch_size) if isinstance(rows, Rows) else rows:
        if not isinstance(batch, Batch):
            kind = f"a {type(batch).__name__} came where a Batch was expected"
            raise TypeError(f"{kind}; give Rows (pack(texts, model) makes them), or sequential_batches(rows, size).")
        if config is not None:
            config.check_tokens(np.asarray(batch.tokens))
        empty = False
        yield batch
    if empty:
        raise ValueError(
            "there is no batch: an iterator can be read once, and this one has been; make it anew for each pass, or "
            "give the Rows themselves."
        )


def sequential_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch may be smaller.

    Example:
      >>> [batch.tokens.shape for batch in tj.sequential_batches(retain.take(np.arange(7)), 4)]
      [(4, 32), (3, 32)]
    """
    _check_sizes(len(rows), batch_size)
    for start in range(0, len(rows), batch_size):
        yield rows.batch(np.arange(start, min(start + batch_size, len(rows))))


def _check_sizes(num_rows: int, batch_size: int) -> None:
    if num_rows < 1:
        raise ValueError("There are no rows to draw batches from.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
