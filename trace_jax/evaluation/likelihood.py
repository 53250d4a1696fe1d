"""Scoring by likelihood: of rows, of the options of questions, of sequences of any length, of continuations of texts.

One function scores everything. It gathers the hidden states at the positions that are scored before the output head
runs, so that a question pays for the logits of its options only.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trace_jax.data.corpora import Questions
from trace_jax.data.rows import Rows
from trace_jax.io.progress import progress
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import padded_size
from trace_jax.models.loss import token_nll, token_scores
from trace_jax.models.model import Model, TextCodec
from trace_jax.models.sharding import map_batches, pad

_BATCHES = 64  # of texts, scored between two looks at the progress
_WITH_MOMENTS = functools.partial(token_scores, moments=True)  # one object: programs are compiled for it


class NonFiniteScore(FloatingPointError):
    """The model's likelihoods are NaN or infinite, so that no score can be given."""


def score_rows(model: Model, rows: Rows, *, batch_size: int = 64, mesh: Mesh | None = None) -> np.ndarray:
    """NLL f32 [N, S], nats, of what follows every valid position of `rows`, up to `batch_size` at a time; else 0."""
    positions = np.broadcast_to(np.arange(rows.tokens.shape[1], dtype=np.int32), rows.tokens.shape)
    columns = rows.tokens, rows.segments, positions, _following(rows.tokens)
    size = -(-len(rows) // max(1, -(-len(rows) // batch_size)))  # as many batches, of equal size: none is filled up
    batches = ([x[start : start + size] for x in columns] for start in range(0, len(rows), max(1, size)))
    return _nll(model, batches, rows.valid, mesh)


def score_questions(
    model: Model, questions: Questions, *, batch_size: int = 64, mesh: Mesh | None = None
) -> np.ndarray:
    """Log-likelihood f64 [Q, O] of every option, summed over its tokens, nats, `batch_size` questions at a time.

    A question goes through the model once: what its options have in common, and then the rest of each as a branch.
    """
    tokens, segments, scored = questions.tokens, questions.segments, questions.scored
    (count, options, length), at = tokens.shape, np.arange(tokens.shape[2])
    positions = np.argsort(~scored, axis=2, kind="stable")[:, :, : max(1, int(scored.sum(axis=2).max()))]
    targets, counted = (np.take_along_axis(x, positions, axis=2) for x in (_following(tokens), scored))

    ends = ((at + 1) * scored).max(axis=2)  # [Q, O], how much of an option is read
    differ = ((tokens != tokens[:, :1]) | (segments != segments[:, :1])).any(axis=1)
    common = np.minimum(ends.min(axis=1), np.where(differ, at, length).min(axis=1))[:, None]
    branches = np.where(at < common[:, :, None], 0, np.arange(1, options + 1)[:, None])
    read = (at < ends[:, :, None]) & ((branches > 0) | (np.arange(options) == 0)[:, None])
    places = np.argsort(~read.reshape(count, -1), axis=1, kind="stable")
    widths = read.sum(axis=(1, 2))
    rows = [np.take_along_axis((x * read).reshape(count, -1), places, axis=1) for x in (tokens, segments, branches)]
    begins = np.cumsum(ends - common, axis=1) - (ends - common)  # of a branch, after what is common
    positions = np.where(positions < common[:, :, None], positions, positions + begins[:, :, None]) * counted

    branched = bool((read & (branches > 0)).any())
    order, size = np.argsort(widths, kind="stable"), batch_size if branched else batch_size * options
    in_order = [x[order] for x in (*rows, widths, *(x.reshape(count, -1) for x in (positions, targets, counted)))]

    def batch(start: int) -> list[np.ndarray]:
        *rows, widths, positions, targets, _ = (x[start : start + size] for x in in_order)
        width = padded_size(int(widths.max()))
        tokens, segments, branches = (np.pad(x, ((0, 0), (0, width)))[:, :width] for x in rows)
        return [tokens, segments, positions, targets, *[branches] * branched]

    nll = _nll(model, map(batch, range(0, count, size)), in_order[-1], mesh)[np.argsort(order)]
    return -nll.reshape(counted.shape).sum(axis=2, dtype=np.float64)


def _following(tokens: np.ndarray) -> np.ndarray:
    """The token after each, [..., S]; after the last one itself."""
    return np.concatenate([tokens[..., 1:], tokens[..., -1:]], axis=-1)


def _nll(model: Model, batches: Iterable[Sequence[np.ndarray]], counted: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """NLL f32 [N, M] of targets [N, M]; 0 where one isn't `counted`. batches: what `_scores` takes, N rows in all."""
    sizes: list[int] = []

    def arrays() -> Iterator[list[np.ndarray]]:
        for batch in batches:
            sizes.append(len(batch[0]))
            yield [x.astype(np.int32) for x in batch]

    passes = map_batches(_scores, _models(model), model.config, arrays(), mesh=mesh, static=(token_nll,))
    nll = np.concatenate([x[:size] for x, size in zip(passes, sizes, strict=True)])
    return _finite(np.where(counted, nll, np.float32(0)))


def _scores(models: tuple[Any, ...], config: ModelConfig, tokens, segments, positions, targets, *more: Any) -> Any:
    """The score of `targets` [B, M] as what follows `positions` [B, M] of `tokens` [B, S]; for models see `_models`.

    more: the branches [B, S] of the tokens (`forward`), where there are any, and the score.
    """
    params, *guides = models
    *branches, score = more
    about: Any = {"mask": segments, "branches": branches[0] if branches else None}
    experts = None
    for guide in guides:
        experts = forward(guide, config, tokens, **about, collect=("indices",)).router.indices
    hidden = forward(params, config, tokens, **about, collect=("hidden",), experts=experts).hidden
    assert hidden is not None  # it was asked for
    return score(params, config, jnp.take_along_axis(hidden, positions[:, :, None], axis=1), targets)


def _models(model: Model) -> tuple[Any, ...]:
    """Its parameters, and those of its guide, which chooses every token's experts, if it has one."""
    return (model.params,) if model.guide is None else (model.params, model.guide)


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Scores of the scored tokens of one sequence, in its order."""

    log_prob: np.ndarray  # f32 [n], nats
    greedy: np.ndarray  # bool [n], whether no other token is likelier
    mean: np.ndarray | None = None  # f32 [n], of the log-probability of a token drawn from the model; with `moments`
    variance: np.ndarray | None = None  # f32 [n], likewise


def score_sequences(
    model: Model,
    sequences: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    *,
    alternatives: Sequence[Sequence[int]] | None = None,
    moments: bool = False,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[TokenScores]:
    """Scores the tokens `sequence[first:]` of each of N sequences of at least one token, given all before it.

    Sequences of like length go through the model together, padded to few lengths; the result is in the order given.
    `first` is at least 1 (the default), and a sequence may end before it. `alternatives`: N lists of tokens that are
    scored in the place of a sequence's last one as well, after the others: so options of one token each take one pass.
    """
    starts = [1] * len(sequences) if first is None else list(first)
    others = [()] * len(sequences) if alternatives is None else list(alternatives)
    counts = [max(0, len(s) - f) + len(o) for s, f, o in zip(sequences, starts, others, strict=True)]
    nothing = np.zeros(0, np.float32)
    empty = TokenScores(nothing, nothing.astype(bool), *((nothing, nothing) if moments else ()))
    results = [empty] * len(sequences)
    order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: (len(sequences[i]), counts[i]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]

    def arrays(rows: list[int]) -> tuple[np.ndarray, ...]:
        """(tokens, segments [B, S]; positions that predict a scored token, and that token [B, M])."""
        texts = [sequences[i] for i in rows]
        width, most = padded_size(max(map(len, texts))), padded_size(max(counts[i] for i in rows))
        last = [len(text) - 1 for text in texts]
        places = [[*range(starts[i] - 1, n), *[n - 1] * len(others[i])] for i, n in zip(rows, last, strict=True)]
        targets = [[*sequences[i][starts[i] :], *others[i]] for i in rows]
        segments = [np.ones(len(text)) for text in texts]
        return pad(texts, width=width), pad(segments, width=width), pad(places, width=most), pad(targets, width=most)

    static = (_WITH_MOMENTS if moments else token_scores,)
    passes = map_batches(_scores, _models(model), model.config, map(arrays, batches), mesh=mesh, static=static)
    for rows, columns in zip(batches, passes, strict=True):
        for place_in_batch, i in enumerate(rows):
            results[i] = TokenScores(**{name: values[place_in_batch, : counts[i]] for name, values in columns.items()})
    _finite(np.concatenate([nothing, *(r.log_prob for r in results)]))
    return results


def score_texts(
    model: Model, texts: Sequence[tuple[str, str]], *, max_length: int | None = None, **options: Any
) -> list[tuple[float, bool]]:
    """`score_tokens` of each (context, continuation) as `TextCodec.encode_pair` reads it."""
    codec = TextCodec.of(model)
    pairs = [codec.encode_pair(*pair) for pair in texts]
    return score_tokens(model, pairs, max_length=max_length or codec.context_length, **options)


def score_tokens(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[tuple[float, bool]]:
    """(log-likelihood, nats; whether greedy decoding writes it) of each continuation of a context, in token ids.

    What the model can't read at once is cut from the left. Pairs that differ in nothing but their last token, such as
    the letters of a multiple-choice question, go through the model once.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"pair {number} has {len(context)} tokens and {len(continuation)} after them; expected at least one "
                f"each, and at most max_length = {max_length} after."
            )
        groups.setdefault((*context, *continuation)[-(max_length + 1) : -1], []).append(number)
    results: dict[int, tuple[float, bool]] = {}
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
                    results[number] = total, bool(score.greedy[places].all())
            advance(min(begin + step, len(order)), "")
    return [results[number] for number in range(len(pairs))]


def row_texts(rows: Rows) -> tuple[list[list[int]], list[int]]:
    """The documents of rows as sequences of tokens, and their `first`, for `score_sequences`."""
    documents = list(rows.documents())
    return [d.tokens.tolist() for d in documents], [d.first_target for d in documents]


def spread_indices(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spread and in order: a subset that touches every document it can."""
    most = min(count, most)
    return np.arange(most) * count // max(1, most)


def _finite(nll: np.ndarray) -> np.ndarray:
    if bad := int((~np.isfinite(nll)).sum()):
        raise NonFiniteScore(
            f"the model gives NaN or infinite likelihood for {bad} of {nll.size} scored tokens. The parameters have "
            "diverged: use an earlier checkpoint, or lower the learning rate."
        )
    return nll
