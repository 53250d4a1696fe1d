"""Which tensors of a checkpoint fill which parameter, and their way onto the devices and back, part by part.

On import the host reads and transposes a part into a buffer while the devices place the one before, so that besides the
parameters themselves only two parts exist; where the device is the host itself, it reads into the parameters. The
programs that place and take run on every device for the shards that it holds. A parameter that is placed into is
donated, so that XLA writes into its memory (on the CPU too).
"""

import collections
import dataclasses
import functools
import math
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.checkpoints.checkpoint import Checkpoint, CheckpointError, Readable, readable_tensor
from trace_jax.models.architecture import ArraySpec, ModelConfig, flat_specs
from trace_jax.models.families import Family
from trace_jax.parallel.mesh import to_host

PART_BYTES = 2**26
PIECE_BYTES = 2**19  # what one thread reads and transposes at a time; stays in a core's cache
THREADS = min(16, os.cpu_count() or 1)
_TILE = 128
_scratch = threading.local()


# --- which tensors fill which parameter


@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer of one parameter (the whole parameter if `row` is None) and the names of the tensors that fill it."""

    path: str
    row: int | None
    names: tuple[str, ...]
    storage: str  # "mxfp4": each name stands for two tensors, blocks and scales
    shape: tuple[int, ...]  # every letter's axis of the layout (`Stored`) apart, in the order of the disk
    separate: int  # how many of these axes number tensors
    tensor_shape: tuple[int, ...]
    order: tuple[int, ...]  # the axes of the parameter as indices into `shape`

    def apart(self, array: Any) -> Any:
        """The parameter with its axes in the order of the disk, every letter apart."""
        return array.transpose(np.argsort(self.order))


def parse_layout(text: str, shape: tuple[int, ...], separate: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a `Slot` by its layout; `shape`: of a layer; `separate`: the letters that number tensors."""
    left, _, right = text.partition(" -> ")
    groups = [re.findall("[a-z]", group) for group in re.findall(r"\([a-z ]+\)|[a-z1]", left)]
    letters, axes = [letter for group in groups for letter in group], right.split()
    assert tuple(letters[: len(separate)]) == separate and sorted(letters) == sorted(axes), text
    size = dict(zip(axes, shape, strict=True))
    return dict(
        shape=tuple(size[letter] for letter in letters),
        separate=len(separate),
        tensor_shape=tuple(math.prod(size[letter] for letter in group) for group in groups[len(separate) :]),
        order=tuple(letters.index(letter) for letter in axes),
    )


def slots_of(config: ModelConfig, family: Family, present: Collection[str]) -> list[Slot]:
    """What fills each parameter: of alternatives the first of which a tensor is `present`, else the first."""
    slots: list[Slot] = []
    for path, spec in flat_specs(config).items():
        stack = {"layers": config.moe_layers, "dense": config.dense_layers}.get(path.split("/")[0], ())
        shape = spec.shape[1:] if stack else spec.shape
        alternatives: list[list[Slot]] = []
        for stored in family.tensors:
            if stored.path != path or len(stored.layout.partition(" -> ")[2].split()) != len(shape):
                continue
            experts = range(config.num_experts) if "{expert}" in stored.names[0] else (0,)
            separate = ("e",) * ("{expert}" in stored.names[0]) + ("g",) * (len(stored.names) > 1)
            layout, filled = parse_layout(stored.layout, shape, separate), []
            for row, layer in enumerate(stack or (0,)):
                names = tuple(name.format(layer=layer, expert=expert) for expert in experts for name in stored.names)
                filled.append(Slot(path, row if stack else None, names, stored.storage, **layout))
            alternatives.append(filled)
        if not alternatives:
            raise ValueError(f"{family.model_type}: no tensor fills the parameter {path}.")
        there = [filled for filled in alternatives if any(_on_disk(slot, slot.names[0]) in present for slot in filled)]
        slots += (there or alternatives)[0]
    return slots


def _on_disk(slot: Slot, name: str) -> str:
    return f"{name}_blocks" if slot.storage == "mxfp4" else name


def account(
    checkpoint: Checkpoint, config: ModelConfig, family: Family
) -> tuple[list[Slot], dict[str, Readable], dict[str, str]]:
    """A place for every tensor of a checkpoint, each used once: slots in the order of the files, each parameter filled
    once; the tensors that they name; the others, each with why it is ignored. What doesn't fit is a CheckpointError.
    """

    def refuse(faults: Sequence[str], message: str) -> None:
        if faults:
            more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise CheckpointError(f"{checkpoint.directory}: {message.format(', '.join(faults[:10]) + more)}.")

    tensors, quantization = checkpoint.tensors, checkpoint.config.get("quantization_config")
    if quantization and (method := quantization.get("quant_method")) not in ("fp8", "mxfp4"):
        supported = "supported are fp8, mxfp4 and unquantised checkpoints"
        raise CheckpointError(f"config.json: quantization method {method!r} can't be read; {supported}.")
    slots = slots_of(config, family, tensors)
    uses = collections.Counter(name for slot in slots for name in slot.names)
    refuse([name for name, count in uses.items() if count > 1], "{} would fill two parameters")
    refuse([name for slot in slots for name in slot.names if _on_disk(slot, name) not in tensors], "missing {}")
    readable, faults = {}, []
    for slot in slots:
        for name in slot.names:
            readable[name] = readable_tensor(name, tensors, checkpoint.config, slot.storage)
            if (shape := readable[name].shape) != slot.tensor_shape:
                faults.append(f"{name} is {list(shape)}, expected {list(slot.tensor_shape)}")
        if len({readable[name].dtype for name in slot.names}) > 1:
            faults.append(f"{slot.names[0]} and the other tensors of {slot.path} have different types")
    refuse(faults, "{}")
    used = {part.name for tensor in readable.values() for part in tensor.parts}
    ignored = {name: _why_ignored(name, checkpoint, config, family) for name in tensors if name not in used}
    unread = [name for name, reason in ignored.items() if not reason]
    refuse(unread, f"{{}} would stay unread; a {family.model_type} of this config.json has no such tensors")
    place = {name: number for number, name in enumerate(tensors)}
    return sorted(slots, key=lambda slot: place[readable[slot.names[0]].parts[0].name]), readable, ignored


def _why_ignored(name: str, checkpoint: Checkpoint, config: ModelConfig, family: Family) -> str:
    """The reason why a tensor may stay unread; empty if there is none."""
    extra = int(checkpoint.config.get("num_nextn_predict_layers") or 1)
    for pattern, reason in family.ignored.items():
        match = re.search(pattern, name)
        beyond = match and match.groupdict().get("beyond")
        if match and (beyond is None or 0 <= int(beyond) - config.num_layers < extra):
            return reason
    return ""


# --- parts of parameters


@dataclasses.dataclass(frozen=True)
class Part:
    """`count` indices of the first axis on disk of a slot, from `start` on, in each of the `shards` of that axis."""

    slot: Slot
    index: tuple[np.int32, ...]  # of its first number in a device's shard of the parameter
    shape: tuple[int, ...]  # of one layer of the parameter, cut to this part, all shards together
    shards: int
    start: int
    count: int
    sharding: NamedSharding | None  # of the parameter
    layer_sharding: NamedSharding | None  # of one layer of it

    @property
    def region(self) -> tuple[np.int32 | slice, ...]:
        """Where it is in the parameter, which isn't sharded."""
        row, starts = self.index[: -len(self.shape)], self.index[-len(self.shape) :]
        return (*row, *(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True)))


def parts_of(slot: Slot, sharding: Any, itemsize: int) -> list[Part]:
    """Parts of a slot of at most `PART_BYTES` (or one index), of one shape so that they compile once; the last may
    overlap the one before.
    """
    sharding, layer, shards = sharding if isinstance(sharding, NamedSharding) else None, None, 1
    if sharding is not None:
        layer = NamedSharding(sharding.mesh, P(*sharding.spec[slot.row is not None :]))
        local = layer.shard_shape(tuple(slot.shape[letter] for letter in slot.order))
        shards = slot.shape[0] // local[slot.order.index(0)]
    size = slot.shape[0] // shards
    most = max(1, PART_BYTES // (itemsize * shards * math.prod(slot.shape[1:])))
    count, parts = math.ceil(size / math.ceil(size / most)), []
    shape = tuple(slot.shape[letter] if letter else count * shards for letter in slot.order)
    for start in (min(start, size - count) for start in range(0, size, count)):
        index = [*[slot.row] * (slot.row is not None), *(0 if letter else start for letter in slot.order)]
        parts.append(Part(slot, tuple(map(np.int32, index)), shape, shards, start, count, sharding, layer))
    return parts


def places(part: Part, disk: np.ndarray) -> Iterator[tuple[int, str, int, np.ndarray]]:
    """Where the numbers of a part stand on disk: (shard, tensor, its first number, their view in `disk`: `apart`)."""
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


def host_memory(spec: ArraySpec, sharding: NamedSharding | None) -> np.ndarray | None:
    """Uninitialised memory of a parameter, for `stream` to fill and `jax.device_put` to take over without a copy; None
    if it isn't that of one device which is the host itself.
    """
    devices = sharding.device_set if sharding else jnp.zeros(()).devices()
    if [device.platform for device in devices] != ["cpu"]:
        return None
    dtype = jnp.dtype(spec.dtype)
    return _aligned(math.prod(spec.shape) * dtype.itemsize).view(dtype).reshape(spec.shape)


def _aligned(size: int) -> np.ndarray:
    """Bytes at an address that JAX's CPU backend uses without a copy."""
    memory = np.empty(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]


def stream(
    parts: Sequence[Part], readable: Mapping[str, Readable], memory: Mapping[str, np.ndarray]
) -> Iterator[tuple[Part, jax.Array | None]]:
    """Yields every part with its numbers, [part.shape] in the type they have on disk (float32 if quantised); with None
    if its parameter is in `memory`, where they are then, cast to its type.

    An array is valid until the next one is asked for: computations that use it must be finished by then.
    """
    dtypes = [readable[part.slot.names[0]].dtype for part in parts]
    placed = [(part, dtype) for part, dtype in zip(parts, dtypes, strict=True) if part.slot.path not in memory]
    longest = max((math.prod(part.shape) * dtype.itemsize for part, dtype in placed), default=0)
    buffers = [_aligned(longest) for _ in range(2)]

    def read(part: Part, dtype: np.dtype, buffer: np.ndarray) -> tuple[Part, np.ndarray, list[Future]]:
        """Starts filling `buffer`, or the part's place in `memory`. Shards that no device of this process holds aren't
        read.
        """
        if (whole := memory.get(part.slot.path)) is not None:
            block = whole[part.region]
        else:
            block = buffer[: math.prod(part.shape) * dtype.itemsize].view(dtype).reshape(part.shape)
        wanted, axis = {0}, part.slot.order.index(0)
        if part.layer_sharding is not None:
            indices = part.layer_sharding.addressable_devices_indices_map(part.shape).values()
            wanted = {(index[axis].start or 0) // part.count for index in indices if index is not None}
        limit = PIECE_BYTES // max(dtype.itemsize, block.dtype.itemsize)
        futures = [
            pool.submit(_read_piece, readable[name], begin + start, begin + stop, target[index])
            for shard, name, begin, target in places(part, part.slot.apart(block))
            if shard in wanted
            for index, start, stop in _pieces(target.shape, limit)
        ]
        return part, block, futures

    with ThreadPoolExecutor(THREADS, "trace_jax-read") as pool:
        ahead = None
        for number, part in enumerate([*parts, None]):
            behind, ahead = ahead, part and read(part, dtypes[number], buffers[number % 2])
            if not behind:
                continue
            done, block, futures = behind
            for future in futures:
                future.result()
            if done.slot.path in memory:
                yield done, None
            elif (sharding := done.layer_sharding) is None:
                yield done, jax.device_put(block)
            else:
                yield done, jax.make_array_from_callback(done.shape, sharding, block.__getitem__)


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
    direct, size = target.flags.c_contiguous and target.dtype == tensor.dtype, (stop - start) * tensor.dtype.itemsize
    if not direct and getattr(_scratch, "bytes", np.empty(0)).size < size:
        _scratch.bytes = np.empty(size, np.uint8)  # fresh ones cost as much as reading into them
    out = target.reshape(-1).view(np.uint8) if direct else _scratch.bytes[:size]
    numbers = tensor.read(start, stop, out)
    if not (direct and np.may_share_memory(numbers, target)):
        with np.errstate(over="ignore"):  # as XLA casts
            numbers = numbers.astype(target.dtype, copy=False).reshape(target.shape)
        bits = f"u{target.itemsize}"  # which numpy copies faster than bfloat16
        copy_tiled(numbers.view(bits), target.view(bits))


def copy_tiled(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source` (contiguous), ten times as fast as numpy where their last axes differ: tiles keep both
    sides of the transposition in the processor's cache. XLA on a CPU transposes more slowly still.
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
    return _place(parameter, numbers, part.index, part.sharding, part.layer_sharding)


def take(parameter: jax.Array, part: Part) -> np.ndarray:
    """What stands in the place of `part`, its axes as on disk, contiguous, in every process; all must call it."""
    numbers = to_host(_take(parameter, part.index, part.shape, part.sharding, part.layer_sharding))
    source = numbers.view(f"u{numbers.dtype.itemsize}")
    disk = np.empty(part.slot.apart(source).shape, source.dtype)
    target = disk.transpose(part.slot.order)
    for index, _, _ in _pieces(source.shape, PIECE_BYTES // source.itemsize):
        copy_tiled(source[index], target[index])
    return disk.view(numbers.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _place(parameter, numbers, index, sharding, layer_sharding) -> jax.Array:
    def put(parameter, numbers, index):
        numbers = numbers.reshape((1,) * (parameter.ndim - numbers.ndim) + numbers.shape).astype(parameter.dtype)
        placed = lax.dynamic_update_slice(_bits(parameter), _bits(numbers), index)
        return lax.bitcast_convert_type(placed, parameter.dtype)

    if sharding is not None:
        specs = sharding.spec, layer_sharding.spec, P()
        put = jax.shard_map(put, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return put(parameter, numbers, index)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _take(parameter, index, shape, sharding, layer_sharding) -> jax.Array:
    def cut(parameter, index):
        local = shape if layer_sharding is None else layer_sharding.shard_shape(shape)
        return lax.dynamic_slice(parameter, index, (1,) * (parameter.ndim - len(local)) + local).reshape(local)

    if sharding is not None:
        cut = jax.shard_map(cut, mesh=sharding.mesh, in_specs=(sharding.spec, P()), out_specs=layer_sharding.spec)
    return cut(parameter, index)


def _bits(array: jax.Array) -> jax.Array:
    """The same bytes as unsigned integers, which XLA on a CPU copies ten times as fast as bfloat16."""
    return lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
