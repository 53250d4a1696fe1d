"""From a benchmark's documents and questions to everything a run reads: rows to train on, and what is measured on."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trace_jax.config import ConfigError, Variant, option
from trace_jax.data.rows import Rows, encode_documents, pack_documents, rows_of_chunks, train_tokenizer
from trace_jax.data.sources import DataError, Document, overlap
from trace_jax.data.text import SHORTEST_ROW, rows_of_documents
from trace_jax.models.model import Encoded, SpecialTokens, TextCodec, start_and_end
from trace_jax.models.sharding import pad

_SHORTEST = 16  # tokens of a text for membership inference


class DataConfig(Variant, kw_only=True):
    """Settings of the corpora. Each benchmark of `trace_jax.tasks` is a kind, with settings of its own.

    Example:
      >>> config = tj.DataConfig.kinds["text"](forget="forget.jsonl", retain="retain.jsonl", row_length=256)
      >>> config.forget_sources
      ('forget.jsonl',)
    """

    row_length: int = option(128, help="tokens per row, S", minimum=SHORTEST_ROW)
    vocab_size: int | None = option(None, help="entries of the BPE that is trained; else the model's", minimum=300)
    seed: int = option(0, help="seed of generated text, of splits and of batch order", minimum=0)

    tag = "benchmark"
    forgotten: ClassVar[str]  # what is, for titles
    board: ClassVar[Any]  # what counts as forgetting and as utility (`trace_jax.evaluation.task.Scoreboard`)

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """Settings of other benchmarks may be there as None, as in files of earlier runs."""
        if isinstance(value, Mapping) and value.get(cls.tag) in cls.kinds:
            own = {field.name for field in dataclasses.fields(cls.kinds[value[cls.tag]])} | {cls.tag}
            value = {key: item for key, item in value.items() if item is not None or key in own}
        return value

    @property
    def forget_sources(self) -> tuple[str, ...]:
        """Where each forget topic is read from; of an embedded benchmark nowhere."""
        return ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read, wherever it is read from."""
        return ()

    def located(self) -> "DataConfig":
        """The same with the full path of every file."""
        return self

    def build(self) -> "Benchmark":
        """The documents and questions in plain text. Raises DataError: text that can't be used."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Item:
    """A question: `prompt` goes on with one of `options` (each with its leading space), of which `answer` is right."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    group: int  # items of one group (a substance, a paragraph) are not independent


class Split(NamedTuple):
    """Documents by use; validation and test are whole documents that nothing is trained on."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one split, validation or test, measures on, by subject."""

    held_out: Mapping[str, Sequence[Document]]  # whole documents that nothing is trained on
    questions: Mapping[str, Sequence[Item]] = dataclasses.field(default_factory=dict)
    # Forget documents, trained on, whose NLL is a score; None: the split takes every other forget row
    memorised: Sequence[Document] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Documents by use."""

    train: Mapping[str, Sequence[Document]]  # by source: "general", "forget", often "neighbour"
    mixture: Mapping[str, float]  # share of each source in a training batch
    validation: Part
    test: Part
    holdout: Sequence[Document] = ()  # like the forget set, seen by no model, for membership inference
    verbatim: bool = True  # whether beginnings of forget documents are continued as a score
    topics: Sequence[int] = ()  # documents of each forget topic, one after the other in train["forget"]; (): one topic
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # texts per source too short to be documents
    retain_rows: int | None = None  # of the unlearner's retain corpus, drawn; None: everything but forget rows
    neighbour_share: float = 0.0  # of these rows; the others are general text
    unretained: Sequence[str] = ()  # sources beside the forget set that are not in it


@dataclasses.dataclass(frozen=True)
class Questions:
    """Multiple-choice questions scored by the log-likelihood of each option after a prompt."""

    tokens: np.ndarray  # i32 [Q, O, S], one row per option: start mark, prompt, option, padding
    segments: np.ndarray  # i32 [Q, O, S]; 0 is padding
    scored: np.ndarray  # bool [Q, O, S]; position t is scored if it predicts a token of the option
    answer: np.ndarray  # i32 [Q], the right option
    group: np.ndarray  # i32 [Q], as in `Item`

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Beginnings of documents and how they go on."""

    prompt: np.ndarray  # i32 [N, P], with start mark
    continuation: np.ndarray  # i32 [N, C]
    lengths: np.ndarray | None = None  # i32 [N, 2], tokens of both, from the left of their rows; None: all are full

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, indices: np.ndarray) -> "Prompts":
        """The prompts at `indices`, in that order."""
        lengths = None if self.lengths is None else self.lengths[indices]
        return Prompts(self.prompt[indices], self.continuation[indices], lengths)

    def unpadded(self, tokens: np.ndarray, side: int = 1) -> list[list[int]]:
        """Of each row of `tokens` i32 [N, W], as many as the true continuation has, or (side 0) the prompt."""
        counts = np.full(len(self), tokens.shape[1]) if self.lengths is None else self.lengths[:, side]
        return [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Probes:
    """What is measured on one split. Keys are subjects: "forget", "neighbour", "general", "holdout"."""

    questions: Mapping[str, Questions]
    text: Mapping[str, Rows]  # held out ("general", "neighbour") or memorised ("forget"), whose NLL is a score
    prompts: Mapping[str, Prompts]  # beginnings of chunks of forget documents for the verbatim score
    members: Mapping[str, Rows]  # "forget" (trained on) and "holdout" (never seen), one chunk a row


@dataclasses.dataclass(frozen=True)
class Corpora:
    """The data of one run."""

    tokenizer: Tokenizer
    train: Mapping[str, Rows]  # by source, for training the target model
    mixture: Mapping[str, float]  # share of each source in a training batch
    retain: Rows  # for the unlearner; `domain` marks neighbour rows
    validation: Probes  # methods are tuned on it
    test: Probes  # and reported on this
    documents: Mapping[str, int]  # counts per split, for the report
    tokens: Mapping[str, int]
    fingerprint: str  # hash of all tokens and splits

    @property
    def forget(self) -> Rows:
        """What is to be forgotten; `domain` numbers topics."""
        return self.train["forget"]

    @property
    def retrain_mixture(self) -> dict[str, float]:
        """`mixture` without forget data, for the retrained model."""
        retrain = {name: share for name, share in self.mixture.items() if name != "forget"}
        return {name: share / sum(retrain.values()) for name, share in retrain.items()}


def build_corpora(config: DataConfig, codec: TextCodec | None = None) -> Corpora:
    """Builds the corpora of a configuration; the same configuration gives the same arrays.

    No held-out document is trained on (checked).

    Args:
      codec: of the model; None trains a tokenizer of `config.vocab_size`, on training documents only.

    Raises:
      ConfigError: settings that ask for more than the benchmark has; a token that the model doesn't know.
      DataError: text of the user that can't be used (`trace_jax.tasks.text`), or is too small.

    Example:
      >>> files = {"forget": "forget.jsonl", "retain": "retain.jsonl"}
      >>> corpora = tj.build_corpora(tj.DataConfig.kinds["text"](**files, row_length=32, vocab_size=320))
      >>> corpora.retain.tokens.shape[1], sorted(corpora.test.text)
      (32, ['forget', 'general'])
    """
    benchmark = config.build()
    parts = {"validation": benchmark.validation, "test": benchmark.test}
    held_out = {f"{name}/{subject}": d for name, part in parts.items() for subject, d in part.held_out.items()}
    held_out |= {"holdout": benchmark.holdout} if benchmark.holdout else {}
    trained = [d for several in benchmark.train.values() for d in several]
    if leaked := overlap([d for several in held_out.values() for d in several], trained):
        example = " = ".join(document.origin for document in leaked[0])
        raise DataError(f"{len(leaked)} held-out documents are also trained on, for example {example}.")

    if codec is None:
        size = config.vocab_size or 2048
        codec = TextCodec(train_tokenizer((d.text + (d.answer or "") for d in trained), size), SpecialTokens(), size)
    length, special = config.row_length, codec.special
    documents = {f"train/{source}": d for source, d in benchmark.train.items()} | held_out
    encoded = {name: encode_documents(codec, several) for name, several in documents.items()}
    forget = encoded["train/forget"]
    sizes = benchmark.topics or [len(forget)]
    topics = [
        pack_documents(forget[end - size : end], length, domain=topic, special=special)
        for topic, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True))
    ]
    if empty := [topic for topic, part in enumerate(topics) if len(topics) > 1 and not len(part)]:
        raise DataError(f"{config.forget_sources[empty[0]]}: the topic has no token that can be predicted; give more.")
    rows = {"train/forget": Rows.concatenate(topics)} | {
        name: pack_documents(several, length, domain=int(name == "train/neighbour"), special=special)
        for name, several in encoded.items()
        if name != "train/forget"
    }
    for name, packed in rows.items():
        if len(packed) < (least := 2 if name == "train/forget" else 1):
            there = f"{name} has {len(packed)} rows of {length} tokens, and at least {least} are needed"
            raise DataError(f"{there}. Give more text, or lower row_length.")
    train = {source: rows[f"train/{source}"] for source in benchmark.train}
    retain = _retain_rows(train, benchmark, config.seed)
    probes = {name: _probes(name, part, benchmark, codec, length, encoded, rows) for name, part in parts.items()}
    counts = {name: len(several) for name, several in documents.items()}
    if len(benchmark.topics) > 1:
        counts |= {f"train/forget/{topic}": count for topic, count in enumerate(benchmark.topics)}
    return Corpora(
        tokenizer=codec.literal,
        train=train,
        mixture=dict(benchmark.mixture),
        retain=retain,
        validation=probes["validation"],
        test=probes["test"],
        documents=counts | {f"left out/{name}": count for name, count in benchmark.left_out.items()},
        tokens={name: sum(len(d.tokens) for d in several) for name, several in encoded.items()},
        fingerprint=_fingerprint(codec.literal, [*train.values(), retain, *probes.values()]),
    )


def _retain_rows(train: Mapping[str, Rows], benchmark: Benchmark, seed: int) -> Rows:
    if benchmark.retain_rows is None:
        left_out = {"forget", *benchmark.unretained}
        return Rows.concatenate([rows for source, rows in train.items() if source not in left_out])
    rng = np.random.default_rng([seed, 3])
    neighbours = round(benchmark.retain_rows * benchmark.neighbour_share)
    parts = []
    for source, wanted in (("general", benchmark.retain_rows - neighbours), ("neighbour", neighbours)):
        if wanted > len(train[source]):
            raise ConfigError(
                f"retain_rows = {benchmark.retain_rows} with neighbour_share = {benchmark.neighbour_share} needs "
                f"{wanted} {source} rows, and there are {len(train[source])}. Ask for fewer rows or another share."
            )
        parts.append(train[source].take(np.sort(rng.choice(len(train[source]), wanted, replace=False))))
    retain = Rows.concatenate(parts)
    return retain.take(rng.permutation(len(retain)))


def _probes(
    name: str, part: Part, benchmark: Benchmark, codec: TextCodec, length: int, encoded: dict, rows: dict[str, Rows]
) -> Probes:
    """What one split measures on. Forget and holdout documents are split row by row: validation has the even ones."""
    forget, special = encoded["train/forget"], codec.special

    def every_other(several: Any) -> Any:
        return several.take(np.arange(int(name != "validation"), len(several), 2))

    text = {subject: rows[f"{name}/{subject}"] for subject in part.held_out}
    text["forget"] = every_other(rows["train/forget"])
    if part.memorised is not None:
        text["forget"] = rows_of_documents(codec, part.memorised, length)
    prompts = {"forget": every_other(verbatim_prompts(forget, length, special))} if benchmark.verbatim else {}
    prompts = {subject: several for subject, several in prompts.items() if len(several)}
    members = {}
    if benchmark.holdout:  # one chunk a row; shreds are left out
        for subject, documents in (("forget", forget), ("holdout", encoded["holdout"])):
            pieces = rows_of_chunks(documents, length, shortest=min(_SHORTEST, length), special=special)
            members[subject] = every_other(pieces)
        if short := [subject for subject, several in members.items() if not len(several)]:
            needed = f"validation and test need a piece of at least {_SHORTEST} tokens each"
            raise DataError(f"The {' and '.join(short)} text is too short for membership inference: {needed}.")
    questions = {subject: encode_questions(codec, items) for subject, items in part.questions.items()}
    return Probes(questions, text, prompts, members)


def encode_questions(codec: TextCodec, items: Sequence[Item]) -> Questions:
    """Questions as arrays; S is the longest prompt with option, rounded up to a multiple of 8."""
    start, _ = start_and_end(codec.special)
    encoded = codec.pairs([(item.prompt, option) for item in items for option in item.options])
    texts = [[start, *e.tokens] for e in encoded]
    width = -(-max(map(len, texts)) // 8) * 8
    tokens, segments = pad(texts, width=width, fill=codec.special.pad), pad([[1] * len(t) for t in texts], width=width)
    scored = [[False] * e.first_target + [True] * (len(e.tokens) - e.first_target) for e in encoded]
    arrays = tokens, segments, pad(scored, width=width, dtype=bool)
    by_question = (x.reshape(len(items), len(items[0].options), width) for x in arrays)
    facts = (np.array([getattr(item, name) for item in items], np.int32) for name in ("answer", "group"))
    return Questions(*by_question, *facts)


def verbatim_prompts(documents: Sequence[Encoded], row_length: int, special: SpecialTokens) -> Prompts:
    """The first tokens of every long enough chunk, and as many after them: 32, or 16 or 8 if fewer than 16 chunks are
    twice as long. Chunks are as in the training rows, for the context; documents with an answer are left out.
    """
    plain = [d for d in documents if d.first_target == 0]
    for length in (32, 16, 8):
        tokens = rows_of_chunks(plain, row_length, shortest=2 * length, special=special).tokens
        if len(tokens) >= 16:
            break
    return Prompts(tokens[:, :length], tokens[:, length : 2 * length])


def prompts_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Prompts:
    """Prompts of (tokens of the prompt, tokens of the continuation) of any length; rows are filled up with 0."""
    lengths = np.array([[len(prompt), len(continuation)] for prompt, continuation in pairs], np.int32)
    prompt, continuation = (pad(several) for several in zip(*pairs, strict=True))
    return Prompts(prompt, continuation, lengths)


def _fingerprint(tokenizer: Tokenizer, values: Sequence[object]) -> str:
    """Hash of the vocabulary and of every array, in order, with its shape."""
    digest = hashlib.sha256(tokenizer.to_str().encode())

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                digest.update(key.encode())
                add(item)
        elif value is not None:
            for item in vars(value).values():
                add(item)

    for value in values:
        add(value)
    return digest.hexdigest()[:16]
