"""Rivals and controls: weights for retain tokens that do not come from matched experts.

Each returns f64 weights that are not normalised yet, per token [T] (valid positions in row order) or per row [N].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.batches import sequential_batches
from trace_jax.data.rows import Rows
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import BATCH_AXES
from trace_jax.routing.config import Hidden
from trace_jax.routing.entropy_balancing import clipped_to_mean_one, effective_sample_size, strongest_balance
from trace_jax.routing.statistics import run_batches

BUCKETS = 10_000  # of hashed n-grams, as in DSIR


def permuted(weights: np.ndarray, units: np.ndarray, *, seed: int) -> np.ndarray:
    """The same weights handed to other units at random: equal histogram, no relation to routing.

    weights f64 [T]; units i64 [T] numbers the unit of each token (all tokens of a unit have one weight).
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    return np.random.default_rng(seed).permutation(weights[first])[unit]


def ngram_log_ratio(forget: Rows, retain: Rows, *, buckets: int = BUCKETS) -> np.ndarray:
    """f64 [N], log p_forget(row) / p_retain(row) of every retain row under bags of hashed uni- and bigrams.

    Both distributions are counted with one added to each bucket. Rows without a valid position get 0. Source: DSIR,
    Xie et al. 2302.03169, eq. 4 (log importance weight).
    """
    forget_counts = 1.0 + np.bincount(np.concatenate(_ngrams(forget, buckets)), minlength=buckets)
    retain_counts = 1.0 + np.bincount(np.concatenate(_ngrams(retain, buckets)), minlength=buckets)
    ratio = np.log(forget_counts / forget_counts.sum()) - np.log(retain_counts / retain_counts.sum())
    return np.array([ratio[grams].sum() for grams in _ngrams(retain, buckets)])


def _ngrams(rows: Rows, buckets: int) -> list[np.ndarray]:
    """For each row the buckets of its unigrams x_t (valid t) and bigrams (x_t, x_{t+1}) (valid t)."""
    tokens = rows.tokens.astype(np.uint64)
    following = np.roll(tokens, -1, axis=1)  # a valid position always has a next token
    unigrams, bigrams = _bucket(tokens, buckets), _bucket((tokens + np.uint64(1)) << np.uint64(32) | following, buckets)
    return [np.concatenate([u[v], b[v]]) for u, b, v in zip(unigrams, bigrams, rows.valid, strict=True)]


def _bucket(keys: np.ndarray, buckets: int) -> np.ndarray:
    """Fixed pseudo-random buckets of 64-bit keys (the finaliser of splitmix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((keys ^ (keys >> np.uint64(31))) % np.uint64(buckets)).astype(np.int64)


def ngram_weights(
    log_ratio: np.ndarray, base: np.ndarray, *, max_weight: float, min_effective_sample_size: float = 0.0
) -> np.ndarray:
    """f64 [N]: exp(b * log_ratio) kept within 1/max_weight and max_weight, mean one.

    The power b is 1, or the largest one (to 1e-6) that keeps the effective sample size, as calibration lowers its
    strength. base f64 [N]: valid tokens per row.
    """
    limit = np.log(max_weight)

    def powered(b: float) -> np.ndarray:
        return np.exp(np.clip(b * log_ratio, -limit, limit))

    low, high = 0.0, 1.0
    if effective_sample_size(powered(1.0), base) >= min_effective_sample_size:
        low = 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        enough = effective_sample_size(powered(middle), base) >= min_effective_sample_size
        low, high = (middle, high) if enough else (low, middle)
    return clipped_to_mean_one(powered(low), np.inf, base)[0]


def domain_weights(domain: np.ndarray, base: np.ndarray) -> np.ndarray:
    """f64 [N]: rows with domain 1 make half of the total mass. An oracle: methods do not know the domain.

    domain i32 [N]; base f64 [N], valid tokens per row.
    """
    inside = domain == 1
    share = base[inside].sum() / base.sum()
    if not 0 < share < 1:
        raise ValueError(
            f"the domain oracle needs retain rows inside and outside of the neighbour domain; {share:.0%} of tokens "
            "are inside. Only embedded benchmarks and text data with a neighbour file know the domain."
        )
    return np.where(inside, 0.5 / share, 0.5 / (1 - share))


def hidden_weights(retain_means: np.ndarray, forget_mean: np.ndarray, base: np.ndarray, settings: Hidden) -> np.ndarray:
    """f64 [N], mean one, clipped: the same calibration on hidden states of rows instead of experts.

    Args:
      retain_means: f64 [N, D], mean final hidden state of every row; forget_mean: f64 [D], over the forget corpus.
      base: f64 [N], valid tokens per row.

    States are standardised by the retain corpus (mean 0, variance 1); the target is `strength` times the forget mean.
    """
    mean = base @ retain_means / base.sum()
    deviation = np.sqrt(base @ (retain_means - mean) ** 2 / base.sum())
    deviation = np.where(deviation > 1e-12, deviation, np.inf)  # a direction that never varies can't be matched
    features, goal = (retain_means - mean) / deviation, (forget_mean - mean) / deviation
    return strongest_balance(features, np.zeros(len(goal)), goal, base=base, settings=settings).weights


def ratio_weights(
    indices: np.ndarray,
    *,
    selected: np.ndarray,
    forget_frequency: np.ndarray,
    retain_frequency: np.ndarray,
    max_ratio: float = 100.0,
) -> np.ndarray:
    """f64 [T]: mean over the selected experts active at t of clip(f^F / f^R, 1, max_ratio), then mean one.

    Cheap, and does not solve the matching. A token that no selected expert handles counts 1 before the normalisation.
    indices integer [L, T, K]; selected bool [L, E]; frequencies f64 [L, E].
    """
    ratio = np.full(retain_frequency.shape, float(max_ratio))
    np.divide(forget_frequency, retain_frequency, out=ratio, where=retain_frequency > 0)
    ratio = np.where(selected, np.clip(ratio, 1.0, max_ratio), 0.0)
    total = sum(values[chosen].sum(-1) for values, chosen in zip(ratio, indices, strict=True))
    active = sum(chosen_in[chosen].sum(-1) for chosen_in, chosen in zip(selected, indices, strict=True))
    weights = np.where(active > 0, total / np.maximum(active, 1), 1.0)
    return weights / weights.mean()


def hidden_sums(model: Model, rows: Rows, *, mesh: Mesh | None = None, batch_size: int = 32) -> np.ndarray:
    """f64 [N, D]: sum over the valid positions of each row of the final hidden states."""
    return _per_row(_hidden, model, rows, mesh, batch_size).astype(np.float64)


def losses(model: Model, rows: Rows, *, mesh: Mesh | None = None, batch_size: int = 32) -> np.ndarray:
    """f32 [N, S]: -log p(x_{t+1} | x_<=t) at every position (meaningless where not valid)."""
    return _per_row(_nll, model, rows, mesh, batch_size)


def _per_row(fn: Callable, model: Model, rows: Rows, mesh: Mesh | None, batch_size: int) -> np.ndarray:
    batches = sequential_batches(rows, batch_size)
    passes = run_batches(model, batches, fn, out_specs=PartitionSpec(BATCH_AXES), mesh=mesh)
    return np.concatenate([values[: len(batch.tokens)] for batch, values in passes])


def _hidden(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
    hidden = forward(params, config, tokens, mask=segments, collect=("hidden",)).hidden
    assert hidden is not None
    return jnp.where(valid[..., None], hidden.astype(jnp.float32), 0.0).sum(axis=1)


def _nll(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
    hidden = forward(params, config, tokens, mask=segments, collect=("hidden",)).hidden
    assert hidden is not None
    return token_nll(params, config, hidden, jnp.roll(tokens, -1, axis=1))
