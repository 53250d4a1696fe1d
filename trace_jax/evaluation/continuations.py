"""Continuations of texts, scored as lm-eval's class for transformers scores them.

Both ways to a multiple-choice score, lm-eval itself and the quick one along a run, go through `score_texts`, so that
they agree question by question.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from trace_jax.evaluation.likelihood import score_sequences
from trace_jax.io.progress import progress
from trace_jax.models.model import Model, TextCodec

_BATCHES = 64  # scored between two looks at the progress


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-likelihood of a continuation (sum over its tokens, nats), and whether it is what greedy decoding writes."""

    log_likelihood: float
    greedy: bool


def score_texts(
    model: Model,
    texts: Sequence[tuple[str, str]],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[Scored]:
    """`score_tokens` of each (context, continuation) as `TextCodec.encode_pair` reads it.

    Args:
      max_length: default: the model's `TextCodec.context_length`.
    """
    codec = TextCodec.of(model)
    pairs = [codec.encode_pair(*pair) for pair in texts]
    return score_tokens(model, pairs, max_length=max_length or codec.context_length, batch_size=batch_size, mesh=mesh)


def score_tokens(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[Scored]:
    """Scores of each (context, continuation) of token ids, in the order given.

    What the model can't read at once is cut from the left. Pairs that differ in nothing but their last token, such as
    the letters of a multiple-choice question, go through the model once.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than `max_length`.
      NonFiniteScore: the model gives NaN or infinite likelihoods.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"pair {number} has {len(context)} tokens and {len(continuation)} after them; expected at least one "
                f"each, and at most max_length = {max_length} after."
            )
        groups.setdefault((*context, *continuation)[-(max_length + 1) : -1], []).append(number)
    results: dict[int, Scored] = {}
    order, step = sorted(groups, key=len), _BATCHES * batch_size
    with progress("scoring", len(order), unit="text") as advance:
        for begin in range(0, len(order), step):
            keys = order[begin : begin + step]
            lasts = [list(dict.fromkeys(pairs[number][1][-1] for number in groups[key])) for key in keys]
            longest = [max(len(pairs[number][1]) for number in groups[key]) for key in keys]
            scores = score_sequences(
                model,
                [(*key, last[0]) for key, last in zip(keys, lasts, strict=True)],
                [len(key) + 1 - length for key, length in zip(keys, longest, strict=True)],
                alternatives=[last[1:] for last in lasts],
                batch_size=batch_size,
                mesh=mesh,
            )
            for key, last, length, score in zip(keys, lasts, longest, scores, strict=True):
                for number in groups[key]:
                    own = pairs[number][1]
                    # The tokens before the last one, which all share, and the place where its own last one was scored.
                    places = [*range(length - len(own), length - 1), length - 1 + last.index(own[-1])]
                    total = float(score.log_prob[places].sum(dtype=np.float64))
                    results[number] = Scored(total, bool(score.greedy[places].all()))
            advance(min(begin + step, len(order)), "")
    return [results[number] for number in range(len(pairs))]
