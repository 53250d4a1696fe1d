"""Weights rounded to nearest in few bits: undoes a change that is smaller than a step (2410.16454)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from trace_jax.attacks.attack import Attack, Case, Point
from trace_jax.config import ConfigError, option
from trace_jax.models.arrays import ArraySpec, flat_specs, flatten, unflatten
from trace_jax.models.config import ModelConfig

_MATRICES = ("q", "k", "v", "o", "attention_gate", "kv_down", "kv_up", "q_down", "q_up", "gate_up", "down")


class Quantization(Attack):
    """Weights rounded to few bits."""

    bits: tuple[int, ...] = option((8, 4), help="bits of a weight, one attack each", choices=tuple(range(2, 9)))

    def __post_init__(self):
        super().__post_init__()
        if not self.bits:
            raise ConfigError("bits is an empty list; give at least one number of bits, such as (8, 4).")

    def points(self, case: Case) -> list[Point]:
        """Measures the unlearned model at each number of bits."""
        points, model = [], case.unlearned
        for bits in self.bits:
            params = quantized(model.params, model.config, bits=bits)
            points.append(Point(f"{bits} bits", case.measure(params, f"{bits}-bits")))
        return points


def quantized(params: Any, config: ModelConfig, *, bits: int) -> Any:
    """Parameters with every matrix of attention, experts and dense layers rounded to `bits` bits and back.

    Embedding, output head, routers, norms and biases stay as they are, as the usual tools leave them. See
    `round_to_nearest`.
    """
    specs, flat = flat_specs(config), flatten(params)
    matrices = [path for path in flat if path.rpartition("/")[2] in _MATRICES]  # in one order in all processes
    return unflatten(flat | {path: _rounded(flat[path], spec=specs[path], bits=bits) for path in matrices})


@functools.partial(jax.jit, static_argnames=("spec", "bits"))
def _rounded(array: jax.Array, *, spec: ArraySpec, bits: int) -> jax.Array:
    first, second = spec.sides
    rounded = round_to_nearest(array.astype(jnp.float32), axes=tuple(range(first, second)), bits=bits)
    return rounded.astype(array.dtype)


def round_to_nearest(weights: jax.Array, *, axes: tuple[int, ...], bits: int) -> jax.Array:
    """Each weight as the nearest multiple of its channel's step, f32, ties to even.

    A channel is an output of the matrix, and `axes` are its inputs. Steps are symmetric: the largest absolute value of
    a channel is 2^(bits-1) - 1 of them, so that 0 stays 0.
    """
    levels = 2 ** (bits - 1) - 1
    largest = jnp.abs(weights).max(axis=axes, keepdims=True)
    step = jnp.where(largest > 0, largest, 1.0) / levels
    return jnp.round(weights / step) * step
