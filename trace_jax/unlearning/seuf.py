"""SEUF (2411.18797): unlearn in a few experts that forget tokens are routed to, and hold the routers to choosing them.

The experts of highest affinity and the routers of their layers train (preset "seuf" of `trainable`); the anchor loss
below keeps forget tokens on them, so that the forget loss doesn't fall by routing elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FORMS = ("sum", "mean")


def target_experts(index: jax.Array, num_experts: int) -> jax.Array:
    """bool [L, E]: the experts of `index` i32 [L, N], in which E is none."""
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.any(index[:, :, None] == expert[None, None, :], axis=1)


def anchor_loss(
    probabilities: jax.Array, indices: jax.Array, target: jax.Array, valid: jax.Array, *, form: str
) -> tuple[jax.Array, jax.Array]:
    """(sum over valid tokens and over the layers that have a target expert, number of valid tokens).

    - "sum", the paper's equation 3: |g - a|^2 summed over experts; g is the router's probability of the chosen experts
      and 0 for the others, a is 1 for target experts and 0 for the others.
    - "mean", its released code: the mean over experts of (s - a)^2, s the probability of all experts, chosen or not.

    Args:
      probabilities: f32 [L, B, S, E], of the router, not renormalised over the chosen experts.
      indices: i32 [L, B, S, K], the chosen experts.
      target: bool [L, E].
      valid: bool [B, S].
    """
    num_experts = probabilities.shape[-1]
    if form == "sum":
        expert = jnp.arange(num_experts, dtype=jnp.int32)
        chosen = jnp.any(indices[..., :, None] == expert[None, None, None, None, :], axis=-2)
        probabilities = jnp.where(chosen, probabilities, 0.0)
    error = jnp.square(probabilities - target.astype(jnp.float32)[:, None, None, :])
    of_layer = error.mean(-1) if form == "mean" else error.sum(-1)
    counted = valid[None] & jnp.any(target, axis=-1)[:, None, None]
    return jnp.where(counted, of_layer, 0.0).sum(), valid.sum(dtype=jnp.float32)
