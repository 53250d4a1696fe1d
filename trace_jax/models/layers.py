"""What layers are made of: norms (in float32), rotary position embedding, and the gated feed-forward part.

The first dimensions of a head turn with position; in latent attention the last.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.models.architecture import ModelConfig, Rope
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


def norm(params: dict, name: str, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The model's kind of norm of x [..., D], with the weights [D] called `name` in `params`."""
    if config.norm == "rms":
        return rms_norm(x, params[name], config.norm_epsilon)
    weight, bias = (params[n].reshape((1,) * (x.ndim - 1) + params[n].shape) for n in (name, f"{name}_bias"))
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_epsilon)
    return x32.astype(x.dtype) * weight + bias


def rotary(positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Cosines and sines at `positions` i32 [B or 1, S]: f32 [N, 2, B or 1, S, 1, 2, W/2].

    N: one for each of `config.ropes`, and a last one that turns nothing (`layer_ropes` = -1). W: the dimensions that
    turn; the two coordinates of a pair stand in halves, and the sine carries the sign of each half.
    """
    tables = [_table(positions, rope, config.rotary_width) for rope in config.ropes]
    still = jnp.stack([jnp.ones_like(tables[0][0]), jnp.zeros_like(tables[0][0])])
    return jnp.stack([*tables, still])


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """Radians per position of each of the width/2 pairs, f32."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inverse = 1.0 / (np.float32(rope.theta) ** exponent)
    return inverse / np.asarray(rope.divisors, np.float32) if rope.divisors else inverse


def _table(positions: jax.Array, rope: Rope, width: int) -> jax.Array:
    angle = positions.astype(jnp.float32)[:, :, None] * frequencies(rope, width)[None, None, :]
    amplitude = jnp.float32(rope.amplitude)
    if rope.long_amplitude:
        is_long = jnp.max(positions) >= rope.original_length
        amplitude = jnp.where(is_long, jnp.float32(rope.long_amplitude), amplitude)
    cos, sin = (amplitude * f(angle)[:, :, None, None, :] for f in (jnp.cos, jnp.sin))
    return jnp.stack([jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)])


def rotate(x: jax.Array, table: jax.Array, *, interleaved: bool) -> jax.Array:
    """x [B,S,N,C] with its first W dimensions turned by `table` [2,B,S,1,2,W/2].

    Interleaved pairs come out in halves: queries and keys alike, so that their products are the same. A flip swaps the
    halves: XLA vectorises it, unlike a concatenation.
    """
    width = 2 * table.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        halves = jnp.swapaxes(turned.reshape(*turned.shape[:3], width // 2, 2), 3, 4)
    else:
        halves = turned.reshape(*turned.shape[:3], 2, width // 2)
    halves = halves.astype(jnp.float32)
    turned = (halves * table[0] + jnp.flip(halves, axis=3) * table[1]).reshape(turned.shape).astype(x.dtype)
    return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def gated_mlp(weights: dict, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Gated feed-forward of x [T,D] with gate_up [D,2,F], down [F,D] and, where there are, their biases."""
    gate_up = x @ weights["gate_up"].reshape(x.shape[1], -1)
    if "gate_up_bias" in weights:
        gate_up = gate_up + weights["gate_up_bias"].reshape(1, -1)
    y = sum_over(activation(config)(gate_up) @ weights["down"], TENSOR)
    return y + weights["down_bias"][None] if "down_bias" in weights else y


def activation(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """The function [..., 2F] (gates, then ups) -> [..., F] of a feed-forward part."""
    if config.activation == "swiglu":
        return _swiglu
    return partial(_clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit)


def _clamped_swiglu(gate_up: jax.Array, *, alpha: float, limit: float) -> jax.Array:
    """GPT-OSS: both sides are limited, the gate from above only, and 1 is added to the ups."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(gate * alpha)


@jax.custom_vjp
def _swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2F] -> [..., F]. The backward pass keeps the input only."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_backward(gate_up, gradient):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return (jnp.concatenate([gradient * up * (sigmoid + silu - silu * sigmoid), gradient * silu], axis=-1),)


_swiglu.defvjp(lambda gate_up: (_swiglu(gate_up), gate_up), _swiglu_backward)
