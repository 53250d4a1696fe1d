"""Parameters read from a checkpoint part by part, each part ready to be put in its place on the devices.

The host reads and transposes a part into a buffer while the devices place the one before, so that besides the
parameters themselves only two parts exist.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trace_jax.checkpoints.accounting import Slot
from trace_jax.checkpoints.layout import copy_tiled
from trace_jax.checkpoints.quantized import Readable
from trace_jax.checkpoints.tensor_file import Tensor

PART_BYTES = 2**26
PIECE_BYTES = 2**19  # what one thread reads and transposes at a time; stays in a core's cache
_THREADS = min(16, os.cpu_count() or 1)
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

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors it has numbers of, in the order of the axes that number tensors."""
        layout = self.slot.layout
        if not layout.separate:
            return self.slot.names
        per_index = math.prod(layout.shape[1 : layout.separate])
        places = (slice(first * per_index, (first + self.count) * per_index) for first, _ in self.first_indices)
        return tuple(name for place in places for name in self.slot.names[place])

    @property
    def first_indices(self) -> list[tuple[int, slice]]:
        """(index on disk, place in this part) of every shard's first index."""
        places = (slice(shard * self.count, (shard + 1) * self.count) for shard in range(self.shards))
        return [(shard * self.size + self.start, place) for shard, place in enumerate(places)]


def parts_of(slot: Slot, sharding: NamedSharding | None, itemsize: int) -> list[Part]:
    """Cuts a slot into parts of at most `PART_BYTES` (or of one index), all of one shape.

    The last one may overlap the one before: another shape would be another compilation.
    """
    shape, axis = slot.layout.shape, slot.layout.order.index(0)
    names = () if sharding is None else mesh_axes(sharding.spec, axis + (slot.row is not None))
    shards = math.prod(sharding.mesh.shape[name] for name in names) if sharding else 1
    size = shape[0] // shards
    most = max(1, PART_BYTES // (itemsize * shards * math.prod(shape[1:])))
    count = math.ceil(size / math.ceil(size / most))
    starts = (min(start, size - count) for start in range(0, size, count))
    return [Part(slot, sharding, axis, shards, size, start, count) for start in starts]


def mesh_axes(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    """The mesh axes over which an axis of an array is sharded."""
    names = spec[axis] if axis < len(spec) else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def stream(parts: Sequence[Part], readable: Mapping[str, Readable]) -> Iterator[tuple[Part, jax.Array]]:
    """Yields every part with its numbers, [part.shape] in the type they have on disk (float32 if quantised).

    An array is valid until the next one is asked for: computations that use it must be finished by then.
    """
    longest = max((_nbytes(part, readable) for part in parts), default=0)
    buffers = [_aligned(longest) for _ in range(2)]
    with ThreadPoolExecutor(_THREADS, "trace_jax-read") as pool:
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
    """Starts filling `buffer` with the numbers of a part; returns them as an array, and what to wait for."""
    dtype = readable[part.slot.names[0]].dtype
    bits = np.dtype(f"u{dtype.itemsize}")
    block = buffer[: _nbytes(part, readable)].view(bits).reshape(part.shape)
    disk = part.slot.layout.apart(block)
    wanted = _wanted_shards(part)
    futures = [
        pool.submit(_read_piece, tensor, begin + start, begin + stop, target[index])
        for shard, tensor, begin, target in _targets(part, readable, disk)
        if shard in wanted
        for index, start, stop in pieces(target.shape, PIECE_BYTES // dtype.itemsize)
    ]
    return block.view(dtype), futures


def _wanted_shards(part: Part) -> set[int]:
    """Those that this process's devices hold: what lies in other processes isn't read."""
    if part.layer_sharding is None:
        return {0}
    indices = part.layer_sharding.addressable_devices_indices_map(part.shape).values()
    return {(index[part.axis].start or 0) // part.count for index in indices if index is not None}


def _targets(
    part: Part, readable: Mapping[str, Readable], disk: np.ndarray
) -> Iterator[tuple[int, Readable, int, np.ndarray]]:
    """(shard, tensor, the number it is read from, where it goes); `disk` is the part with its axes as on disk."""
    layout = part.slot.layout
    if layout.separate:
        places = np.ndindex(disk.shape[: layout.separate])
        for name, place in zip(part.names, places, strict=True):
            yield place[0] // part.count, readable[name], 0, disk[place]
    else:
        for shard, (first, place) in enumerate(part.first_indices):
            yield shard, readable[part.names[0]], first * math.prod(layout.shape[1:]), disk[place]


def pieces(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple, int, int]]:
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
        numbers = target.reshape(-1) if direct else _thread_buffer(target.nbytes).view(target.dtype)
        tensor.read_into(numbers.view(np.uint8), start)
        if direct:
            return
    copy_tiled(numbers.reshape(target.shape), target)


def _thread_buffer(nbytes: int) -> np.ndarray:
    """Bytes of this thread that are used again: fresh ones cost as much as reading into them."""
    if getattr(_scratch, "bytes", np.empty(0)).size < nbytes:
        _scratch.bytes = np.empty(nbytes, np.uint8)
    return _scratch.bytes[:nbytes]


def _on_devices(part: Part, block: np.ndarray) -> jax.Array:
    if part.layer_sharding is None:
        return jax.device_put(block)
    return jax.make_array_from_callback(part.shape, part.layer_sharding, lambda index: block[index])
