"""From multipliers to weights: w = min(exp(lambda . a - log_normalizer), max_weight) * scale, mean one over the corpus.

`token_weights` is what runs on a device, beside a forward pass; `corpus_weights` is the same in float64 for the whole
retain corpus. Both need nothing but the chosen experts of each token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.routing.features import unit_means
from trace_jax.routing.statistics import Assignments, as_assignments

if TYPE_CHECKING:
    from trace_jax.routing.calibration import Calibration
    from trace_jax.routing.online import OnlineWeights


def token_weights(
    indices: jax.Array, calibration: Calibration | OnlineWeights, *, mask: jax.Array | None = None
) -> jax.Array:
    """Weights of tokens from their chosen experts, in float32; usable under `jax.jit`.

    Args:
      indices: i32 [L, ..., K], `forward(..., collect=("indices",)).router.indices`. For unit "row" and "window" the
        shape is [L, B, S, K] and a row of the batch is a row of the corpus.
      calibration: the result of `calibrate` (a constant of the jitted function), or its `OnlineWeights` (arguments).
      mask: bool [...], the valid positions; others get weight zero and are left out of rows and windows. Default: all.

    Returns:
      f32 [...], the weights; their mean over the valid positions of the retain corpus is one.
    """
    multipliers = jnp.asarray(calibration.multipliers, jnp.float32)
    if indices.shape[0] != multipliers.shape[0]:
        raise ValueError(f"indices has {indices.shape[0]} layers; the calibration was made for {multipliers.shape[0]}.")
    if calibration.unit != "token" and indices.ndim != 4:
        raise ValueError(f"weights per {calibration.unit} need indices [L, B, S, K]; got shape {indices.shape}.")
    scores = jax.vmap(lambda values, chosen: values[chosen])(multipliers, indices).sum(axis=(0, -1))
    valid = jnp.ones(scores.shape, bool) if mask is None else mask
    if calibration.unit == "row":
        tokens = jnp.maximum(valid.sum(axis=1, keepdims=True, dtype=jnp.float32), 1.0)
        scores = jnp.broadcast_to(jnp.where(valid, scores, 0.0).sum(axis=1, keepdims=True) / tokens, scores.shape)
    elif calibration.unit == "window":
        scores = jax.vmap(lambda s, v: _window_mean(s, v, calibration.window or 1))(scores, valid)
    raw = jnp.exp(scores - jnp.asarray(calibration.log_normalizer, jnp.float32))
    weights = jnp.minimum(raw, jnp.asarray(calibration.max_weight, jnp.float32)) * jnp.asarray(
        calibration.scale, jnp.float32
    )
    return jnp.where(valid, weights, 0.0)


def _window_mean(scores: jax.Array, valid: jax.Array, window: int) -> jax.Array:
    """Mean of `scores` f32 [S] over the last `window` valid positions up to each valid position."""
    length = scores.shape[0]
    window = min(window, length)
    rank = jnp.cumsum(valid.astype(jnp.int32))  # valid positions up to here
    place = jnp.where(valid, rank - 1, length)
    packed = jnp.zeros((length,), scores.dtype).at[place].set(scores, mode="drop")
    sums = jax.lax.reduce_window(packed, jnp.float32(0), jax.lax.add, (window,), (1,), [(window - 1, 0)])
    return sums[jnp.maximum(rank - 1, 0)] / jnp.clip(rank, 1, window).astype(jnp.float32)


def corpus_weights(
    assignments: Assignments | np.ndarray, calibration: Calibration, *, rows: np.ndarray | None = None
) -> np.ndarray:
    """f64 [T]: the weight of every token of the corpus `assignments` (its mean is one on the calibrated corpus)."""
    tokens = as_assignments(assignments, rows)
    pairs = zip(calibration.multipliers, tokens.indices, strict=True)
    scores = np.sum([values[chosen].sum(-1) for values, chosen in pairs], axis=0)
    scores = unit_means(scores, tokens.rows, unit=calibration.unit, window=calibration.window)
    return np.minimum(np.exp(scores - calibration.log_normalizer), calibration.max_weight) * calibration.scale


def ratio_weights(
    assignments: Assignments | np.ndarray,
    *,
    selected: np.ndarray,
    forget_frequency: np.ndarray,
    retain_frequency: np.ndarray,
    max_ratio: float = 100.0,
) -> np.ndarray:
    """f64 [T]: mean over the selected experts active at t of clip(f^F / f^R, 1, max_ratio), then mean one.

    Cheap, and does not solve the matching. A token that no selected expert handles counts 1 before the normalisation.
    selected bool [L, E]; frequencies f64 [L, E].
    """
    tokens = as_assignments(assignments)
    positive = retain_frequency > 0
    ratio = np.full(retain_frequency.shape, float(max_ratio))
    np.divide(forget_frequency, retain_frequency, out=ratio, where=positive)
    ratio = np.where(selected, np.clip(ratio, 1.0, max_ratio), 0.0)
    total = sum(values[chosen].sum(-1) for values, chosen in zip(ratio, tokens.indices, strict=True))
    active = sum(chosen_in[chosen].sum(-1) for chosen_in, chosen in zip(selected, tokens.indices, strict=True))
    weights = np.where(active > 0, total / np.maximum(active, 1), 1.0)
    return weights / weights.mean()


def weighted_frequency(indices: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """f64 [L, E]: sum_t w_t a_t / sum_t w_t. indices integer [L, T, K], weights f64 [T]."""
    repeated = np.repeat(weights, indices.shape[2])
    sums = [np.bincount(layer.ravel(), repeated, minlength=num_experts) for layer in indices]
    return np.stack(sums) / weights.sum()


def clipped_to_mean_one(
    weights: np.ndarray, max_weight: float, base: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """(min(weights, max_weight) * scale, scale) with mean one. `base`: how much each entry counts."""
    base = np.ones(weights.shape) if base is None else base
    clipped = np.minimum(weights, max_weight)
    mean = float((base * clipped).sum() / base.sum())
    return clipped / mean, 1.0 / mean


def effective_sample_size(weights: np.ndarray, base: np.ndarray | None = None) -> float:
    """(sum w)^2 / (T sum w^2), in (0, 1]; 1 when all count the same. `base`: how much each entry counts."""
    base = np.ones(weights.shape) if base is None else base
    return float((base * weights).sum() ** 2 / (base.sum() * (base * weights**2).sum()))
