"""Which tensors of a checkpoint fill which parameter, and how: each is used once, and each parameter is filled once.

A layout says how a parameter's axes stand on disk: a string such as "(h c) d -> d h c". On the left are the axes of the
tensor on disk, slowest first. Letters in parentheses share one axis; `1` is an axis of size 1. On the right are the
axes of the parameter (one layer of it). Letters that number separate tensors (experts, gate and up) lead on the left.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.checkpoints.checkpoint import DTYPES, Checkpoint, CheckpointError
from trace_jax.checkpoints.quantized import Readable, check_method, fp8_tensor, mxfp4_tensor
from trace_jax.models.arrays import ArraySpec, flat_specs
from trace_jax.models.config import ModelConfig
from trace_jax.models.families import Family, Stored

_NAMED = 10


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

    def apart(self, array: Any) -> Any:
        """The parameter with its axes in the order of the disk, every letter apart."""
        return array.transpose(tuple(self.order.index(axis) for axis in range(len(self.order))))


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


@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer of one parameter (the whole parameter if `row` is None) and the names of the tensors that fill it."""

    path: str
    row: int | None
    layout: Layout
    names: tuple[str, ...]
    storage: str = "plain"


@dataclasses.dataclass(frozen=True)
class Accounting:
    """`slots` in the order of the files; `readable`: the tensors they name; `ignored`: the others, with why."""

    checkpoint: Checkpoint
    slots: tuple[Slot, ...]
    readable: Mapping[str, Readable]
    ignored: Mapping[str, str]

    def itemsize(self, slot: Slot) -> int:
        """Bytes a number of the slot has when it is read."""
        return self.readable[slot.names[0]].dtype.itemsize


def account(checkpoint: Checkpoint, config: ModelConfig, family: Family) -> Accounting:
    """Finds a place for every tensor of a checkpoint.

    Raises:
      CheckpointError: tensors are missing, unexpected or misshapen, or stored in a way that can't be read. At most ten
        are named, then counted.
    """
    check_method(checkpoint.config)
    slots = slots_of(config, family, checkpoint.tensors)
    used = [name for slot in slots for name in slot.names]
    if len(set(used)) != len(used):
        raise ValueError(f"{family.model_type}: {_first(used)} fills two parameters.")
    missing = [name for slot in slots for name in slot.names if _on_disk(slot, name) not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{checkpoint.directory}: missing {_list(missing)}.")
    readable = {name: _open(checkpoint, slot, name) for slot in slots for name in slot.names}
    _check(checkpoint, slots, readable)
    ignored = _ignored(checkpoint, readable, family, config.num_layers)
    in_file_order = sorted(slots, key=lambda slot: _position(readable[slot.names[0]]))
    return Accounting(checkpoint, tuple(in_file_order), readable, ignored)


def slots_of(config: ModelConfig, family: Family, present: Iterable[str]) -> tuple[Slot, ...]:
    """What fills each parameter; of alternatives, the first that is among the tensors `present`, else the first."""
    by_path: dict[str, list[Stored]] = {}
    for stored in family.stored(config):
        by_path.setdefault(stored.path, []).append(stored)
    specs = flat_specs(config)
    unfilled = sorted(set(specs) ^ set(by_path))
    if unfilled:
        raise ValueError(f"{family.model_type}: parameters and stored tensors don't correspond: {_list(unfilled)}.")
    slots = []
    for path, spec in specs.items():
        alternatives = [_slots(stored, spec, config) for stored in by_path[path]]
        chosen = (found for found in alternatives if _on_disk(found[0], found[0].names[0]) in present)
        slots += next(chosen, alternatives[0])
    return tuple(slots)


def _slots(stored: Stored, spec: ArraySpec, config: ModelConfig) -> list[Slot]:
    per_expert = "{expert}" in stored.names[0]
    experts = range(config.num_experts) if per_expert else (0,)
    separate = ("e",) * per_expert + ("g",) * (len(stored.names) > 1)
    stack = {"layers": config.moe_layers, "dense": config.dense_layers}.get(stored.path.split("/")[0])
    layout = parse_layout(stored.layout, spec.shape if stack is None else spec.shape[1:], separate)
    return [
        Slot(
            path=stored.path,
            row=row if stack else None,
            layout=layout,
            names=tuple(name.format(layer=layer, expert=expert) for expert in experts for name in stored.names),
            storage=stored.storage,
        )
        for row, layer in enumerate(stack or (0,))
    ]


def _on_disk(slot: Slot, name: str) -> str:
    return f"{name}_blocks" if slot.storage == "mxfp4" else name


def _open(checkpoint: Checkpoint, slot: Slot, name: str) -> Readable:
    if slot.storage == "mxfp4":
        return mxfp4_tensor(name, checkpoint.tensors)
    tensor = checkpoint.tensors[name]
    if tensor.dtype == DTYPES["F8_E4M3"]:
        return fp8_tensor(tensor, checkpoint.tensors, checkpoint.config)
    return tensor


def _check(checkpoint: Checkpoint, slots: Sequence[Slot], readable: Mapping[str, Readable]) -> None:
    faults = []
    for slot in slots:
        for name in slot.names:
            shape, want = readable[name].shape, slot.layout.tensor_shape
            if shape != want:
                faults.append(f"{name} is {list(shape)}, expected {list(want)}")
        if len({readable[name].dtype for name in slot.names}) > 1:
            faults.append(f"{slot.names[0]} and the other tensors of {slot.path} have different types")
    if faults:
        raise CheckpointError(f"{checkpoint.directory}: {_list(faults)}.")


def _position(tensor: Readable) -> tuple[str, int]:
    return str(tensor.parts[0].file.path), tensor.parts[0].offset


def _ignored(
    checkpoint: Checkpoint, readable: Mapping[str, Readable], family: Family, num_layers: int
) -> dict[str, str]:
    ignored, unexpected = {}, []
    used = {part.name for tensor in readable.values() for part in tensor.parts}
    extra = range(num_layers, num_layers + int(checkpoint.config.get("num_nextn_predict_layers") or 1))

    def applies(pattern: str, name: str) -> bool:
        found = re.search(pattern, name)
        beyond = found and found.groupdict().get("beyond")
        return bool(found) and (beyond is None or int(beyond) in extra)

    for name in checkpoint.tensors:
        if name in used:
            continue
        reason = next((reason for pattern, reason in family.ignored.items() if applies(pattern, name)), None)
        if reason is None:
            unexpected.append(name)
        else:
            ignored[name] = reason
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.directory}: {_list(unexpected)} would stay unread; a {family.model_type} of this config.json "
            "has no such tensors."
        )
    return ignored


def _list(items: Sequence[str]) -> str:
    """At most ten of them, then the count."""
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _first(names: Sequence[str]) -> str:
    values, counts = np.unique(names, return_counts=True)
    return str(values[counts > 1][0])
