"""A benchmark as documents and questions in plain text, before there are tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from trace_jax.data.sources import Document


@dataclasses.dataclass(frozen=True)
class Item:
    """A question: `prompt` goes on with one of `options` (each with its leading space), of which `answer` is right.

    Items of one `group` (a substance, a paragraph) are not independent.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int
    group: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What one split, validation or test, measures on.

    held_out: whole documents per subject that nothing is trained on. questions: per subject.
    memorised: forget documents, trained on, whose NLL is a score; None where the split takes every other forget row.
    """

    held_out: Mapping[str, Sequence[Document]]
    questions: Mapping[str, Sequence[Item]] = dataclasses.field(default_factory=dict)
    memorised: Sequence[Document] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Documents by use.

    train: documents per source ("general", "forget", often "neighbour"); mixture: share of each in a training batch.
    holdout: documents like the forget set that no model has seen, for membership inference; may be empty.
    verbatim: whether beginnings of forget documents are continued as a score.
    topics: documents of each forget topic, which follow each other in train["forget"]; empty: one topic.
    left_out: texts per source that were too short to be documents.
    """

    train: Mapping[str, Sequence[Document]]
    mixture: Mapping[str, float]
    validation: Part
    test: Part
    holdout: Sequence[Document] = ()
    verbatim: bool = True
    topics: Sequence[int] = ()
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
