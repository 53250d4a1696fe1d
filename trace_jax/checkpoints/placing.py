"""Programs that put a part of a layer into its parameter, compare it with what is there, or take it out.

Each runs on every device for the shards it holds. A parameter that is put into is donated, so that XLA writes into its
memory (on the CPU too).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from trace_jax.checkpoints.streaming import Part, mesh_axes
from trace_jax.parallel.hosts import to_host


def empty(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> jax.Array:
    """An array with memory but no values yet."""
    return _making(shape, dtype, sharding)()


@functools.lru_cache(maxsize=512)
def _making(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda: lax.empty(shape, jnp.dtype(dtype)), out_shardings=sharding)


def place(parameter: jax.Array, numbers: jax.Array, part: Part) -> jax.Array:
    """`parameter` with `numbers`, cast to its type, in the place of `part`; `parameter` itself is gone afterwards."""
    return _placing(part.sharding, part.axis, part.slot.row is not None)(parameter, numbers, *_where(part))


def equal(parameter: jax.Array, numbers: jax.Array, part: Part) -> np.ndarray:
    """Whether `numbers`, cast as `place` does, are what stands there, bit by bit: a bool per tensor that the part has.

    The array has the axes of the part that number tensors, in the order of the disk; none if it is one tensor.
    """
    layout = part.slot.layout
    kept = tuple(axis for axis, letter in enumerate(layout.order) if letter < layout.separate)
    program = _comparing(part.sharding, part.axis, part.slot.row is not None, kept)
    letters = [layout.order[axis] for axis in kept]
    return to_host(program(parameter, numbers, *_where(part))).astype(bool).transpose(np.argsort(letters))


def take(parameter: jax.Array, part: Part, dtype: np.dtype) -> np.ndarray:
    """What stands in the place of `part`, [part.shape] as `dtype`."""
    shape = list(part.shape)
    shape[part.axis] //= part.shards
    on_device = jnp.dtype(jax.dtypes.canonicalize_dtype(dtype))
    program = _taking(part.sharding, part.axis, part.slot.row is not None, part.count, on_device)
    return to_host(program(parameter, *_where(part))).astype(dtype, copy=False)


def _where(part: Part) -> tuple[np.int32, np.int32]:
    return np.int32(part.slot.row or 0), np.int32(part.start)


@functools.lru_cache(maxsize=512)
def _placing(sharding: NamedSharding | None, axis: int, stacked: bool) -> Any:
    def put(parameter, numbers, row, start):
        numbers = _bits(numbers.astype(parameter.dtype))
        numbers = numbers[None] if stacked else numbers
        placed = lax.dynamic_update_slice(_bits(parameter), numbers, _index(parameter.ndim, row, start, axis, stacked))
        return lax.bitcast_convert_type(placed, parameter.dtype)

    whole, layer = _specs(sharding, stacked)
    return _program(put, sharding, (whole, layer), whole, donate_argnums=0)


@functools.lru_cache(maxsize=512)
def _comparing(sharding: NamedSharding | None, axis: int, stacked: bool, kept: tuple[int, ...]) -> Any:
    whole, layer = _specs(sharding, stacked)
    reduced_over = tuple(name for at in range(len(layer)) if at not in kept for name in mesh_axes(layer, at))

    def compare(parameter, numbers, row, start):
        there = _cut(parameter, row, start, axis, stacked, numbers.shape[axis])
        same = _bits(there) == _bits(numbers.astype(parameter.dtype))
        same = jnp.all(same, axis=tuple(at for at in range(numbers.ndim) if at not in kept)).astype(jnp.int32)
        return lax.pmin(same, reduced_over) if reduced_over else same

    out = PartitionSpec(*(layer[at] if at < len(layer) else None for at in kept))
    return _program(compare, sharding, (whole, layer), out)


@functools.lru_cache(maxsize=512)
def _taking(sharding: NamedSharding | None, axis: int, stacked: bool, count: int, dtype: Any) -> Any:
    def cut(parameter, row, start):
        return _cut(parameter, row, start, axis, stacked, count).astype(dtype)

    whole, layer = _specs(sharding, stacked)
    return _program(cut, sharding, (whole,), layer)


def _specs(sharding: NamedSharding | None, stacked: bool) -> tuple[PartitionSpec, PartitionSpec]:
    """How a parameter and one layer of it are sharded."""
    spec = PartitionSpec() if sharding is None else sharding.spec
    return spec, PartitionSpec(*spec[1:]) if stacked else spec


def _program(fn: Any, sharding: NamedSharding | None, in_specs: tuple, out_specs: Any, **options: Any) -> Any:
    """`fn(arrays..., row, start)` jitted; with a sharding, on each device's shards."""
    if sharding is not None:
        none = PartitionSpec()
        fn = jax.shard_map(fn, mesh=sharding.mesh, in_specs=(*in_specs, none, none), out_specs=out_specs)
    return jax.jit(fn, **options)


def _cut(parameter, row, start, axis: int, stacked: bool, count: int):
    sizes = list(parameter.shape)
    sizes[axis + stacked] = count
    if not stacked:
        return lax.dynamic_slice(parameter, _index(parameter.ndim, row, start, axis, stacked), sizes)
    return lax.dynamic_slice(parameter, _index(parameter.ndim, row, start, axis, stacked), [1, *sizes[1:]])[0]


def _index(ndim: int, row, start, axis: int, stacked: bool) -> list:
    index = [np.int32(0)] * ndim
    index[axis + stacked] = start
    return [row, *index[1:]] if stacked else index


def _bits(array):
    """The same bytes as unsigned integers, which XLA on a CPU copies ten times as fast as bfloat16."""
    return lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
