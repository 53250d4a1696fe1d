"""Parameters part by part, between a checkpoint's files and the devices.

On import the host reads and transposes a part into a buffer while the devices place the one before, so that besides the
parameters themselves only two parts exist. The programs that place and take run on every device for the shards that it
holds. A parameter that is placed into is donated, so that XLA writes into its memory (on the CPU too).
"""

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from trace_jax.checkpoints.accounting import Slot
from trace_jax.checkpoints.checkpoint import Readable
from trace_jax.parallel.mesh import to_host

PART_BYTES = 2**26
PIECE_BYTES = 2**19  # what one thread reads and transposes at a time; stays in a core's cache
THREADS = min(16, os.cpu_count() or 1)
_TILE = 128
_scratch = threading.local()


@dataclasses.dataclass(frozen=True)
class Part:
    """`count` indices of the first axis on disk of a slot, from `start` on, in every shard of that axis.

    `axis`: where that axis stands in one layer of the parameter. `shards`: into how many pieces it is sharded.
    `sharding`, `layer_sharding`: of the parameter, and of one layer of it.
    """

    slot: Slot
    sharding: NamedSharding | None
    layer_sharding: NamedSharding | None
    axis: int
    shards: int
    start: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer of the parameter, cut to this part, all shards together."""
        shape = [self.slot.shape[letter] for letter in self.slot.order]
        shape[self.axis] = self.count * self.shards
        return tuple(shape)


def parts_of(slot: Slot, sharding: Any, itemsize: int) -> list[Part]:
    """Cuts a slot into parts of at most `PART_BYTES` (or of one index), all of one shape.

    The last one may overlap the one before: another shape would be another compilation.
    """
    sharding, layer = sharding if isinstance(sharding, NamedSharding) else None, None
    shape, axis, shards = slot.shape, slot.order.index(0), 1
    if sharding is not None:
        layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[slot.row is not None :]))
        shards = shape[0] // layer.shard_shape(tuple(shape[letter] for letter in slot.order))[axis]
    size = shape[0] // shards
    most = max(1, PART_BYTES // (itemsize * shards * math.prod(shape[1:])))
    count = math.ceil(size / math.ceil(size / most))
    starts = (min(start, size - count) for start in range(0, size, count))
    return [Part(slot, sharding, layer, axis, shards, start, count) for start in starts]


def places(part: Part, disk: np.ndarray) -> Iterator[tuple[int, str, int, np.ndarray]]:
    """Where the numbers of a part stand on disk: (shard, tensor, its first number, their view).

    `disk` is the part with its axes in the order of the disk, every letter apart.
    """
    slot = part.slot
    for shard in range(part.shards):
        first, begin = shard * (slot.shape[0] // part.shards) + part.start, shard * part.count
        if not slot.separate:
            yield shard, slot.names[0], first * math.prod(slot.shape[1:]), disk[begin : begin + part.count]
            continue
        inner = slot.shape[1 : slot.separate]
        tensors = slot.names[first * math.prod(inner) : (first + part.count) * math.prod(inner)]
        for name, index in zip(tensors, np.ndindex((part.count, *inner)), strict=True):
            yield shard, name, 0, disk[(begin + index[0], *index[1:])]


def stream(parts: Sequence[Part], readable: Mapping[str, Readable]) -> Iterator[tuple[Part, jax.Array]]:
    """Yields every part with its numbers, [part.shape] in the type they have on disk (float32 if quantised).

    An array is valid until the next one is asked for: computations that use it must be finished by then.
    """
    dtypes = [readable[part.slot.names[0]].dtype for part in parts]
    longest = max((math.prod(part.shape) * d.itemsize for part, d in zip(parts, dtypes, strict=True)), default=0)
    buffers = []
    for _ in range(2):
        buffer = np.empty(longest + 64, np.uint8)  # cut to an address that JAX's CPU backend uses without a copy
        buffers.append(buffer[-buffer.ctypes.data % 64 :])
    with ThreadPoolExecutor(THREADS, "trace_jax-read") as pool:
        ahead = None
        for number, part in enumerate([*parts, None]):
            behind, ahead = ahead, part and (part, *_read(pool, part, readable, dtypes[number], buffers[number % 2]))
            if not behind:
                continue
            done, block, futures = behind
            for future in futures:
                future.result()
            if (sharding := done.layer_sharding) is None:
                yield done, jax.device_put(block)
            else:
                yield done, jax.make_array_from_callback(done.shape, sharding, block.__getitem__)


def _read(
    pool: ThreadPoolExecutor, part: Part, readable: Mapping[str, Readable], dtype: np.dtype, buffer: np.ndarray
) -> tuple[np.ndarray, list[Future]]:
    """Starts filling `buffer` with the numbers of a part; returns them as an array, and what to wait for.

    Shards that no device of this process holds aren't read.
    """
    bits = buffer[: math.prod(part.shape) * dtype.itemsize].view(f"u{dtype.itemsize}").reshape(part.shape)
    wanted = {0}
    if part.layer_sharding is not None:
        indices = part.layer_sharding.addressable_devices_indices_map(part.shape).values()
        wanted = {(index[part.axis].start or 0) // part.count for index in indices if index is not None}
    futures = [
        pool.submit(_read_piece, readable[name], begin + start, begin + stop, target[index])
        for shard, name, begin, target in places(part, part.slot.apart(bits))
        if shard in wanted
        for index, start, stop in _pieces(target.shape, PIECE_BYTES // dtype.itemsize)
    ]
    return bits.view(dtype), futures


def _pieces(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple, int, int]]:
    """(index, start, stop) of contiguous pieces of a row-major array, of at most `limit` numbers where that can be."""
    axis = next(axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= limit)
    inner = math.prod(shape[axis + 1 :])
    step = max(1, limit // inner)
    for number, outer in enumerate(np.ndindex(shape[:axis])):
        for first in range(0, shape[axis], step):
            last = min(first + step, shape[axis])
            begin = number * shape[axis] * inner
            yield (*outer, slice(first, last)), begin + first * inner, begin + last * inner


def _read_piece(tensor: Readable, start: int, stop: int, target: np.ndarray) -> None:
    direct = target.flags.c_contiguous
    if not direct and getattr(_scratch, "bytes", np.empty(0)).size < target.nbytes:
        _scratch.bytes = np.empty(target.nbytes, np.uint8)  # fresh ones cost as much as reading into them
    out = target.reshape(-1).view(np.uint8) if direct else _scratch.bytes[: target.nbytes]
    numbers = tensor.read(start, stop, out)
    if not (direct and np.may_share_memory(numbers, target)):
        copy_tiled(numbers.view(target.dtype).reshape(target.shape), target)


def copy_tiled(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source` (contiguous), ten times as fast as numpy does it where the two differ in their last axis.

    Tiles keep both sides of the transposition in the processor's cache. XLA on a CPU transposes more slowly still,
    which is why the host does it, not the device.
    """
    if target.ndim < 2 or target.strides[-1] == target.itemsize:
        target[...] = source
        return
    columns = source.shape[-1]
    tiled = columns // _TILE * _TILE
    for begin, end in ((0, tiled), (tiled, columns)):
        if begin < end:
            width = min(_TILE, end - begin)
            tiles = (*source.shape[:-1], (end - begin) // width, width)
            packed = np.ascontiguousarray(np.moveaxis(source[..., begin:end].reshape(tiles), -2, 0))
            np.moveaxis(target[..., begin:end].reshape(tiles), -2, 0)[...] = packed


def place(parameter: jax.Array, numbers: jax.Array, part: Part) -> jax.Array:
    """`parameter` with `numbers`, cast to its type, in the place of `part`; `parameter` itself is gone afterwards."""
    row, start, stacked = np.int32(part.slot.row or 0), np.int32(part.start), part.slot.row is not None
    return _place(parameter, numbers, row, start, part.sharding, part.layer_sharding, part.axis, stacked)


def take(parameter: jax.Array, part: Part) -> np.ndarray:
    """What stands in the place of `part`, its axes in the order of the disk, contiguous, in every process; all must
    call it."""
    row, start, stacked = np.int32(part.slot.row or 0), np.int32(part.start), part.slot.row is not None
    taken = _take(parameter, row, start, part.sharding, part.layer_sharding, part.axis, stacked, part.count)
    numbers = to_host(taken)
    source = numbers.view(f"u{numbers.dtype.itemsize}")
    disk = np.empty(part.slot.apart(source).shape, source.dtype)
    target = disk.transpose(part.slot.order)
    for index, _, _ in _pieces(source.shape, PIECE_BYTES // source.itemsize):
        copy_tiled(source[index], target[index])
    return disk.view(numbers.dtype)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7), donate_argnums=0)
def _place(parameter, numbers, row, start, sharding, layer_sharding, axis, stacked) -> jax.Array:
    def put(parameter, numbers, row, start):
        stack = _bits(parameter if stacked else parameter[None])
        index = _index(stack.ndim, row, start, axis)
        placed = lax.dynamic_update_slice(stack, _bits(numbers.astype(parameter.dtype))[None], index)
        return lax.bitcast_convert_type(placed if stacked else placed[0], parameter.dtype)

    if sharding is not None:
        specs = (sharding.spec, layer_sharding.spec, PartitionSpec(), PartitionSpec())
        put = jax.shard_map(put, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return put(parameter, numbers, row, start)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _take(parameter, row, start, sharding, layer_sharding, axis, stacked, count) -> jax.Array:
    def cut(parameter, row, start):
        stack = parameter if stacked else parameter[None]
        sizes = [1, *stack.shape[1:]]
        sizes[axis + 1] = count
        return lax.dynamic_slice(stack, _index(stack.ndim, row, start, axis), sizes)[0]

    if sharding is not None:
        specs = (sharding.spec, PartitionSpec(), PartitionSpec())
        cut = jax.shard_map(cut, mesh=sharding.mesh, in_specs=specs, out_specs=layer_sharding.spec)
    return cut(parameter, row, start)


def _index(ndim: int, row: Any, start: Any, axis: int) -> list:
    index = [row, *[np.int32(0)] * (ndim - 1)]
    index[axis + 1] = start
    return index


def _bits(array: jax.Array) -> jax.Array:
    """The same bytes as unsigned integers, which XLA on a CPU copies ten times as fast as bfloat16."""
    return lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
