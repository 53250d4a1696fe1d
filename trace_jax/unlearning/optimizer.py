"""The optax chain: clip, Adam, decay, learning rate, and the update mask last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from trace_jax.unlearning.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, cosine or linear decay to zero at `steps`."""
    decay = max(1, steps - config.warmup_steps)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def masked(masks: dict[str, jax.Array] | None) -> optax.GradientTransformation:
    """Multiplies updates by masks (flat dict by path). Identity without masks."""
    if masks is None:
        return optax.identity()
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, masks))


def make_optimizer(
    config: OptimizerConfig, steps: int, masks: dict[str, jax.Array] | None = None
) -> optax.GradientTransformation:
    """AdamW whose frozen slices stay bit-identical.

    Gradients are masked first, so that the clipping norm is that of what trains. Updates are masked last: masking
    gradients alone would let weight decay and old momentum move frozen experts.
    """
    return optax.chain(
        masked(masks),
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay > 0 else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        masked(masks),
    )
