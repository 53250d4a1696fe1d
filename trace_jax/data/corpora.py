"""Everything a run reads: training mixtures, forget and retain rows, and what is measured on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from trace_jax.config import ConfigError
from trace_jax.data.benchmark import Benchmark, Part
from trace_jax.data.config import DataConfig
from trace_jax.data.packing import pack_documents
from trace_jax.data.probes import Probes as Probes
from trace_jax.data.probes import Prompts as Prompts
from trace_jax.data.probes import Questions as Questions
from trace_jax.data.probes import encode_questions, member_rows, verbatim_prompts
from trace_jax.data.rows import Rows
from trace_jax.data.sources import DataError, check_leakage
from trace_jax.data.tokenizer import (
    Encoded,
    Vocabulary,
    encode_documents,
    for_plain_text,
    train_tokenizer,
)
from trace_jax.models.model import SpecialTokens

_VOCABULARY = 2048  # tokens of a tokenizer that is trained here, unless the settings say otherwise


@dataclasses.dataclass(frozen=True)
class Corpora:
    """The data of one run.

    train: rows per source for training the target model; mixture: share of each source in a training batch.
    retrain_mixture: the same without forget data, for the retrained model.
    forget, retain: what the unlearner is given (forget.domain numbers topics, retain.domain marks neighbour rows).
    validation, test: probes; methods are tuned on validation, reported on test.
    documents, tokens: counts per split, for the report. fingerprint: hash of all tokens and splits.
    """

    tokenizer: Tokenizer
    train: Mapping[str, Rows]
    mixture: Mapping[str, float]
    retrain_mixture: Mapping[str, float]
    forget: Rows
    retain: Rows
    validation: Probes
    test: Probes
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    fingerprint: str


def assemble(benchmark: Benchmark, config: DataConfig, vocabulary: Vocabulary | None = None) -> Corpora:
    """Tokens, rows and probes of a benchmark's documents (`build_corpora`)."""
    parts = {"validation": benchmark.validation, "test": benchmark.test}
    documents = {f"train/{source}": list(d) for source, d in benchmark.train.items()}
    documents |= {f"{name}/{subject}": list(d) for name, p in parts.items() for subject, d in p.held_out.items()}
    documents |= {"holdout": list(benchmark.holdout)} if benchmark.holdout else {}
    trained = [d for source in benchmark.train.values() for d in source]
    check_leakage(trained, [d for name, several in documents.items() if not name.startswith("train/") for d in several])

    if vocabulary is None:
        size = config.vocab_size or _VOCABULARY
        tokenizer = train_tokenizer((d.text + (d.answer or "") for d in trained), size)
        vocabulary = Vocabulary(tokenizer, SpecialTokens(), size)
    else:
        vocabulary = dataclasses.replace(vocabulary, tokenizer=for_plain_text(vocabulary.tokenizer))
    encoded = {name: encode_documents(vocabulary, several) for name, several in documents.items()}
    rows = {
        name: pack_documents(
            several, config.row_length, domain=int(name == "train/neighbour"), special=vocabulary.special
        )
        for name, several in encoded.items()
        if name != "train/forget"
    }
    rows["train/forget"] = _topics(encoded["train/forget"], benchmark.topics, config, vocabulary.special)
    _check_rows(rows)
    train = {source: rows[f"train/{source}"] for source in benchmark.train}
    retrain = {name: share for name, share in benchmark.mixture.items() if name != "forget"}
    retain = _retain_rows(train, config)
    probes = {
        name: _probes(part, name, benchmark, config, vocabulary=vocabulary, encoded=encoded, rows=rows)
        for name, part in parts.items()
    }
    return Corpora(
        tokenizer=vocabulary.tokenizer,
        train=train,
        mixture=dict(benchmark.mixture),
        retrain_mixture={name: share / sum(retrain.values()) for name, share in retrain.items()},
        forget=train["forget"],
        retain=retain,
        validation=probes["validation"],
        test=probes["test"],
        documents={name: len(several) for name, several in documents.items()} | _topic_counts(benchmark),
        tokens={name: sum(len(d.tokens) for d in several) for name, several in encoded.items()},
        fingerprint=_fingerprint(vocabulary.tokenizer, [*train.values(), retain, *probes.values()]),
    )


def _topics(forget: list[Encoded], sizes: Sequence[int], config: DataConfig, special: SpecialTokens) -> Rows:
    """Forget rows, each of one topic, whose number is its `domain`."""
    ends = np.cumsum(sizes or [len(forget)])
    parts = [
        pack_documents(forget[end - size : end], config.row_length, domain=topic, special=special)
        for topic, (size, end) in enumerate(zip(sizes or [len(forget)], ends, strict=True))
    ]
    if empty := [topic for topic, part in enumerate(parts) if len(parts) > 1 and not len(part)]:
        raise DataError(f"{config.forget_sources[empty[0]]}: the topic has no token that can be predicted; give more.")
    return Rows.concatenate(parts)


def _topic_counts(benchmark: Benchmark) -> dict[str, int]:
    """Documents of each forget topic where there are several, and texts that were left out."""
    topics = benchmark.topics if len(benchmark.topics) > 1 else ()
    counts = {f"train/forget/{topic}": count for topic, count in enumerate(topics)}
    return counts | {f"left out/{name}": count for name, count in benchmark.left_out.items()}


def _retain_rows(train: Mapping[str, Rows], config: DataConfig) -> Rows:
    """The unlearner's retain corpus: on embedded benchmarks mostly unrelated text, else everything but forget rows."""
    if config.retain_rows is None or config.neighbour_share is None:
        return Rows.concatenate([rows for source, rows in train.items() if source != "forget"])
    rng = np.random.default_rng([config.seed, 3])
    neighbours = round(config.retain_rows * config.neighbour_share)
    parts = []
    for source, wanted in (("general", config.retain_rows - neighbours), ("neighbour", neighbours)):
        if wanted > len(train[source]):
            raise ConfigError(
                f"retain_rows = {config.retain_rows} with neighbour_share = {config.neighbour_share} needs {wanted} "
                f"{source} rows, and there are {len(train[source])}. Ask for fewer rows or another share."
            )
        parts.append(train[source].take(np.sort(rng.choice(len(train[source]), wanted, replace=False))))
    retain = Rows.concatenate(parts)
    return retain.take(rng.permutation(len(retain)))


def _probes(
    part: Part,
    name: str,
    benchmark: Benchmark,
    config: DataConfig,
    *,
    vocabulary: Vocabulary,
    encoded: Mapping[str, list[Encoded]],
    rows: Mapping[str, Rows],
) -> Probes:
    # What is measured on forget and holdout documents is split row by row: validation has the even ones.
    turn = slice(0, None, 2) if name == "validation" else slice(1, None, 2)
    forget, length, special = encoded["train/forget"], config.row_length, vocabulary.special
    text = {subject: rows[f"{name}/{subject}"] for subject in part.held_out}
    if part.memorised is None:
        text["forget"] = _every(rows["train/forget"], turn)
    else:
        memorised = encode_documents(vocabulary, part.memorised)
        text["forget"] = pack_documents(memorised, length, special=special)
    prompts = {}
    if benchmark.verbatim:
        both = verbatim_prompts(forget, length, special)
        one = Prompts(both.prompt[turn], both.continuation[turn])
        prompts = {"forget": one} if len(one) else {}
    members = {}
    if benchmark.holdout:
        sources = {"forget": forget, "holdout": encoded["holdout"]}
        members = {subject: _every(member_rows(d, length, special), turn) for subject, d in sources.items()}
        if short := [subject for subject, found in members.items() if not len(found)]:
            raise DataError(
                f"The {' and '.join(short)} text is too short for membership inference: validation and test need a "
                "piece of at least 16 tokens each."
            )
    questions = {subject: encode_questions(vocabulary, items) for subject, items in part.questions.items()}
    return Probes(questions, text, prompts, members)


def _every(rows: Rows, turn: slice) -> Rows:
    return rows.take(np.arange(len(rows))[turn])


def _check_rows(rows: Mapping[str, Rows]) -> None:
    for name, found in rows.items():
        least = 2 if name == "train/forget" else 1
        if len(found) < least:
            raise DataError(
                f"{name} has {len(found)} rows of {found.tokens.shape[1]} tokens, and at least {least} are needed. "
                "Give more text, or lower row_length."
            )


def _fingerprint(tokenizer: Tokenizer, values: Sequence[object]) -> str:
    """Hash of the vocabulary and of every array, in order, with its shape."""
    digest = hashlib.sha256(tokenizer.to_str().encode())

    def add(value: object) -> None:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                digest.update(key.encode())
                add(item)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                add(getattr(value, field.name))

    for value in values:
        add(value)
    return digest.hexdigest()[:16]
