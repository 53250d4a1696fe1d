"""Scoring by likelihood: NLL of rows, and of the options of multiple-choice questions.

One jitted function serves every score. It gathers the hidden states at the positions that are scored before the
output head runs, so that a question pays for the logits of its options only. Batches have one shape per call; the
last one is filled up with copies of the first row, whose scores are dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.probes import Questions
from trace_jax.data.rows import Rows
from trace_jax.models.arrays import flatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.hosts import place, to_host
from trace_jax.parallel.mesh import ROWS, row_shards


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
    models = models_to_run(params, guide, config, mesh)
    nll = _score(models, config, rows.tokens, rows.segments, positions, batch_size=batch_size, mesh=mesh)
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
    """Log-likelihood of every option of `questions`, `batch_size` questions at a time.

    Args:
      guide: see `score_rows`.

    Raises:
      ValueError: a guide of another shape.
      NonFiniteScore: the model gives NaN or infinite likelihoods.
    """
    count, options, _ = questions.tokens.shape
    tokens, segments, scored = (
        x.reshape(count * options, -1) for x in (questions.tokens, questions.segments, questions.scored)
    )
    positions, real = _scored_positions(scored)
    models = models_to_run(params, guide, config, mesh)
    nll = _score(models, config, tokens, segments, positions, batch_size=batch_size * options, mesh=mesh)
    nll = np.where(real, nll, np.float32(0))
    check_finite(nll)
    totals = -nll.sum(axis=1, dtype=np.float64).reshape(count, options)
    return QuestionScores(totals, np.asarray(questions.answer), np.asarray(questions.group))


def spread_indices(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spread and in order: a subset that touches every document it can."""
    if count <= most:
        return np.arange(count)
    return (np.arange(most) * count) // most


def models_to_run(params: Any, guide: Any, config: ModelConfig, mesh: Mesh | None) -> tuple[Any, ...]:
    """What `final_hidden` takes: parameters alone or with those of a guide (None: there is none), on `mesh` if given.

    Raises:
      ValueError: the guide's parameters have other names or shapes.
    """
    if guide is None:
        models = (params,)
    else:
        models = (params, guide)
        own, other = ({path: array.shape for path, array in flatten(model).items()} for model in models)
        for path in sorted(own.keys() | other.keys()):
            if own.get(path) != other.get(path):
                raise ValueError(
                    f"{path} has shape {other.get(path)} in the guide and {own.get(path)} in the model that it guides; "
                    "expected the parameters of a model of the same shape."
                )
    return models if mesh is None else tuple(placed_params(model, config, mesh) for model in models)


def final_hidden(models: tuple[Any, ...], config: ModelConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, S, D]: final hidden states of the first of `models` (`models_to_run`) on `tokens` i32 [B, S].

    If there is a second, the guide, every token uses the experts that the guide chooses for it.
    """
    params, *guides = models
    experts = None
    for guide in guides:
        experts = forward(guide, config, tokens, mask=mask, collect=("indices",)).router.indices
    hidden = forward(params, config, tokens, mask=mask, collect=("hidden",), experts=experts).hidden
    assert hidden is not None  # it was asked for
    return hidden


def _score(
    models: tuple[Any, ...],
    config: ModelConfig,
    tokens: np.ndarray,
    segments: np.ndarray,
    positions: np.ndarray,
    *,
    batch_size: int,
    mesh: Mesh | None,
) -> np.ndarray:
    """NLL f32 [N, M] of the token after each of `positions` i32 [N, M] in `tokens` [N, S]."""
    devices, count = 1 if mesh is None else row_shards(mesh), len(tokens)
    batch_size = -(-min(batch_size, count) // devices) * devices
    targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    targets = np.take_along_axis(targets, positions, axis=1)
    function, pending = _scoring_function(config, mesh), []
    for start in range(0, count, batch_size):
        batch = np.arange(start, start + batch_size)
        batch[batch >= count] = 0
        arrays = tuple(x[batch].astype(np.int32) for x in (tokens, segments, positions, targets))
        pending.append(function(models, *(arrays if mesh is None else place(arrays, mesh, PartitionSpec(ROWS)))))
    return np.concatenate([to_host(x) for x in pending])[:count]


@functools.lru_cache(maxsize=16)
def _scoring_function(config: ModelConfig, mesh: Mesh | None):
    def function(models, tokens, segments, positions, targets):
        hidden = final_hidden(models, config, tokens, segments)
        hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        return token_nll(models[0], config, hidden, targets)

    if mesh is not None:
        function = on_mesh(function, config, mesh, out_specs=PartitionSpec(ROWS))
    return jax.jit(function)


def _scored_positions(scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions i32 [N, M] that are True in `scored` bool [N, S], and which of them are real, bool [N, M]."""
    most = max(1, int(scored.sum(axis=1).max()))
    positions = np.argsort(~scored, axis=1, kind="stable")[:, :most].astype(np.int32)
    return positions, np.take_along_axis(scored, positions, axis=1)


def check_finite(nll: np.ndarray) -> None:
    """Raises `NonFiniteScore` if a likelihood of a model is NaN or infinite."""
    bad = int((~np.isfinite(nll)).sum())
    if bad:
        raise NonFiniteScore(
            f"the model gives NaN or infinite likelihood for {bad} of {nll.size} scored tokens. The parameters have "
            "diverged: use an earlier checkpoint, or lower the learning rate."
        )
