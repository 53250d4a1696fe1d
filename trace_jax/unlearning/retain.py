"""Retain losses: one number per retain token, then the weighted mean that calibration acts on."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def hidden_distance(hidden: jax.Array, reference: jax.Array) -> jax.Array:
    """|h - h_ref|^2 / D per token (RMU's retain term, 2403.03218). hidden, reference [B, S, D] -> f32 [B, S]."""
    difference = hidden.astype(jnp.float32) - jax.lax.stop_gradient(reference).astype(jnp.float32)
    return jnp.square(difference).mean(-1)


def weighted_retain(per_token: jax.Array, weights: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum_t w_t r_t, number of valid positions); L_retain is their ratio over the global batch.

    Dividing by the count and not by the sum of weights keeps the expectation exactly the reweighted one at any batch
    size, because the weights have mean one over the corpus. All arguments [B, S]; weights carry no gradient.
    """
    weighted = jax.lax.stop_gradient(weights) * per_token
    return jnp.where(valid, weighted, 0.0).sum(), valid.sum(dtype=jnp.float32)
