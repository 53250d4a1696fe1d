"""Published checkpoints: a directory with config.json and one safetensors file, or several with an index.

Safetensors is 8 bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and
the data. It is read and written here because the library's numpy front end can't slice float8, must hold all tensors of
a file in memory to write it, and reads through a memory map, whose pages count as resident memory of the process.
"""

import dataclasses
import json
import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trace_jax.io.files import is_remote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
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

    file: "TensorFile" = dataclasses.field(repr=False)
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def parts(self) -> "tuple[Tensor, ...]":
        """The tensors on disk that it consists of (a quantised one has two)."""
        return (self,)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The numbers `start` to `stop` of the tensor in row-major order, as a fresh 1-D array."""
        stop = math.prod(self.shape) if stop is None else stop
        out = np.empty(stop - start, self.dtype)
        self.read_into(out.view(np.uint8), start)
        return out

    def write(self, array: np.ndarray, start: int = 0) -> None:
        """Writes `array` (of the tensor's type) as the numbers from `start` on, in row-major order."""
        if array.dtype != self.dtype or start + array.size > math.prod(self.shape):
            raise ValueError(
                f"{self.name} is {self.dtype}{list(self.shape)}; got {array.dtype}{list(array.shape)} from {start} on."
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        _write(self.file.descriptor, data, self.offset + start * self.dtype.itemsize)

    def copy(self, other: "Tensor") -> None:
        """Writes the bytes of `other`, which has the same type and shape."""
        step, size = _COPY_BYTES // self.dtype.itemsize, math.prod(self.shape)
        for start in range(0, size, step):
            self.write(other.read(start, min(start + step, size)), start)

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out` (uint8, contiguous) with the bytes from the number `start` on."""
        position, left = self.offset + start * self.dtype.itemsize, out.reshape(-1).data
        while left:
            count = os.preadv(self.file.descriptor, [left], position)
            if not count:
                raise CheckpointError(f"{self.file.path}: ends within {self.name}; it was cut short while being read.")
            position, left = position + count, left[count:]


class TensorFile:
    """The header of a safetensors file, checked against the file's size. `tensors` maps names to `Tensor`, which can be
    written to if the file is `writable`.

    Raises:
      CheckpointError: the file is truncated, longer than its tensors, or its header is wrong; the message names the
        file and the tensor.
    """

    def __init__(self, path: str | os.PathLike, *, writable: bool = False):
        self.path = Path(path)
        self.descriptor = os.open(self.path, os.O_RDWR if writable else os.O_RDONLY)
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


Specs = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # type and shape by name


def create_file(path: str | os.PathLike, specs: Specs, metadata: Mapping[str, str]) -> TensorFile:
    """A new safetensors file whose tensors, in this order, are to be written; until then they are zeros."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SPELLING[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return TensorFile(path, writable=True)


def _write(descriptor: int, left: memoryview, position: int) -> None:
    while left:
        count = os.pwrite(descriptor, left, position)
        position, left = position + count, left[count:]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`config` is the parsed config.json; `tensors` has every tensor of every file; `index` is None for one file."""

    directory: Path
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, Tensor]
    index: Mapping[str, Any] | None


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads config.json, the index and every file's header; no tensor.

    Raises:
      CheckpointError: `path` is no directory with a complete safetensors checkpoint; the message says what to do.
    """
    if is_remote(path):
        raise CheckpointError(
            f"{os.fspath(path)}: tensors are read from a local disk. Copy the checkpoint to every host first: "
            f"gcloud storage cp -r {os.fspath(path).rstrip('/')} DIRECTORY."
        )
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is no directory. A model of the Hugging Face hub is downloaded first: "
            f"hf download {'/'.join(directory.parts[-2:])} --local-dir DIRECTORY."
        )
    config = read_object(directory / "config.json")
    single, index_path = directory / SINGLE, directory / INDEX
    if single.exists():
        file = TensorFile(single)
        return Checkpoint(directory, config, (file,), file.tensors, None)
    if not index_path.exists():
        raise _no_tensors(directory)
    index = read_object(index_path)
    return Checkpoint(directory, config, *_shards(index_path, index), index)


def _shards(index_path: Path, index: Mapping[str, Any]) -> tuple[tuple[TensorFile, ...], dict[str, Tensor]]:
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{index_path}: weight_map must give each tensor's file.")
    files, tensors = {}, {}
    for shard in sorted(set(shard_of.values())):
        path = index_path.parent / shard
        if path.parent != index_path.parent or not path.is_file():
            raise CheckpointError(f"{index_path}: names the file {shard}, which isn't there.")
        files[shard] = TensorFile(path)
        for name, tensor in files[shard].tensors.items():
            if name in tensors:
                raise CheckpointError(f"{path}: {name} is also in {tensors[name].file.path.name}.")
            tensors[name] = tensor
    for name, shard in shard_of.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{index_path}: {name} should be in {shard}, but isn't.")
    return tuple(files.values()), tensors


def _no_tensors(directory: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}.")
    return CheckpointError(
        f"{directory}: holds {pickles[0]}, a pickle, which can run any code when it is read. Convert it where you "
        f"trust it: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{directory}', "
        "dtype='auto').save_pretrained('CONVERTED')\", and copy the tokenizer's files."
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that a person didn't write and can't mend."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {path.parent} is no Hugging Face checkpoint.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is no JSON object. Download it again.")
    return value
