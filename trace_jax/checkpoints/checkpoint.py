"""Published checkpoints: a directory with config.json and one safetensors file, or several with an index.

A file is opened by the safetensors library, which checks its header. Tensors are read and written here because the
library can't slice float8, must hold all tensors of a file in memory to write it, and reads through a memory map, whose
pages count as resident memory of the process.

Quantised tensors are decoded a slice at a time. FP8 as DeepSeek-V3 and MiniMax-M2 are published: float8_e4m3 with one
scale per block (128 x 128) of the matrix in NAME_scale_inv; value = float8 * scale. MXFP4 as GPT-OSS is published:
NAME_blocks uint8 [..., C/32, 16] holds two float4_e2m1 a byte, the low half first; value = float4 * 2^(scale - 127),
one uint8 of NAME_scales [..., C/32] for 32 numbers (OCP Microscaling Formats 1.0).
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
from safetensors import SafetensorError, safe_open

from trace_jax.io.files import is_remote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
DTYPES |= {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
DTYPES = {name: np.dtype(kind) for name, kind in DTYPES.items()}
_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_FLOAT4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# Both numbers of every byte, as one 8-byte item, so that one look-up decodes two.
_PAIRS = np.stack([np.tile(_FLOAT4, 16), np.repeat(_FLOAT4, 16)], axis=-1).view(np.complex64).reshape(256)


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written. The message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a `TensorFile`; nothing of it is in memory."""

    file: "TensorFile"
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def parts(self) -> "tuple[Tensor, ...]":
        """The tensors on disk that it consists of (a quantised one has two)."""
        return (self,)

    def read(self, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The numbers `start` to `stop` in row-major order, 1-D; in `out` (contiguous bytes) where it is given."""
        if out is None:
            out = np.empty(((self.size if stop is None else stop) - start) * self.dtype.itemsize, np.uint8)
        left, position = out.data, self.offset + start * self.dtype.itemsize
        while left:
            count = os.preadv(self.file.descriptor, [left], position)
            if not count:
                raise CheckpointError(f"{self.file.path}: ends within {self.name}; it was cut short while being read.")
            position, left = position + count, left[count:]
        return out.view(self.dtype)

    def write(self, array: np.ndarray, start: int = 0) -> None:
        """Writes `array` (of the tensor's type) as the numbers from `start` on, in row-major order."""
        assert array.dtype == self.dtype and start + array.size <= self.size, self.name
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        position = self.offset + start * self.dtype.itemsize
        while left:
            count = os.pwrite(self.file.descriptor, left, position)
            position, left = position + count, left[count:]

    def copy(self, other: "Readable") -> None:
        """Writes the numbers of `other`, which has the same shape, whole rows at a time."""
        row = max(1, math.prod(self.shape[-1:]))
        step = row * max(1, 2**21 // row)
        for start in range(0, self.size, step):
            self.write(other.read(start, min(start + step, self.size)).astype(self.dtype, copy=False), start)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Packed numbers and their scales, two tensors on disk that read as one of float32."""

    data: Tensor
    scales: Tensor
    block: tuple[int, ...] = ()  # rows and columns of a float8 matrix that share a scale; () for MXFP4
    dtype = np.dtype(np.float32)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.data, self.scales

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape if self.block else (*self.data.shape[:-2], 32 * self.data.shape[-2])

    def read(self, start: int = 0, stop: int | None = None, _out: Any = None) -> np.ndarray:
        """The numbers `start` to `stop` (whole rows, or multiples of 32) in row-major order, float32 [stop - start]."""
        stop = math.prod(self.shape) if stop is None else stop
        if not self.block:
            values = np.take(_PAIRS, self.data.read(start // 2, stop // 2)).view(np.float32).reshape(-1, 32)
            exponents = self.scales.read(start // 32, stop // 32).astype(np.int32) - 127
            return np.ldexp(values, exponents[:, None], out=values).reshape(-1)
        rows, columns = self.shape[-2:]
        block_rows, block_columns = self.block
        values = np.take(_FLOAT8, self.data.read(start, stop).view(np.uint8)).reshape(-1, columns)
        number = start // columns + np.arange(len(values))
        block_row = number // rows * math.ceil(rows / block_rows) + number % rows // block_rows
        scale_columns = math.ceil(columns / block_columns)
        first, last = int(block_row[0]), int(block_row[-1]) + 1
        scales = self.scales.read(first * scale_columns, last * scale_columns).astype(np.float32)
        scales = scales.reshape(-1, scale_columns)[block_row - first]
        values *= np.repeat(scales, block_columns, axis=1)[:, :columns]
        return values.reshape(-1)


Readable = Tensor | Quantised


class TensorFile:
    """A safetensors file; its `tensors`, in the order of the file, can be written to if it is `writable`."""

    def __init__(self, path: str | os.PathLike, *, writable: bool = False):
        self.path = Path(path)
        self.descriptor = os.open(self.path, os.O_RDWR if writable else os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.tensors: dict[str, Tensor] = {}
        offset = 8 + int.from_bytes(os.pread(self.descriptor, 8, 0), "little")  # behind the header there are no gaps
        try:
            with safe_open(self.path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
        except SafetensorError as error:
            why = f"{error}. It was cut short on its way or is no safetensors file; download it again."
            raise CheckpointError(f"{self.path}: {why}") from None
        for name, one in slices.items():
            if (dtype := one.get_dtype()) not in DTYPES:
                raise CheckpointError(f"{self.path}: {name} has dtype {dtype!r}; readable are {', '.join(DTYPES)}.")
            self.tensors[name] = Tensor(self, name, DTYPES[dtype], tuple(one.get_shape()), offset)
            offset += self.tensors[name].nbytes


Specs = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # type and shape by name


def create_file(path: str | os.PathLike, specs: Specs, metadata: Mapping[str, str]) -> TensorFile:
    """A new safetensors file whose tensors, in this order, are to be written; until then they are zeros."""
    spellings = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": spellings[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return TensorFile(path, writable=True)


def check_arrays(where: Any, arrays: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError for arrays of other names, shapes or types than `expected`; each is named."""
    if set(arrays) != set(expected):
        missing, unexpected = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise ValueError(f"{where}: missing tensors {missing}, unexpected {unexpected}.")
    for name, want in expected.items():
        got, wanted = (f"{array.dtype}{list(array.shape)}" for array in (arrays[name], want))
        if got != wanted:
            raise ValueError(f"{where}: {name} is {got}, expected {wanted}.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`config` is the parsed config.json; `tensors` has every tensor of every file, in the order of the files."""

    directory: Path
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, Tensor]


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads config.json, the index and every file's header; no tensor. What isn't complete is a CheckpointError."""
    if is_remote(path):
        copy = f"copy it to every host first: gcloud storage cp -r {os.fspath(path).rstrip('/')} DIRECTORY."
        raise CheckpointError(f"{os.fspath(path)}: tensors are read from a local disk; {copy}")
    directory = Path(path)
    if not directory.is_dir():
        download = f"hf download {'/'.join(directory.parts[-2:])} --local-dir DIRECTORY."
        why = "is no directory. A model of the Hugging Face hub is downloaded first"
        raise CheckpointError(f"{directory} {why}: {download}")
    config, index = read_object(directory / "config.json"), directory / INDEX
    is_single = (directory / SINGLE).exists()
    if not is_single and not index.exists():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if not pickles:
            raise CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}.")
        raise CheckpointError(
            f"{directory}: holds {pickles[0]}, a pickle, which can run any code when it is read. Convert it where you "
            f'trust it: python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
            f"'{directory}', dtype='auto').save_pretrained('CONVERTED')\", and copy the tokenizer's files."
        )
    file_of = {} if is_single else read_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise CheckpointError(f"{index}: weight_map must give each tensor's file.")
    files, tensors = {}, {}
    for name in [SINGLE] if is_single else sorted(set(file_of.values())):
        shard = directory / name
        if shard.parent != directory or not shard.is_file():
            raise CheckpointError(f"{index}: names the file {name}, which isn't there.")
        files[name] = TensorFile(shard)
        if twice := tensors.keys() & files[name].tensors.keys():
            raise CheckpointError(f"{shard}: {min(twice)} is also in {tensors[min(twice)].file.path.name}.")
        tensors |= files[name].tensors
    for name, file in file_of.items():
        if name not in files[file].tensors:
            raise CheckpointError(f"{index}: {name} should be in {file}, but isn't.")
    return Checkpoint(directory, config, tuple(files.values()), tensors)


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


def readable_tensor(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], storage: str = "plain"
) -> Readable:
    """The tensor `name`: with its scales if it is float8, of its blocks and scales if `storage` is "mxfp4"."""
    if storage == "mxfp4":
        blocks, scales = tensors[f"{name}_blocks"], tensors.get(f"{name}_scales")
        if scales is None or blocks.shape[-1:] != (16,) or scales.shape != blocks.shape[:-1]:
            found = list(scales.shape) if scales else "missing"
            why = f"{blocks.name} is {list(blocks.shape)} and {name}_scales {found}"
            raise CheckpointError(f"{blocks.file.path}: {why}; expected [..., 16] and the same without the 16.")
        return Quantised(blocks, scales)
    tensor, scales = tensors[name], tensors.get(f"{name}_scale_inv")
    if tensor.dtype != DTYPES["F8_E4M3"]:
        return tensor
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    if not block or scales is None or len(tensor.shape) < 2:
        needed = f"{name}_scale_inv in the checkpoint and quantization_config.weight_block_size in config.json"
        raise CheckpointError(f"{tensor.file.path}: {name} is float8; it needs {needed}.")
    grid = (math.ceil(size / width) for size, width in zip(tensor.shape[-2:], block, strict=True))
    if scales.shape != (wanted := (*tensor.shape[:-2], *grid)):
        raise CheckpointError(f"{scales.file.path}: {scales.name} is {list(scales.shape)}, expected {list(wanted)}.")
    return Quantised(tensor, scales, tuple(block))
