"""The user's own text: files to forget, files to keep, and what can be measured on them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Collection, Sequence

import numpy as np
from absl import logging

from trace_jax.data.benchmark import Benchmark, Part
from trace_jax.data.config import DataConfig
from trace_jax.data.sources import DataError, Document, document_hash, overlap, read_source

MIXTURE = {"general": 0.70, "forget": 0.30}
MIXTURE_WITH_NEIGHBOUR = {"general": 0.35, "neighbour": 0.35, "forget": 0.30}
HELD_OUT_SHARE = 0.1  # of the documents, for validation and again for test
_FEWEST = 3  # documents: one to train on, one for validation, one for test
_PIECES = 30  # into about which a text is split that has too few documents


def build_text(config: DataConfig) -> Benchmark:
    """Forget text is trained on whole; of retain ("general") and neighbour text whole documents are held out.

    A retain or neighbour set of one or two long documents is split at paragraph ends first (logged). Several forget
    sources are topics (`Benchmark.topics`).

    Raises:
      DataError: `read_source`; no forget source; documents that stand in both forget and a set to keep (unless
        `allow_overlap`); holdout documents that are trained on; a set too small to hold anything out.
    """
    if not config.forget_sources:
        raise DataError("forget is an empty list; name at least one source to forget.")
    read = functools.partial(read_source, min_length=config.min_length or 0)
    topics = [read(path) for path in config.forget_sources]
    sources = {"general": read(config.retain or "")}
    sources |= {name: read(path) for name in ("neighbour", "holdout") if (path := getattr(config, name))}
    forget = [document for topic in topics for document in topic.documents]
    kept = {name: source.documents for name, source in sources.items() if name != "holdout"}
    holdout = sources["holdout"].documents if "holdout" in sources else []
    left_out = {"forget": sum(topic.left_out for topic in topics)} | {n: s.left_out for n, s in sources.items()}
    names = {"general": "retain", "neighbour": "neighbour"}
    for subject, documents in kept.items():
        if not config.allow_overlap:
            _refuse_overlap("forget", forget, names[subject], documents)
        _refuse_overlap("holdout", holdout, names[subject], documents)
    _refuse_overlap("holdout", holdout, "forget", forget)

    kept = {subject: _enough(documents, names[subject]) for subject, documents in kept.items()}
    # A document that stands twice anywhere stays in training: held out, its twin would give it away.
    counts = collections.Counter(document_hash(d) for several in (forget, *kept.values()) for d in several)
    repeated = {key for key, count in counts.items() if count > 1}
    splits = {
        subject: hold_out(documents, names[subject], repeated=repeated, rng=np.random.default_rng([config.seed, order]))
        for order, (subject, documents) in enumerate(kept.items())
    }
    return Benchmark(
        train={subject: split.train for subject, split in splits.items()} | {"forget": forget},
        mixture=MIXTURE_WITH_NEIGHBOUR if "neighbour" in kept else MIXTURE,
        validation=Part({subject: split.validation for subject, split in splits.items()}),
        test=Part({subject: split.test for subject, split in splits.items()}),
        holdout=holdout,
        topics=tuple(len(topic.documents) for topic in topics),
        left_out={name: count for name, count in left_out.items() if count},
    )


def _refuse_overlap(left_name: str, left: Sequence[Document], right_name: str, right: Sequence[Document]) -> None:
    if not (twins := overlap(left, right)):
        return
    one, other = twins[0]
    advice = " or set allow_overlap" if left_name == "forget" else ""
    raise DataError(
        f"{len(twins)} of {len(left)} {left_name} documents also stand in {right_name}, for example {one.origin} = "
        f"{other.origin}. Remove them from one of the two{advice}."
    )


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents by use; validation and test are whole documents that nothing is trained on."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


def hold_out(documents: Sequence[Document], name: str, *, repeated: Collection[str], rng: np.random.Generator) -> Split:
    """Draws a tenth of the documents, at least one, for validation and again for test.

    Raises:
      DataError: fewer than two documents can be held out with one left to train on.
    """
    eligible = [i for i, d in enumerate(documents) if document_hash(d) not in repeated]
    each = max(1, round(len(documents) * HELD_OUT_SHARE))
    each = min(each, len(eligible) // 2)
    if not each or len(documents) - 2 * each < 1:
        raise DataError(
            f"{name}: {len(documents)} documents, {len(eligible)} of them unlike all others; at least {_FEWEST} "
            "different documents (or paragraphs of one text) are needed, one each to train on, to tune on and to test."
        )
    drawn = [eligible[i] for i in rng.permutation(len(eligible))[: 2 * each]]
    validation, test = sorted(drawn[:each]), sorted(drawn[each:])
    held = {*validation, *test}
    return Split(
        train=[d for i, d in enumerate(documents) if i not in held],
        validation=[documents[i] for i in validation],
        test=[documents[i] for i in test],
    )


def _enough(documents: Sequence[Document], name: str) -> list[Document]:
    if len(documents) >= _FEWEST:
        return list(documents)
    size = max(1, sum(len(d.text) for d in documents) // _PIECES)
    pieces = [p for d in documents for p in ([d] if d.answer is not None else split_at_paragraphs(d, size))]
    logging.warning(
        "%s: %d document(s) were split into %d pieces at paragraph ends, so that some can be held out.",
        name, len(documents), len(pieces),
    )  # fmt: skip
    return pieces


def split_at_paragraphs(document: Document, size: int) -> list[Document]:
    """Pieces of whole paragraphs (ended by an empty line, or else by a line end), each of `size` characters or more."""
    separator = "\n\n" if "\n\n" in document.text else "\n"
    path, _, first = document.origin.rpartition(":")
    pieces, current, line = [], "", int(first)
    start = line
    for paragraph in document.text.split(separator):
        current = f"{current}{separator}{paragraph}" if current else paragraph
        line += paragraph.count("\n") + separator.count("\n")
        if len(current) >= size and current.strip():
            pieces.append(Document(current, f"{path}:{start}"))
            current, start = "", line
    if current.strip():
        pieces.append(Document(current, f"{path}:{start}"))
    return pieces
