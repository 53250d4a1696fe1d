"""Scores of single tokens in sequences of any length: what likelihood metrics of all benchmarks are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.rows import Rows
from trace_jax.evaluation.likelihood import check_finite, final_hidden, models_to_run
from trace_jax.models.config import ModelConfig
from trace_jax.models.generate import padded_size
from trace_jax.models.loss import token_scores
from trace_jax.models.model import Model
from trace_jax.models.sharding import on_mesh
from trace_jax.parallel.hosts import place, to_host
from trace_jax.parallel.mesh import ROWS, row_shards


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
    devices = 1 if mesh is None else row_shards(mesh)
    models = models_to_run(model.params, model.guide, model.config, mesh)
    function = _scoring_function(model.config, moments, mesh)
    order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: (len(sequences[i]), counts[i]))
    size = -(-min(batch_size, max(1, len(order))) // devices) * devices
    pending = []
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        arrays = _batch([sequences[i] for i in rows], [starts[i] for i in rows], [others[i] for i in rows], size)
        pending.append(
            (rows, function(models, *(arrays if mesh is None else place(arrays, mesh, PartitionSpec(ROWS)))))
        )
    for rows, found in pending:
        columns = {name: to_host(values) for name, values in found.items()}
        for place_in_batch, i in enumerate(rows):
            results[i] = TokenScores(**{name: values[place_in_batch, : counts[i]] for name, values in columns.items()})
    check_finite(np.concatenate([nothing, *(r.log_prob for r in results)]))
    return results


def _batch(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], others: Sequence[Sequence[int]], size: int
) -> tuple[np.ndarray, ...]:
    """(tokens, mask [size, S]; positions that predict a scored token, and that token [size, M]), all i32.

    Padding is at the end; missing rows repeat the first.
    """
    width = padded_size(max(len(s) for s in sequences))
    most = padded_size(max(len(s) - f + len(o) for s, f, o in zip(sequences, starts, others, strict=True)))
    tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
    positions, targets = np.zeros((size, most), np.int32), np.zeros((size, most), np.int32)
    for row in range(size):
        source = row if row < len(sequences) else 0
        sequence, start, other = sequences[source], starts[source], others[source]
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        scored = len(sequence) - start
        end = scored + len(other)
        positions[row, :scored], targets[row, :scored] = np.arange(start - 1, len(sequence) - 1), sequence[start:]
        positions[row, scored:end], targets[row, scored:end] = len(sequence) - 2, other
    return tokens, mask, positions, targets


@functools.lru_cache(maxsize=16)
def _scoring_function(config: ModelConfig, moments: bool, mesh: Mesh | None):
    def function(models, tokens, mask, positions, targets):
        hidden = final_hidden(models, config, tokens, mask)
        hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        return token_scores(models[0], config, hidden, targets, moments=moments)

    if mesh is not None:
        function = on_mesh(function, config, mesh, out_specs=PartitionSpec(ROWS))
    return jax.jit(function)


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
