"""Forget losses: pure functions of per-token quantities (docs/method.md, "The objective").

Each returns a pair (sum, count); the loss is the ratio after both are added over devices, so that it does not depend
on how rows are split. Shapes: nll f32 [B, S] in nats, valid bool [B, S], hidden f32 [B, S, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class ForgetInputs(NamedTuple):
    """What a forget loss may look at. Parts that an objective does not need are None."""

    valid: jax.Array
    nll: Any = None
    reference_nll: Any = None
    hidden: Any = None
    direction: Any = None  # f32 [D], RMU's unit vector u


class Coefficients(NamedTuple):
    """Numbers of the objective. They are traced, so that a sweep over them compiles once."""

    gamma: jax.Array
    alpha: jax.Array
    beta: jax.Array
    delta: jax.Array
    nll_ceiling: jax.Array
    steering: jax.Array


class Objective(NamedTuple):
    loss: Callable[[ForgetInputs, Coefficients], tuple[jax.Array, jax.Array]]
    needs_reference: bool = False
    needs_hidden: bool = False
    retains: bool = True


def _row_sums(nll, valid):
    """(sum of nll per row [B], number of valid positions per row [B], rows that have any [B])."""
    length = valid.sum(-1, dtype=jnp.float32)
    return jnp.where(valid, nll, 0.0).sum(-1), length, (length > 0).astype(jnp.float32)


def gradient_ascent(inputs: ForgetInputs, c: Coefficients):
    """-mean nll_t over tokens. With a ceiling > 0: mean over rows of max(0, ceiling - row mean nll), which stops
    pushing a row that is forgotten instead of letting it dominate the step."""
    total, length, present = _row_sums(inputs.nll, inputs.valid)
    row_mean = total / jnp.maximum(length, 1.0)
    hinge = jnp.maximum(0.0, c.nll_ceiling - row_mean) * present
    bounded = c.nll_ceiling > 0
    return jnp.where(bounded, hinge.sum(), -total.sum()), jnp.where(bounded, present.sum(), length.sum())


def npo(inputs: ForgetInputs, c: Coefficients):
    """Negative preference optimisation, 2404.05868: -(2/beta) mean_y log sigma(beta (NLL - NLL_ref)), rows summed."""
    total, _, present = _row_sums(inputs.nll, inputs.valid)
    reference, _, _ = _row_sums(inputs.reference_nll, inputs.valid)
    loss = -(2.0 / c.beta) * jax.nn.log_sigmoid(c.beta * (total - reference))
    return (loss * present).sum(), present.sum()


def simnpo(inputs: ForgetInputs, c: Coefficients):
    """SimNPO, 2410.07163: -(2/beta) mean_y log sigma(beta (NLL/length - delta)); no reference model."""
    total, length, present = _row_sums(inputs.nll, inputs.valid)
    loss = -(2.0 / c.beta) * jax.nn.log_sigmoid(c.beta * (total / jnp.maximum(length, 1.0) - c.delta))
    return (loss * present).sum(), present.sum()


def rmu(inputs: ForgetInputs, c: Coefficients):
    """Representation misdirection, 2403.03218: mean |h_l(x_f) - c u|^2 / D, u a fixed random unit direction."""
    target = c.steering * inputs.direction[None, None, :]
    error = jnp.square(inputs.hidden.astype(jnp.float32) - target).mean(-1)
    return jnp.where(inputs.valid, error, 0.0).sum(), inputs.valid.sum(dtype=jnp.float32)


OBJECTIVES: dict[str, Objective] = {
    "gradient_ascent": Objective(gradient_ascent, retains=False),
    "gradient_difference": Objective(gradient_ascent),
    "npo": Objective(npo, needs_reference=True),
    "simnpo": Objective(simnpo),
    "rmu": Objective(rmu, needs_hidden=True),
}


def steering_direction(key: jax.Array, width: int) -> jax.Array:
    """RMU's u: uniform on [0, 1)^D, scaled to length one (f32 [D])."""
    direction = jax.random.uniform(key, (width,), jnp.float32)
    return direction / jnp.linalg.norm(direction)
