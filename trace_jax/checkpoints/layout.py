"""How a parameter's axes stand on disk: a string such as "(h c) d -> d h c", and the two ways through it.

On the left are the axes of the tensor on disk, slowest first. Letters in parentheses share one axis; `1` is an axis of
size 1. On the right are the axes of the parameter (one layer of it). Letters that number separate tensors (experts,
gate and up) lead on the left.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

_TILE = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layer of a parameter on disk.

    `letters` and `shape`: every axis apart, in the order of the disk; `separate`: how many of them number tensors;
    `tensor_shape`: the shape of each tensor; `order`: the axes of the parameter as indices into `letters`.
    """

    letters: tuple[str, ...]
    shape: tuple[int, ...]
    separate: int
    tensor_shape: tuple[int, ...]
    order: tuple[int, ...]

    def to_params(self, array: Any) -> Any:
        """`array` [numbering axes..., tensor_shape...] as the parameter; numpy or JAX, a view where possible."""
        return array.reshape(self.shape).transpose(self.order)

    def to_disk(self, array: Any) -> Any:
        """The inverse of `to_params`."""
        return self.apart(array).reshape((*self.shape[: self.separate], *self.tensor_shape))

    def apart(self, array: Any) -> Any:
        """The parameter with its axes in the order of the disk, every letter apart."""
        return array.transpose(tuple(int(axis) for axis in np.argsort(self.order)))


def parse_layout(text: str, shape: tuple[int, ...], separate: tuple[str, ...] = ()) -> Layout:
    """Layout of a parameter whose one layer has `shape`; `separate` are the letters that number tensors.

    Raises:
      ValueError: the text isn't of this form, or its letters don't fit `shape`.
    """
    left, _, right = text.partition(" -> ")
    groups = [re.findall("[a-z]", group) for group in re.findall(r"\([a-z ]+\)|[a-z1]", left)]
    letters = tuple(letter for group in groups for letter in group)
    axes = tuple(right.split())
    if sorted(letters) != sorted(axes) or len(set(axes)) != len(axes) or len(axes) != len(shape):
        raise ValueError(f"layout {text!r} doesn't describe a parameter with axes {list(shape)}.")
    if letters[: len(separate)] != separate:
        raise ValueError(f"layout {text!r}: the letters {separate} number tensors and must lead.")
    size = dict(zip(axes, shape, strict=True))
    return Layout(
        letters=letters,
        shape=tuple(size[letter] for letter in letters),
        separate=len(separate),
        tensor_shape=tuple(math.prod(size[letter] for letter in group) for group in groups[len(separate) :]),
        order=tuple(letters.index(letter) for letter in axes),
    )


def copy_tiled(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source` (contiguous), ten times as fast as numpy does it where the two differ in their last axis.

    Tiles keep both sides of the transposition in the processor's cache. XLA on a CPU transposes more slowly still,
    which is why the host does it, not the device.
    """
    if target.ndim < 2 or target.strides[-1] == target.itemsize:
        target[...] = source
        return
    columns, whole = source.shape[-1], source.shape[-1] // _TILE * _TILE
    for begin, end in ((0, whole), (whole, columns)):
        if begin < end:
            width = min(_TILE, end - begin)
            tiles = (*source.shape[:-1], (end - begin) // width, width)
            packed = np.ascontiguousarray(np.moveaxis(source[..., begin:end].reshape(tiles), -2, 0))
            np.moveaxis(target[..., begin:end].reshape(tiles), -2, 0)[...] = packed
