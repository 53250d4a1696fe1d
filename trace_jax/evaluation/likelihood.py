"""Scoring by likelihood: NLL of rows, of the options of questions, of sequences of any length; norms of gradients.

One function scores everything. It gathers the hidden states at the positions that are scored before the output head
runs, so that a question pays for the logits of its options only. Batches have one shape per call; the last one is
filled up with copies of its first row, whose scores are dropped.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.corpora import Questions
from trace_jax.data.rows import Rows
from trace_jax.io.progress import tracked
from trace_jax.models.arrays import flatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import padded_size
from trace_jax.models.loss import token_nll, token_scores
from trace_jax.models.model import Model
from trace_jax.models.sharding import map_batches, on_mesh, pad, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, place, row_shards, to_host


class NonFiniteScore(FloatingPointError):
    """The model's likelihoods are NaN or infinite, so that no score can be given."""


@dataclasses.dataclass(frozen=True)
class RowScores:
    """Scores of rows. `token_nll` f32 [N, S] in nats, zero where not `valid` bool [N, S]."""

    token_nll: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.token_nll)

    @property
    def nll(self) -> np.ndarray:
        """Sum over the valid positions of each row, f64 [N], nats."""
        return self.token_nll.sum(axis=1, dtype=np.float64)

    @property
    def tokens(self) -> np.ndarray:
        """Scored tokens of each row, f64 [N]."""
        return self.valid.sum(axis=1).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class QuestionScores:
    """Log-likelihood of every option, f64 [Q, O] (sum over its tokens, nats), with `answer` and `group` i32 [Q]."""

    log_likelihood: np.ndarray
    answer: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.log_likelihood)

    @property
    def correct(self) -> np.ndarray:
        """bool [Q]: the right option is the likeliest (the first of equal ones is taken, as argmax does)."""
        return self.log_likelihood.argmax(axis=1) == self.answer


def score_rows(
    params: Any,
    config: ModelConfig,
    rows: Rows,
    *,
    guide: Any = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> RowScores:
    """NLL of every valid position of `rows` [N, S], `batch_size` rows at a time, split over `mesh` if given.

    Args:
      guide: parameters of a model of the same shape; every token uses the experts that the guide chooses for it.

    Raises:
      ValueError: a guide of another shape.
      NonFiniteScore: the model gives NaN or infinite likelihoods.
    """
    positions = np.broadcast_to(np.arange(rows.tokens.shape[1], dtype=np.int32), rows.tokens.shape)
    nll = _nll(_models(params, guide), config, rows.tokens, rows.segments, positions, batch_size, mesh)
    nll = np.where(rows.valid, nll, np.float32(0))
    check_finite(nll)
    return RowScores(nll, np.asarray(rows.valid, bool))


def score_questions(
    params: Any,
    config: ModelConfig,
    questions: Questions,
    *,
    guide: Any = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> QuestionScores:
    """Log-likelihood of every option of `questions`, `batch_size` questions at a time; arguments as `score_rows`."""
    count, options, _ = questions.tokens.shape
    tokens, segments, scored = (
        x.reshape(count * options, -1) for x in (questions.tokens, questions.segments, questions.scored)
    )
    most = max(1, int(scored.sum(axis=1).max()))
    positions = np.argsort(~scored, axis=1, kind="stable")[:, :most].astype(np.int32)
    nll = _nll(_models(params, guide), config, tokens, segments, positions, batch_size * options, mesh)
    nll = np.where(np.take_along_axis(scored, positions, axis=1), nll, np.float32(0))
    check_finite(nll)
    totals = -nll.sum(axis=1, dtype=np.float64).reshape(count, options)
    return QuestionScores(totals, np.asarray(questions.answer), np.asarray(questions.group))


def _nll(
    models: tuple[Any, ...],
    config: ModelConfig,
    tokens: np.ndarray,
    segments: np.ndarray,
    positions: np.ndarray,
    batch_size: int,
    mesh: Mesh | None,
) -> np.ndarray:
    """NLL f32 [N, M] of the token after each of `positions` i32 [N, M] in `tokens` [N, S]."""
    targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    arrays = tokens, segments, positions, np.take_along_axis(targets, positions, axis=1)
    count, shards = len(tokens), 1 if mesh is None else row_shards(mesh)
    size = -(-min(batch_size, count) // shards) * shards

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for start in range(0, count, size):
            rows = np.arange(start, start + size)
            yield tuple(x[np.where(rows < count, rows, 0)].astype(np.int32) for x in arrays)

    passes = map_batches(_scores, models, config, batches(), mesh=mesh, static=(token_nll,))
    return np.concatenate(list(passes))[:count]


def _scores(
    models: tuple[Any, ...],
    config: ModelConfig,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    score: Any,
) -> Any:
    """`score` of `targets` [B, M] as what follows `positions` [B, M] of `tokens` [B, S].

    If there is a second model, the guide, every token uses the experts that the guide chooses for it.
    """
    params, *guides = models
    experts = None
    for guide in guides:
        experts = forward(guide, config, tokens, mask=segments, collect=("indices",)).router.indices
    hidden = forward(params, config, tokens, mask=segments, collect=("hidden",), experts=experts).hidden
    assert hidden is not None  # it was asked for
    return score(params, config, jnp.take_along_axis(hidden, positions[:, :, None], axis=1), targets)


_with_moments = functools.partial(token_scores, moments=True)


def _models(params: Any, guide: Any) -> tuple[Any, ...]:
    """Parameters alone, or with those of a guide (None: there is none).

    Raises:
      ValueError: the guide's parameters have other names or shapes.
    """
    if guide is None:
        return (params,)
    own, other = ({path: array.shape for path, array in flatten(model).items()} for model in (params, guide))
    for path in sorted(own.keys() | other.keys()):
        if own.get(path) != other.get(path):
            raise ValueError(
                f"{path} has shape {other.get(path)} in the guide and {own.get(path)} in the model that it guides; "
                "expected the parameters of a model of the same shape."
            )
    return params, guide


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Scores of the scored tokens of one sequence, in its order.

    Attributes:
      log_prob: f32 [n], nats.
      greedy: bool [n], whether no other token is likelier.
      mean, variance: f32 [n], of the log-probability of a token drawn from the model's own distribution at that place;
        None unless they were asked for.
    """

    log_prob: np.ndarray
    greedy: np.ndarray
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None


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
    """Scores the tokens `sequence[first:]` of every sequence, each given all tokens before it.

    Sequences of like length go through the model together, padded to few lengths; the result is in the order given.

    Args:
      model: with a guide, its routing is forced on the model.
      sequences: token ids, N sequences of at least one token.
      first: index of the first token that is scored, at least 1 (the default). Where a sequence ends before it,
        nothing is scored.
      alternatives: N lists of tokens that are scored in the place of a sequence's last one as well, after the others.
        So the options of a question that are one token each take one pass.
      moments: whether `mean` and `variance` are wanted.
      batch_size, mesh: sequences per batch, and the devices that share it (None: the default device).

    Raises:
      ValueError: an empty sequence, a `first` below 1, alternatives to a last token that isn't scored, or a guide of
        another shape.
      NonFiniteScore: the model gives NaN or infinite likelihoods.
    """
    starts = [1] * len(sequences) if first is None else [int(f) for f in first]
    if any(not len(s) for s in sequences) or any(f < 1 for f in starts) or len(starts) != len(sequences):
        raise ValueError(
            "a sequence is scored from its second token or a later one; got an empty sequence, a first below 1, or "
            f"{len(starts)} firsts for {len(sequences)} sequences."
        )
    others = [()] * len(sequences) if alternatives is None else list(alternatives)
    if any(len(o) and len(s) <= f for s, f, o in zip(sequences, starts, others, strict=True)):
        raise ValueError("alternatives to the last token of a sequence are given, and that token isn't scored.")
    counts = [max(0, len(s) - f) + len(o) for s, f, o in zip(sequences, starts, others, strict=True)]
    nothing = np.zeros(0, np.float32)
    empty = TokenScores(nothing, nothing.astype(bool), *((nothing, nothing) if moments else ()))
    results = [empty] * len(sequences)
    order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: (len(sequences[i]), counts[i]))
    shards = 1 if mesh is None else row_shards(mesh)
    size = -(-min(batch_size, max(1, len(order))) // shards) * shards
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]

    def arrays(rows: list[int]) -> tuple[np.ndarray, ...]:
        """(tokens, segments [size, S]; positions that predict a scored token, and that token [size, M])."""
        rows = rows + rows[:1] * (size - len(rows))
        texts = [sequences[i] for i in rows]
        width, most = padded_size(max(map(len, texts))), padded_size(max(counts[i] for i in rows))
        last = [len(text) - 1 for text in texts]
        places = [[*range(starts[i] - 1, n), *[n - 1] * len(others[i])] for i, n in zip(rows, last, strict=True)]
        targets = [[*sequences[i][starts[i] :], *others[i]] for i in rows]
        segments = [np.ones(len(text)) for text in texts]
        return pad(texts, width=width), pad(segments, width=width), pad(places, width=most), pad(targets, width=most)

    score, models = _with_moments if moments else token_scores, _models(model.params, model.guide)
    passes = map_batches(_scores, models, model.config, map(arrays, batches), mesh=mesh, static=(score,))
    for rows, columns in zip(batches, passes, strict=True):
        for place_in_batch, i in enumerate(rows):
            results[i] = TokenScores(**{name: values[place_in_batch, : counts[i]] for name, values in columns.items()})
    check_finite(np.concatenate([nothing, *(r.log_prob for r in results)]))
    return results


def row_texts(rows: Rows) -> tuple[list[list[int]], list[int]]:
    """Sequences of tokens and their `first`, for `score_sequences`: every document of `rows` that has a scored token.

    From the first token that a valid position predicts, all are scored.
    """
    texts, first = [], []
    for tokens, segments, valid in zip(rows.tokens, rows.segments, rows.valid, strict=True):
        for document in range(1, int(segments.max(initial=0)) + 1):
            own = segments == document
            if valid[own].any():
                texts.append(tokens[own].tolist())
                first.append(1 + int(np.argmax(valid[own])))
    return texts, first


def gradient_norms(
    model: Model, sequences: Sequence[Sequence[int]], first: Sequence[int], *, mesh: Mesh | None = None
) -> np.ndarray:
    """Euclidean norm over all parameters of the gradient of each text's mean loss: f64 [N] (2402.17012, p = 2).

    One text at a time, with memory for one gradient of the size of the parameters; its layers are computed again in
    the backward pass. open-unlearning averages the norms of single tensors instead, which depends on how a model's
    parameters are cut into tensors.

    Args:
      sequences: token ids; `sequence[first:]` is scored, at least one token of each.
      mesh: devices that hold the parameters and the gradient; None: the default device.
    """
    params = model.unguided("a gradient")
    params = params if mesh is None else placed_params(params, model.config, mesh)
    shards = 1 if mesh is None else row_shards(mesh)
    function, norms = _norm_function(model.config, mesh), []
    for sequence, start in tracked(zip(sequences, first, strict=True), "gradient norms", len(sequences)):
        if not 1 <= start < len(sequence):
            raise ValueError(f"a gradient needs a scored token; of {len(sequence)} tokens the first is {start}.")
        width, scored = padded_size(len(sequence)), len(sequence) - start
        rows = ([list(x)] * shards for x in (sequence, [1] * len(sequence), sequence[1:]))
        weights = pad([[0.0] * (start - 1) + [1 / scored] * scored], width=width, count=shards, dtype=np.float32)
        arrays = (*(pad(x, width=width) for x in rows), weights)
        arrays = arrays if mesh is None else place(arrays, mesh, PartitionSpec(BATCH_AXES))
        norms.append(float(to_host(function(params, *arrays))))
    return np.array(norms, np.float64)


@functools.lru_cache(maxsize=4)
def _norm_function(config: ModelConfig, mesh: Mesh | None):
    def loss(params, tokens, mask, targets, weights):
        hidden = forward(params, config, tokens, mask=mask, collect=("hidden",), remat="layer").hidden
        assert hidden is not None  # it was asked for
        total = (token_nll(params, config, hidden, targets) * weights).sum()
        return total if mesh is None else jax.lax.psum(total, BATCH_AXES)

    function = loss if mesh is None else on_mesh(loss, config, mesh, out_specs=PartitionSpec())

    def norm(params, *arrays):
        gradient = jax.grad(function)(params, *arrays)
        squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(gradient)]
        return jnp.sqrt(jnp.stack(squares).sum())

    return jax.jit(norm)


def spread_indices(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spread and in order: a subset that touches every document it can."""
    if count <= most:
        return np.arange(count)
    return (np.arange(most) * count) // most


def check_finite(nll: np.ndarray) -> None:
    """Raises `NonFiniteScore` if a likelihood of a model is NaN or infinite."""
    bad = int((~np.isfinite(nll)).sum())
    if bad:
        raise NonFiniteScore(
            f"the model gives NaN or infinite likelihood for {bad} of {nll.size} scored tokens. The parameters have "
            "diverged: use an earlier checkpoint, or lower the learning rate."
        )
