"""Rivals and controls: weights for retain tokens that do not come from matched experts.

Each gives f64 weights or scores per token [T] (valid positions in row order) or per row [N].
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.routing import config as settings
from trace_jax.routing import solver
from trace_jax.routing.statistics import map_model

BUCKETS = 10_000  # of hashed n-grams, as in DSIR


def weights_without_experts(
    weighting: settings.Weighted, model: Model, forget: Rows, retain: Rows, **passes: Any
) -> np.ndarray:
    """f64 [T], for every weighting that looks at no expert; `passes`: mesh and batch_size of passes over the rows."""
    lengths, row = retain.valid.sum(axis=1).astype(np.float64), np.nonzero(retain.valid)[0]
    filled, by_row = np.flatnonzero(lengths), np.zeros(len(retain))
    base = lengths[filled]
    match weighting:
        case settings.Loss():
            found = np.maximum(losses(model, retain, **passes)[retain.valid].astype(np.float64), 1e-12)
            return bounded(np.log(found), np.ones(len(found)), weighting)
        case settings.Domain():
            scores = domain_scores(retain.domain[filled], base)
        case settings.NGram():
            scores = ngram_log_ratio(forget, retain)[filled]
        case settings.Gradient():
            scores = 100.0 * gradient_cosines(model, forget, retain.take(filled))  # so that the bound decides
        case settings.Hidden() | settings.Similarity():
            forget, retain = forget.take(np.flatnonzero(forget.valid.any(axis=1))), retain.take(filled)
            own, others = (_per_row(_hidden, model, rows, **passes).astype(np.float64) for rows in (forget, retain))
            if isinstance(weighting, settings.Hidden):
                means, forget_mean = others / base[:, None], own.sum(axis=0) / forget.valid.sum()
                by_row[filled] = hidden_weights(means, forget_mean, base, weighting)
                return by_row[row]
            counts = nearest_counts(own, others, base, weighting.min_effective_sample_size)
            scores = np.log(np.maximum(counts, 1e-300))
        case _:
            raise NotImplementedError(weighting.name)
    by_row[filled] = bounded(scores, base, weighting)
    return by_row[row]


def bounded(scores: np.ndarray, base: np.ndarray, weighting: settings.Weighted) -> np.ndarray:
    """f64 [U]: exp(score), with the bounds that a weighting sets (`trace_jax.routing.solver.concentrated`)."""
    size = weighting.min_effective_sample_size
    return solver.concentrated(scores, base, size=size, max_weight=weighting.max_weight)


def permuted(weights: np.ndarray, units: np.ndarray, *, seed: int) -> np.ndarray:
    """The same weights handed to other units at random: equal histogram, no relation to routing.

    weights f64 [T]; units i64 [T] numbers the unit of each token (all tokens of a unit have one weight).
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    return np.random.default_rng(seed).permutation(weights[first])[unit]


def ngram_log_ratio(forget: Rows, retain: Rows) -> np.ndarray:
    """f64 [N], log p_forget(row) / p_retain(row) of every retain row under bags of hashed uni- and bigrams.

    Both distributions are counted with one added to each bucket. Rows without a valid position get 0. Source: DSIR,
    Xie et al. 2302.03169, eq. 4 (log importance weight).
    """
    grams = _ngrams(retain)
    counts = [1.0 + np.bincount(np.concatenate(g), minlength=BUCKETS) for g in (_ngrams(forget), grams)]
    forget_log, retain_log = (np.log(c / c.sum()) for c in counts)
    ratio = forget_log - retain_log
    return np.array([ratio[g].sum() for g in grams])


def _ngrams(rows: Rows) -> list[np.ndarray]:
    """For each row the buckets of its unigrams x_t (valid t) and bigrams (x_t, x_{t+1}) (valid t)."""
    tokens = rows.tokens.astype(np.uint64)
    following = np.roll(tokens, -1, axis=1)  # a valid position always has a next token
    keys = np.stack([tokens, (tokens + np.uint64(1)) << np.uint64(32) | following], axis=1)  # [N, 2, S]
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # the finaliser of splitmix64
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    buckets = ((keys ^ (keys >> np.uint64(31))) % np.uint64(BUCKETS)).astype(np.int64)
    return [both[:, valid].ravel() for both, valid in zip(buckets, rows.valid, strict=True)]


def gradient_cosines(model: Model, forget: Rows, retain: Rows) -> np.ndarray:
    """f64 [N]: the cosine of |d NLL / d parameters| of every retain row with that of the forget corpus.

    Where domains were damaged to different degrees, it told them best (docs/results.md, question 2).
    """
    total: Any = None
    for arrays in _single(forget):
        gradient = _gradient(model.params, model.config, *arrays)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    size = jax.tree.map(jnp.abs, total)
    return np.array([float(_cosine(size, model.params, model.config, *arrays)) for arrays in _single(retain)])


def _single(rows: Rows) -> Iterator[tuple[np.ndarray, ...]]:
    """Tokens, segments and valid positions of each row, [1, S]."""
    return ((rows.tokens[i : i + 1], rows.segments[i : i + 1], rows.valid[i : i + 1]) for i in range(len(rows)))


@functools.partial(jax.jit, static_argnums=1)
def _gradient(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> Any:
    def nll(params):
        return jnp.where(valid, _nll(params, config, tokens, segments, valid), 0.0).sum()

    return jax.grad(nll)(params)


@functools.partial(jax.jit, static_argnums=2)
def _cosine(size: Any, params: Any, config: ModelConfig, *arrays: jax.Array) -> jax.Array:
    own = jax.tree.map(lambda x: jnp.abs(x.astype(jnp.float32)), _gradient(params, config, *arrays))

    def product(a: Any, b: Any) -> jax.Array:
        return jnp.stack(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b))).sum()

    size = jax.tree.map(lambda x: x.astype(jnp.float32), size)
    return product(own, size) / jnp.maximum(jnp.sqrt(product(own, own) * product(size, size)), 1e-30)


def domain_scores(domain: np.ndarray, base: np.ndarray) -> np.ndarray:
    """f64 [N]: far higher for rows with domain 1. An oracle: methods do not know the domain.

    domain i32 [N]; base f64 [N], valid tokens per row.
    """
    share = base[domain == 1].sum() / base.sum()
    if not 0 < share < 1:
        raise ValueError(
            f"the domain oracle needs retain rows inside and outside of the neighbour domain; {share:.0%} of tokens "
            "are inside. Only embedded benchmarks and text data with a neighbour file know the domain."
        )
    return 50.0 * (domain == 1)


def hidden_weights(
    retain_means: np.ndarray, forget_mean: np.ndarray, base: np.ndarray, weighting: settings.Hidden
) -> np.ndarray:
    """f64 [N], mean one: the same calibration on hidden states of rows instead of experts.

    Args:
      retain_means: f64 [N, D], mean final hidden state of every row; forget_mean: f64 [D], over the forget corpus.
      base: f64 [N], valid tokens per row.

    States are standardised by the retain corpus (mean 0, variance 1).
    """
    mean = base @ retain_means / base.sum()
    deviation = np.sqrt(base @ (retain_means - mean) ** 2 / base.sum())
    deviation = np.where(deviation > 1e-12, deviation, np.inf)  # a direction that never varies can't be matched
    features, goal = (retain_means - mean) / deviation, (forget_mean - mean) / deviation
    sizes = [weighting.min_effective_sample_size]
    return solver.closest_match(features, goal, base=base, sizes=sizes, max_weight=weighting.max_weight)[0].weights


def nearest_counts(forget: np.ndarray, retain: np.ndarray, base: np.ndarray, size: float) -> np.ndarray:
    """f64 [N], of how many forget rows each retain row is among the nearest by the cosine of their states [*, D].

    Every forget row takes its nearest retain row, then each its second nearest, and so on, in every round the most
    similar pairs first, until the effective sample size of the counts is `size`. The data sets that OpenReview
    EyXBv291ST publishes are taken so (praveensonu/iclr2026: columns rank_in_group and semantic_score of data/mix), from
    embeddings of sentence-transformers, until pairs are 5, 10 or 20 % of the retain set. base f64 [N]: valid tokens.
    """
    forget, retain = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (forget, retain))
    rounds = max(1, min(len(retain), math.ceil(size * len(retain) / len(forget))))  # fewer can't be enough

    def nearest(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosines = chunk @ retain.T
        rows = np.argsort(-cosines, axis=1, kind="stable")[:, :rounds]
        return rows, np.take_along_axis(cosines, rows, axis=1)

    while True:
        chunks = [nearest(forget[start : start + 512]) for start in range(0, len(forget), 512)]
        rows, cosines = (np.concatenate(parts).T.ravel() for parts in zip(*chunks, strict=True))
        taken = rows[np.lexsort((-cosines, np.repeat(np.arange(rounds), len(forget))))]
        order = np.argsort(taken, kind="stable")
        before = np.empty(len(taken), np.int64)  # how often a pair's row was taken before
        before[order] = np.arange(len(taken)) - np.searchsorted(taken[order], taken[order])
        sizes = np.cumsum(base[taken]) ** 2 / (base.sum() * np.cumsum(base[taken] * (2 * before + 1)))
        enough = np.flatnonzero(sizes[len(forget) - 1 :] >= size)
        if len(enough) or rounds == len(retain):
            number = len(forget) + (enough[0] if len(enough) else len(taken))
            return np.bincount(taken[:number], minlength=len(retain)).astype(np.float64)
        rounds = min(2 * rounds, len(retain))


def ratio_weights(
    indices: np.ndarray, selected: np.ndarray, forget: np.ndarray, retain: np.ndarray, max_ratio: float
) -> np.ndarray:
    """f64 [T]: mean over the selected experts active at t of clip(f^F / f^R, 1, max_ratio).

    Cheap, and does not solve the matching. A token that no selected expert handles counts 1.
    indices integer [L, T, K]; selected bool [L, E]; forget, retain: frequencies f64 [L, E].
    """
    ratio = np.full(retain.shape, float(max_ratio))
    np.divide(forget, retain, out=ratio, where=retain > 0)
    ratio = np.where(selected, np.clip(ratio, 1.0, max_ratio), 0.0)
    total = sum(values[chosen].sum(-1) for values, chosen in zip(ratio, indices, strict=True))
    active = sum(chosen_in[chosen].sum(-1) for chosen_in, chosen in zip(selected, indices, strict=True))
    return np.where(active > 0, total / np.maximum(active, 1), 1.0)


def losses(model: Model, rows: Rows, *, mesh: Mesh | None = None, batch_size: int = 32) -> np.ndarray:
    """f32 [N, S]: -log p(x_{t+1} | x_<=t) at every position (meaningless where not valid)."""
    return _per_row(_nll, model, rows, mesh, batch_size)


def _per_row(fn: Callable, model: Model, rows: Rows, mesh: Mesh | None, batch_size: int) -> np.ndarray:
    passes = map_model(fn, model, sequential_batches(rows, batch_size), mesh)
    return np.concatenate([values[: len(batch.valid)] for batch, values in passes])


def _hidden(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
    """f32 [B, D]: sum over the valid positions of each row of the final hidden states."""
    hidden: Any = forward(params, config, tokens, mask=segments, collect=("hidden",)).hidden
    return jnp.where(valid[..., None], hidden.astype(jnp.float32), 0.0).sum(axis=1)


def _nll(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
    hidden: Any = forward(params, config, tokens, mask=segments, collect=("hidden",)).hidden
    return token_nll(params, config, hidden, jnp.roll(tokens, -1, axis=1))
