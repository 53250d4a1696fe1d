"""Safetensors files, read a slice at a time and written a tensor at a time.

The format is 8 bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and
the data. It is read and written here because the library's numpy front end can't slice float8, must hold all tensors of
a file in memory to write it, and reads through a memory map, whose pages count as resident memory of the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trace_jax.io.files import replacing
from trace_jax.parallel.processes import is_main

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_SPELLING = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 2**23


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written. The message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a `TensorFile`; nothing of it is in memory."""

    file: TensorFile = dataclasses.field(repr=False)
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors on disk that it consists of (a quantised one has two)."""
        return (self,)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The numbers `start` to `stop` of the tensor in row-major order, as a fresh 1-D array."""
        stop = math.prod(self.shape) if stop is None else stop
        out = np.empty(stop - start, self.dtype)
        self.read_into(out.view(np.uint8), start)
        return out

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out` (uint8, contiguous) with the bytes from the number `start` on."""
        position, left = self.offset + start * self.dtype.itemsize, out.reshape(-1).data
        while left:
            count = os.preadv(self.file.descriptor, [left], position)
            if not count:
                raise CheckpointError(f"{self.file.path}: ends within {self.name}; it was cut short while being read.")
            position, left = position + count, left[count:]


class TensorFile:
    """The header of a safetensors file, checked against the file's size. `tensors` maps names to `Tensor`.

    Raises:
      CheckpointError: the file is truncated, longer than its tensors, or its header is wrong; the message names the
        file and the tensor.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        size = os.fstat(self.descriptor).st_size
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{self.path}: {size} bytes are too few for its header; truncated, or no safetensors."
            )
        header = _parse_header(self.path, os.pread(self.descriptor, length, 8))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
        self._check_offsets(8 + length, size)

    def _tensor(self, name: str, entry: Any, data: int) -> Tensor:
        try:
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
            if not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError("shape and data_offsets must be whole numbers >= 0")
            spelling = entry["dtype"]
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path}: the header's entry of {name} is wrong ({error!r}).") from error
        if spelling not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {spelling!r}; readable are {', '.join(DTYPES)}.")
        tensor = Tensor(self, name, DTYPES[spelling], shape, data + begin)
        if tensor.nbytes != end - begin:
            raise CheckpointError(
                f"{self.path}: {name} is {spelling}{list(shape)}, {tensor.nbytes} bytes, but occupies {end - begin}."
            )
        return tensor

    def in_order(self) -> list[Tensor]:
        """The tensors as they lie in the file."""
        return sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))

    def _check_offsets(self, data: int, size: int) -> None:
        end, before = data, "the header"
        for tensor in self.in_order():
            if tensor.offset != end:
                fault = "overlap" if tensor.offset < end else "leave a gap"
                raise CheckpointError(f"{self.path}: the bytes of {before} and {tensor.name} {fault}.")
            end, before = tensor.offset + tensor.nbytes, tensor.name
            if end > size:
                raise CheckpointError(f"{self.path}: truncated; {before} ends at byte {end}, the file at {size}.")
        if end != size:
            raise CheckpointError(f"{self.path}: {size - end} bytes follow the last tensor, {before}.")


def _parse_header(path: Path, text: bytes) -> dict:
    def unique(pairs):
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not that of a safetensors file ({error}).") from error
    return header


class TensorWriter:
    """A safetensors file being written; see `writing_tensors`. Without a descriptor it only checks its input."""

    def __init__(
        self, descriptor: int | None, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping
    ):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end, self._begin = 0, {}
        for name, (dtype, shape) in specs.items():
            self._begin[name], end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [self._begin[name], end]
            header[name] = {"dtype": _SPELLING[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._descriptor, self._specs, self._data = descriptor, specs, 8 + len(text)
        self.missing = set(specs)
        if descriptor is not None:
            os.ftruncate(descriptor, self._data + end)
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Writes `array` as the numbers of `name` from `start` on, in row-major order."""
        dtype, shape = self._specs[name]
        if array.dtype != dtype or start + array.size > math.prod(shape):
            raise ValueError(f"{name} is {dtype}{list(shape)}; got {array.dtype}{list(array.shape)} from {start} on.")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._put(data, self._data + self._begin[name] + start * dtype.itemsize)
        self.missing.discard(name)

    def copy(self, name: str, tensor: Tensor) -> None:
        """Writes the bytes of `tensor` as `name`."""
        step = _COPY_BYTES // tensor.dtype.itemsize
        for start in range(0, max(1, math.prod(tensor.shape)), step):
            self.write(name, tensor.read(start, min(start + step, math.prod(tensor.shape))), start)

    def _put(self, data: Any, position: int) -> None:
        if self._descriptor is None:
            return
        left = memoryview(data)
        while left:
            count = os.pwrite(self._descriptor, left, position)
            position, left = position + count, left[count:]


@contextlib.contextmanager
def writing_tensors(
    path: str | os.PathLike,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> Iterator[TensorWriter]:
    """Yields a `TensorWriter` for a file with the tensors `specs` (dtype and shape by name), in this order.

    Tensors may be written in any order and in parts. The file gets its name at the end, when all have been written.
    Other processes than 0 write no byte.

    Raises:
      CheckpointError: a tensor has not been written.
    """
    with contextlib.ExitStack() as stack:
        descriptor = None
        if is_main():
            temporary = stack.enter_context(replacing(path))
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            stack.callback(os.close, descriptor)
        writer = TensorWriter(descriptor, specs, metadata)
        yield writer
        if writer.missing:
            raise CheckpointError(f"{path}: {sorted(writer.missing)[0]} and maybe others have not been written.")
