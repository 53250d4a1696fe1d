"""What models are measured on: questions, held-out and memorised text, prompts, members."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from trace_jax.data.benchmark import Item
from trace_jax.data.packing import rows_of_chunks
from trace_jax.data.rows import Rows
from trace_jax.data.tokenizer import BOS, PAD, Encoded, encode_texts


@dataclasses.dataclass(frozen=True)
class Questions:
    """Multiple-choice questions scored by the log-likelihood of each option after a prompt.

    tokens, segments: i32 [Q, O, S], one row per option: BOS, prompt, option, padding (segment 0).
    scored: bool [Q, O, S]; position t is scored if it predicts a token of the option.
    answer: i32 [Q], the right option. group: i32 [Q], items of one group (a substance,
    a paragraph) are not independent.
    """

    tokens: np.ndarray
    segments: np.ndarray
    scored: np.ndarray
    answer: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Beginnings of documents and how they go on: prompt i32 [N, P] (starts with BOS), continuation i32 [N, C]."""

    prompt: np.ndarray
    continuation: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)


@dataclasses.dataclass(frozen=True)
class Probes:
    """What is measured on one split. Keys are subjects: "forget", "neighbour", "general", "holdout".

    questions: four-option questions per subject (handbook: forget, neighbour; presidents: forget).
    text: held-out ("general", "neighbour") or memorised ("forget") rows per subject whose NLL is a score.
    prompts: beginnings of chunks of forget documents for the verbatim score.
    members: rows of "forget" (trained on) and "holdout" (never seen) for membership inference, one chunk a row.
    """

    questions: Mapping[str, Questions]
    text: Mapping[str, Rows]
    prompts: Mapping[str, Prompts]
    members: Mapping[str, Rows]


def encode_questions(tokenizer: Tokenizer, items: Sequence[Item], *, multiple: int = 8) -> Questions:
    """Questions as arrays; S is the longest prompt with option, rounded up to a multiple of `multiple`."""
    prompts = encode_texts(tokenizer, [item.prompt for item in items])
    options = [encode_texts(tokenizer, item.options) for item in items]
    longest = max(1 + len(p) + len(o) for p, several in zip(prompts, options, strict=True) for o in several)
    shape = (len(items), len(options[0]), -(-longest // multiple) * multiple)
    tokens = np.full(shape, PAD, np.int32)
    segments = np.zeros(shape, np.int32)
    scored = np.zeros(shape, bool)
    for q, (prompt, several) in enumerate(zip(prompts, options, strict=True)):
        for o, option in enumerate(several):
            row = np.concatenate([[BOS], prompt, option])
            tokens[q, o, : len(row)] = row
            segments[q, o, : len(row)] = 1
            scored[q, o, len(prompt) : len(row) - 1] = True
    answer, group = ([getattr(item, name) for item in items] for name in ("answer", "group"))
    return Questions(tokens, segments, scored, np.array(answer, np.int32), np.array(group, np.int32))


def verbatim_prompts(documents: Sequence[Encoded], row_length: int, *, longest: int = 32) -> Prompts:
    """The first tokens of every long enough chunk and as many after them.

    Chunks are those of the training rows, so a prompt stands in the context that it was learned in. Documents with an
    answer are left out. The length is `longest`, or a half or a quarter of it where fewer than 16 chunks are twice as
    long.
    """
    plain = [d for d in documents if d.first_target == 0]
    for length in (longest, longest // 2, longest // 4):
        tokens = rows_of_chunks(plain, row_length, shortest=2 * length).tokens
        if len(tokens) >= 16:
            break
    return Prompts(tokens[:, :length], tokens[:, length : 2 * length])


def member_rows(documents: Sequence[Encoded], row_length: int) -> Rows:
    """One chunk a row; shreds of fewer than 16 tokens are left out."""
    return rows_of_chunks(documents, row_length, shortest=min(16, row_length))
