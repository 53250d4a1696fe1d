"""What models are measured on: questions, held-out and memorised text, prompts, members."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from trace_jax.data.benchmark import Item
from trace_jax.data.packing import rows_of_chunks
from trace_jax.data.rows import Rows
from trace_jax.data.tokenizer import Encoded, Vocabulary, encode_pairs, start_and_end
from trace_jax.models.model import SpecialTokens


@dataclasses.dataclass(frozen=True)
class Questions:
    """Multiple-choice questions scored by the log-likelihood of each option after a prompt.

    tokens, segments: i32 [Q, O, S], one row per option: start mark, prompt, option, padding (segment 0).
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
    """Beginnings of documents and how they go on: prompt i32 [N, P] (with start mark), continuation i32 [N, C].

    lengths: i32 [N, 2], tokens of each prompt and each continuation, from the left of its row; None: all are full.
    """

    prompt: np.ndarray
    continuation: np.ndarray
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, indices: np.ndarray) -> Prompts:
        """The prompts at `indices`, in that order."""
        return Prompts(
            self.prompt[indices], self.continuation[indices], None if self.lengths is None else self.lengths[indices]
        )

    def unpadded(self, tokens: np.ndarray) -> list[list[int]]:
        """Of each row of `tokens` i32 [N, C], as many as the true continuation has."""
        counts = np.full(len(self), tokens.shape[1]) if self.lengths is None else self.lengths[:, 1]
        return [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]


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


def encode_questions(vocabulary: Vocabulary, items: Sequence[Item], *, multiple: int = 8) -> Questions:
    """Questions as arrays; S is the longest prompt with option, rounded up to a multiple of `multiple`."""
    start, _ = start_and_end(vocabulary.special)
    encoded = encode_pairs(vocabulary, [(item.prompt, option) for item in items for option in item.options])
    longest = max(1 + len(e.tokens) for e in encoded)
    shape = (len(encoded), -(-longest // multiple) * multiple)
    tokens = np.full(shape, vocabulary.special.pad, np.int32)
    segments = np.zeros(shape, np.int32)
    scored = np.zeros(shape, bool)
    for row, e in enumerate(encoded):
        end = 1 + len(e.tokens)
        tokens[row, :end] = [start, *e.tokens]
        segments[row, :end] = 1
        scored[row, e.first_target : end - 1] = True
    by_question = (len(items), len(items[0].options), -1)
    answer, group = (np.array([getattr(item, name) for item in items], np.int32) for name in ("answer", "group"))
    tokens, segments, scored = (x.reshape(by_question) for x in (tokens, segments, scored))
    return Questions(tokens, segments, scored, answer, group)


def verbatim_prompts(
    documents: Sequence[Encoded], row_length: int, special: SpecialTokens, *, longest: int = 32
) -> Prompts:
    """The first tokens of every long enough chunk and as many after them.

    Chunks are those of the training rows, so a prompt stands in the context that it was learned in. Documents with an
    answer are left out. The length is `longest`, or a half or a quarter of it where fewer than 16 chunks are twice as
    long.
    """
    plain = [d for d in documents if d.first_target == 0]
    for length in (longest, longest // 2, longest // 4):
        tokens = rows_of_chunks(plain, row_length, shortest=2 * length, special=special).tokens
        if len(tokens) >= 16:
            break
    return Prompts(tokens[:, :length], tokens[:, length : 2 * length])


def prompts_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Prompts:
    """Prompts of (tokens of the prompt, tokens of the continuation) of any length; rows are filled up with 0."""
    lengths = np.array([[len(prompt), len(continuation)] for prompt, continuation in pairs], np.int32)
    prompt, continuation = (np.zeros((len(pairs), longest), np.int32) for longest in lengths.max(axis=0))
    for row, pair in enumerate(pairs):
        prompt[row, : len(pair[0])], continuation[row, : len(pair[1])] = pair
    return Prompts(prompt, continuation, lengths)


def member_rows(documents: Sequence[Encoded], row_length: int, special: SpecialTokens) -> Rows:
    """One chunk a row; shreds of fewer than 16 tokens are left out."""
    return rows_of_chunks(documents, row_length, shortest=min(16, row_length), special=special)
