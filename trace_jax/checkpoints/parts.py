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
from trace_jax.checkpoints.checkpoint import Tensor
from trace_jax.checkpoints.quantized import Readable
from trace_jax.parallel.mesh import to_host

PART_BYTES = 2**26
PIECE_BYTES = 2**19  # what one thread reads and transposes at a time; stays in a core's cache
THREADS = min(16, os.cpu_count() or 1)
_TILE = 128
_scratch = threading.local()


@dataclasses.dataclass(frozen=True)
class Part:
    """`count` indices of the first axis on disk of a slot, from `start` on, in every shard of that axis.

    `axis`: where that axis stands in one layer of the parameter. `shards`: into how many pieces it is sharded, each
    of `size` indices.
    """

    slot: Slot
    sharding: NamedSharding | None
    axis: int
    shards: int
    size: int
    start: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer of the parameter, cut to this part, all shards together."""
        shape = [self.slot.layout.shape[letter] for letter in self.slot.layout.order]
        shape[self.axis] = self.count * self.shards
        return tuple(shape)

    @property
    def layer_sharding(self) -> NamedSharding | None:
        if self.sharding is None or self.slot.row is None:
            return self.sharding
        return NamedSharding(self.sharding.mesh, PartitionSpec(*self.sharding.spec[1:]))


def parts_of(slot: Slot, sharding: Any, itemsize: int) -> list[Part]:
    """Cuts a slot into parts of at most `PART_BYTES` (or of one index), all of one shape.

    The last one may overlap the one before: another shape would be another compilation.
    """
    sharding = sharding if isinstance(sharding, NamedSharding) else None
    shape, axis = slot.layout.shape, slot.layout.order.index(0)
    shards = 1
    if sharding is not None:
        at = axis + (slot.row is not None)
        names = sharding.spec[at] if at < len(sharding.spec) else None
        names = (names,) if isinstance(names, str) else names or ()
        shards = math.prod(sharding.mesh.shape[name] for name in names)
    size = shape[0] // shards
    most = max(1, PART_BYTES // (itemsize * shards * math.prod(shape[1:])))
    count = math.ceil(size / math.ceil(size / most))
    starts = (min(start, size - count) for start in range(0, size, count))
    return [Part(slot, sharding, axis, shards, size, start, count) for start in starts]


def places(part: Part, disk: np.ndarray) -> Iterator[tuple[int, str, int, np.ndarray]]:
    """Where the numbers of a part stand on disk: (shard, tensor, its first number, their view).

    `disk` is the part with its axes in the order of the disk, every letter apart.
    """
    layout, names = part.slot.layout, part.slot.names
    for shard in range(part.shards):
        first, begin = shard * part.size + part.start, shard * part.count
        if not layout.separate:
            yield shard, names[0], first * math.prod(layout.shape[1:]), disk[begin : begin + part.count]
            continue
        inner = layout.shape[1 : layout.separate]
        tensors = names[first * math.prod(inner) : (first + part.count) * math.prod(inner)]
        for name, index in zip(tensors, np.ndindex((part.count, *inner)), strict=True):
            yield shard, name, 0, disk[(begin + index[0], *index[1:])]


# --- reading


def stream(parts: Sequence[Part], readable: Mapping[str, Readable]) -> Iterator[tuple[Part, jax.Array]]:
    """Yields every part with its numbers, [part.shape] in the type they have on disk (float32 if quantised).

    An array is valid until the next one is asked for: computations that use it must be finished by then.
    """
    longest = max((_nbytes(part, readable) for part in parts), default=0)
    buffers = [_aligned(longest) for _ in range(2)]
    with ThreadPoolExecutor(THREADS, "trace_jax-read") as pool:
        ahead = None
        for number, part in enumerate([*parts, None]):
            behind, ahead = ahead, part and (part, *_read(pool, part, readable, buffers[number % 2]))
            if behind:
                done, block, futures = behind
                for future in futures:
                    future.result()
                yield done, _on_devices(done, block)


def _nbytes(part: Part, readable: Mapping[str, Readable]) -> int:
    return math.prod(part.shape) * readable[part.slot.names[0]].dtype.itemsize


def _aligned(nbytes: int) -> np.ndarray:
    """Bytes at an address that JAX's CPU backend uses without a copy."""
    buffer = np.empty(nbytes + 64, np.uint8)
    begin = -buffer.ctypes.data % 64
    return buffer[begin : begin + nbytes]


def _read(
    pool: ThreadPoolExecutor, part: Part, readable: Mapping[str, Readable], buffer: np.ndarray
) -> tuple[np.ndarray, list[Future]]:
    """Starts filling `buffer` with the numbers of a part; returns them as an array, and what to wait for.

    Shards that no device of this process holds aren't read.
    """
    dtype = readable[part.slot.names[0]].dtype
    bits = np.dtype(f"u{dtype.itemsize}")
    block = buffer[: _nbytes(part, readable)].view(bits).reshape(part.shape)
    wanted = {0}
    if part.layer_sharding is not None:
        indices = part.layer_sharding.addressable_devices_indices_map(part.shape).values()
        wanted = {(index[part.axis].start or 0) // part.count for index in indices if index is not None}
    futures = [
        pool.submit(_read_piece, readable[name], begin + start, begin + stop, target[index])
        for shard, name, begin, target in places(part, part.slot.layout.apart(block))
        if shard in wanted
        for index, start, stop in _pieces(target.shape, PIECE_BYTES // dtype.itemsize)
    ]
    return block.view(dtype), futures


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
    if not isinstance(tensor, Tensor):
        numbers = tensor.read(start, stop).view(target.dtype)
    else:
        direct = target.flags.c_contiguous
        if not direct and getattr(_scratch, "bytes", np.empty(0)).size < target.nbytes:
            _scratch.bytes = np.empty(target.nbytes, np.uint8)  # fresh ones cost as much as reading into them
        numbers = target.reshape(-1) if direct else _scratch.bytes[: target.nbytes].view(target.dtype)
        tensor.read_into(numbers.view(np.uint8), start)
        if direct:
            return
    copy_tiled(numbers.reshape(target.shape), target)


def _on_devices(part: Part, block: np.ndarray) -> jax.Array:
    if part.layer_sharding is None:
        return jax.device_put(block)
    return jax.make_array_from_callback(part.shape, part.layer_sharding, lambda index: block[index])


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


def on_disk(part: Part, numbers: np.ndarray) -> np.ndarray:
    """The numbers of a part with their axes in the order of the disk, contiguous."""
    layout, bits = part.slot.layout, np.dtype(f"u{numbers.dtype.itemsize}")
    disk = np.empty(layout.apart(numbers).shape, bits)
    source, target = numbers.view(bits), disk.transpose(layout.order)
    for index, _, _ in _pieces(source.shape, PIECE_BYTES // bits.itemsize):
        copy_tiled(source[index], target[index])
    return disk.view(numbers.dtype)


# --- the devices


@functools.lru_cache(maxsize=512)
def _making(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda: lax.empty(shape, jnp.dtype(dtype)), out_shardings=sharding)


def empty(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> jax.Array:
    """An array with memory but no values yet."""
    return _making(shape, dtype, sharding)()


def place(parameter: jax.Array, numbers: jax.Array, part: Part) -> jax.Array:
    """`parameter` with `numbers`, cast to its type, in the place of `part`; `parameter` itself is gone afterwards."""
    program = _placing(part.sharding, part.axis, part.slot.row is not None)
    return program(parameter, numbers, np.int32(part.slot.row or 0), np.int32(part.start))


def take(parameter: jax.Array, part: Part) -> np.ndarray:
    """What stands in the place of `part`, [part.shape], in every process; all must call it."""
    program = _taking(part.sharding, part.axis, part.slot.row is not None, part.count)
    return to_host(program(parameter, np.int32(part.slot.row or 0), np.int32(part.start)))


@functools.lru_cache(maxsize=512)
def _placing(sharding: NamedSharding | None, axis: int, stacked: bool) -> Any:
    def put(parameter, numbers, row, start):
        stack = _bits(parameter if stacked else parameter[None])
        index = _index(stack.ndim, row, start, axis)
        placed = lax.dynamic_update_slice(stack, _bits(numbers.astype(parameter.dtype))[None], index)
        return lax.bitcast_convert_type(placed if stacked else placed[0], parameter.dtype)

    return _program(put, sharding, stacked, layers_in=1, layer_out=False, donate_argnums=0)


@functools.lru_cache(maxsize=512)
def _taking(sharding: NamedSharding | None, axis: int, stacked: bool, count: int) -> Any:
    def cut(parameter, row, start):
        stack = parameter if stacked else parameter[None]
        sizes = [1, *stack.shape[1:]]
        sizes[axis + 1] = count
        return lax.dynamic_slice(stack, _index(stack.ndim, row, start, axis), sizes)[0]

    return _program(cut, sharding, stacked, layers_in=0, layer_out=True)


def _program(
    fn: Any, sharding: NamedSharding | None, stacked: bool, *, layers_in: int, layer_out: bool, **options: Any
) -> Any:
    """`fn(parameter, layers..., row, start)` jitted; with a sharding, on each device's shards."""
    if sharding is not None:
        whole, none = sharding.spec, PartitionSpec()
        layer = PartitionSpec(*whole[1:]) if stacked else whole
        in_specs = (whole, *[layer] * layers_in, none, none)
        fn = jax.shard_map(fn, mesh=sharding.mesh, in_specs=in_specs, out_specs=layer if layer_out else whole)
    return jax.jit(fn, **options)


def _index(ndim: int, row: Any, start: Any, axis: int) -> list:
    index = [row, *[np.int32(0)] * (ndim - 1)]
    index[axis + 1] = start
    return index


def _bits(array: jax.Array) -> jax.Array:
    """The same bytes as unsigned integers, which XLA on a CPU copies ten times as fast as bfloat16."""
    return lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
