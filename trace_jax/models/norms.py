"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trace_jax.models.config import ModelConfig
from trace_jax.parallel.mesh import TENSOR, sum_over


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, *, width: int | None = None) -> jax.Array:
    """x [..., D] over its root mean square, times weight [D]. `width`: of x on all devices, if split."""
    x32 = x.astype(jnp.float32)
    if width is None or width == x.shape[-1]:
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    else:
        mean = sum_over(jnp.sum(jnp.square(x32), axis=-1, keepdims=True), TENSOR) / width
    x32 = x32 * jax.lax.rsqrt(mean + epsilon)
    return x32.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """x [..., D] less its mean, over its standard deviation, times weight [D], plus bias [D]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    weight, bias = (a.reshape((1,) * (x.ndim - 1) + a.shape) for a in (weight, bias))
    return x32.astype(x.dtype) * weight + bias


def norm(params: dict, name: str, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The model's kind of norm, with the weights called `name` in `params`."""
    if config.norm == "layer":
        return layer_norm(x, params[name], params[f"{name}_bias"], config.norm_epsilon)
    return rms_norm(x, params[name], config.norm_epsilon)
