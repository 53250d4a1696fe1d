"""Quantised tensors, decoded a slice at a time while a checkpoint is read.

FP8 as DeepSeek-V3 and MiniMax-M2 are published: float8_e4m3 with one scale per block (128 x 128) of the matrix in
NAME_scale_inv; value = float8 * scale. MXFP4 as GPT-OSS is published: NAME_blocks uint8 [..., C/32, 16] holds two
float4_e2m1 a byte, the low half first; value = float4 * 2^(scale - 127), one uint8 of NAME_scales [..., C/32] for 32
numbers (OCP Microscaling Formats 1.0).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from trace_jax.checkpoints.checkpoint import CheckpointError, Tensor

METHODS = ("fp8", "mxfp4")
_FLOAT32 = np.dtype(np.float32)
_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FLOAT4 = np.concatenate([_FLOAT4, -_FLOAT4])
# Both numbers of every byte, as one 8-byte item, so that one look-up decodes two.
_PAIRS = np.stack([np.tile(_FLOAT4, 16), np.repeat(_FLOAT4, 16)], axis=-1).view(np.complex64).reshape(256)


@dataclasses.dataclass(frozen=True)
class _Quantised:
    """Packed numbers and their scales, two tensors on disk that read as one of float32."""

    data: Tensor
    scales: Tensor
    dtype = _FLOAT32

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.data, self.scales


@dataclasses.dataclass(frozen=True)
class Fp8Tensor(_Quantised):
    """A float8 matrix, or a stack of them."""

    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The numbers `start` to `stop` (whole rows) in row-major order, float32 [stop - start]."""
        rows, columns = self.shape[-2:]
        block_rows, block_columns = self.block
        values = np.take(_FLOAT8, self.data.read(start, stop).view(np.uint8)).reshape(-1, columns)
        number = start // columns + np.arange(len(values))
        block_row = number // rows * math.ceil(rows / block_rows) + number % rows // block_rows
        scale_columns = math.ceil(columns / block_columns)
        first, last = int(block_row[0]), int(block_row[-1]) + 1
        scales = self.scales.read(first * scale_columns, last * scale_columns).astype(np.float32)
        scales = scales.reshape(-1, scale_columns)[block_row - first]
        for column in range(scale_columns):
            values[:, column * block_columns : (column + 1) * block_columns] *= scales[:, column, None]
        return values.reshape(-1)


class Mxfp4Tensor(_Quantised):
    """Blocks of 4-bit numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-2], 32 * self.data.shape[-2])

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The numbers `start` to `stop` (multiples of 32) in row-major order, float32 [stop - start]."""
        stop = math.prod(self.shape) if stop is None else stop
        values = np.take(_PAIRS, self.data.read(start // 2, stop // 2)).view(np.float32).reshape(-1, 32)
        exponents = self.scales.read(start // 32, stop // 32).astype(np.int32) - 127
        return np.ldexp(values, exponents[:, None], out=values).reshape(-1)


Readable = Tensor | Fp8Tensor | Mxfp4Tensor


def check_method(config: Mapping[str, Any]) -> str | None:
    """The quantization method of a config.json, if any.

    Raises:
      CheckpointError: a method that isn't implemented.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method")
    if method not in METHODS:
        raise CheckpointError(
            f"config.json: quantization method {method!r} can't be read; supported are {', '.join(METHODS)} and "
            "unquantised checkpoints."
        )
    return method


def fp8_tensor(tensor: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Fp8Tensor:
    """The float8 `tensor` with its scales.

    Raises:
      CheckpointError: the scales are missing or have another shape than the blocks need.
    """
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    scales = tensors.get(f"{tensor.name}_scale_inv")
    if not block or scales is None or len(tensor.shape) < 2:
        raise CheckpointError(
            f"{tensor.file.path}: {tensor.name} is float8; it needs {tensor.name}_scale_inv in the checkpoint and "
            "quantization_config.weight_block_size in config.json."
        )
    grid = tuple(math.ceil(size / width) for size, width in zip(tensor.shape[-2:], block, strict=True))
    if scales.shape != (*tensor.shape[:-2], *grid):
        raise CheckpointError(
            f"{scales.file.path}: {scales.name} is {list(scales.shape)}, expected {[*tensor.shape[:-2], *grid]}."
        )
    return Fp8Tensor(tensor, scales, (block[0], block[1]))


def mxfp4_tensor(name: str, tensors: Mapping[str, Tensor]) -> Mxfp4Tensor:
    """The tensor `name` from its blocks and scales.

    Raises:
      CheckpointError: the scales are missing, or the two don't fit each other.
    """
    blocks, scales = tensors[f"{name}_blocks"], tensors.get(f"{name}_scales")
    if scales is None or blocks.shape[-1:] != (16,) or scales.shape != blocks.shape[:-1]:
        found = "missing" if scales is None else list(scales.shape)
        raise CheckpointError(
            f"{blocks.file.path}: {blocks.name} is {list(blocks.shape)} and {name}_scales {found}; expected "
            "[..., 16] and the same without the 16."
        )
    return Mxfp4Tensor(blocks, scales)
