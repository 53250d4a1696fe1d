"""Weights rounded to nearest in few bits: undoes a change that is smaller than a step (2410.16454)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from trace_jax.attacks.attack import Case, Point
from trace_jax.attacks.config import QuantizationConfig
from trace_jax.models.arrays import ArraySpec, flat_specs, flatten, unflatten
from trace_jax.models.config import ModelConfig

_MATRICES = ("q", "k", "v", "o", "attention_gate", "kv_down", "kv_up", "q_down", "q_up", "gate_up", "down")


def quantization(settings: QuantizationConfig, case: Case) -> list[Point]:
    """Measures the unlearned model at each number of bits."""
    points = []
    for bits in settings.bits:
        params = quantized(case.unlearned.params, case.unlearned.config, bits=bits)
        points.append(Point(f"{bits} bits", case.measure(params, f"{bits}-bits")))
    return points


def quantized(params: Any, config: ModelConfig, *, bits: int) -> Any:
    """Parameters with every matrix of attention, experts and dense layers rounded to `bits` bits and back.

    Embedding, output head, routers, norms and biases stay as they are, as the usual tools leave them. See
    `round_to_nearest`.
    """
    specs = flat_specs(config)

    def one(path: str, array: jax.Array) -> jax.Array:
        name = path.rpartition("/")[2]
        return _rounded(array, spec=specs[path], bits=bits) if name in _MATRICES else array

    return unflatten({path: one(path, array) for path, array in flatten(params).items()})


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
