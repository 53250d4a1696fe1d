"""Weights from the routing of the model that is being trained, with the multipliers solved under the original one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from trace_jax.routing.calibration import Calibration
from trace_jax.routing.weights import token_weights


@struct.dataclass
class OnlineWeights:
    """What a training step carries to weigh retain tokens by their present experts: constants of a run.

    Attributes:
      multipliers: f32 [L, E].  log_normalizer, max_weight, scale: f32 []; see `trace_jax.routing.calibration`.
      unit, window: static.
    """

    multipliers: Any
    log_normalizer: Any
    max_weight: Any
    scale: Any
    unit: str = struct.field(pytree_node=False)
    window: int | None = struct.field(pytree_node=False)

    @classmethod
    def of(cls, calibration: Calibration) -> OnlineWeights:
        """The constants of a calibration, on the host."""
        numbers = (calibration.log_normalizer, calibration.max_weight, calibration.scale)
        return cls(
            np.asarray(calibration.multipliers, np.float32),
            *(np.asarray(number, np.float32) for number in numbers),
            unit=calibration.unit,
            window=calibration.window,
        )


def online_loss_weights(online: OnlineWeights, indices: jax.Array, valid: jax.Array, factor: jax.Array) -> jax.Array:
    """f32 [B, S]: what multiplies the retain losses of rows that the current model has just routed.

    With c_i the factor of row i, w^0 the offline weights and w those of the current routing, v_t = c_i w_t. For `apply`
    "weights" c_i = 1; for "both", where row i is drawn with probability proportional to its offline mean weight m_i,
    c_i = 1 / m_i. In either case E[sum_t v_t r_t] / E[number of valid positions] over the batches that can be drawn is
    the corpus mean of w_t r_t: drawing by offline weights biases nothing. But the multipliers were normalised under the
    original routing, so that the corpus mean of w_t itself is one under that routing only. As the model drifts it
    does too, and with it the strength of the retain term; the metric "weight_mean", sum_t v_t / (valid positions),
    estimates it. Under the original routing v equals the offline loss weights.

    Args:
      indices: i32 [L, B, S, K], the experts of all layers under the current model.
      valid: bool [B, S].
      factor: f32 [B, S], c_i at every position of row i (`RetainWeights.step_weights`).

    Returns:
      Constants of the loss: no gradient flows through them.
    """
    return jax.lax.stop_gradient(token_weights(indices, online, mask=valid) * jnp.asarray(factor, jnp.float32))
