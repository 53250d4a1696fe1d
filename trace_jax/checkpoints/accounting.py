"""Which tensors of a checkpoint fill which parameter, and how: each is used once, and each parameter is filled once.

A layout says how a parameter's axes stand on disk: a string such as "(h c) d -> d h c". On the left are the axes of the
tensor on disk, slowest first. Letters in parentheses share one axis; `1` is an axis of size 1. On the right are the
axes of the parameter (one layer of it). Letters that number separate tensors (experts, gate and up) lead on the left.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from trace_jax.checkpoints.checkpoint import Checkpoint, CheckpointError, Readable, readable_tensor
from trace_jax.models.architecture import ModelConfig, flat_specs
from trace_jax.models.families import Family


@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer of one parameter (the whole parameter if `row` is None) and the names of the tensors that fill it.

    `shape`: every letter's axis apart, in the order of the disk; `separate`: how many of them number tensors;
    `tensor_shape`: the shape of each tensor; `order`: the axes of the parameter as indices into `shape`. `storage` is
    "mxfp4" for names that stand for two tensors each, blocks and scales.
    """

    path: str
    row: int | None
    names: tuple[str, ...]
    storage: str
    shape: tuple[int, ...]
    separate: int
    tensor_shape: tuple[int, ...]
    order: tuple[int, ...]

    def apart(self, array: Any) -> Any:
        """The parameter with its axes in the order of the disk, every letter apart."""
        return array.transpose(tuple(self.order.index(axis) for axis in range(len(self.order))))


def parse_layout(text: str, shape: tuple[int, ...], separate: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a `Slot` that its layout says, for a parameter whose one layer has `shape`; `separate` are the
    letters that number tensors."""
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


@dataclasses.dataclass(frozen=True)
class Accounting:
    """`slots` in the order of the files; `readable`: the tensors they name; `ignored`: the others, with why."""

    slots: tuple[Slot, ...]
    readable: Mapping[str, Readable]
    ignored: Mapping[str, str]


def account(checkpoint: Checkpoint, config: ModelConfig, family: Family) -> Accounting:
    """Finds a place for every tensor of a checkpoint.

    Raises:
      CheckpointError: tensors are missing, unexpected or misshapen, or stored in a way that can't be read. At most ten
        are named, then counted.
    """

    def refuse(faults: Sequence[str], message: str) -> None:
        if faults:
            more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise CheckpointError(f"{checkpoint.directory}: {message.format(', '.join(faults[:10]) + more)}.")

    tensors, quantization = checkpoint.tensors, checkpoint.config.get("quantization_config")
    if quantization and (method := quantization.get("quant_method")) not in ("fp8", "mxfp4"):
        raise CheckpointError(
            f"config.json: quantization method {method!r} can't be read; supported are fp8, mxfp4 and unquantised "
            "checkpoints."
        )
    slots = slots_of(config, family, tensors)
    uses = collections.Counter(name for slot in slots for name in slot.names)
    refuse([name for name, count in uses.items() if count > 1], "{} would fill two parameters")
    refuse([name for slot in slots for name in slot.names if _on_disk(slot, name) not in tensors], "missing {}")
    readable: dict[str, Readable] = {}
    faults = []
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
    refuse(
        [name for name, reason in ignored.items() if not reason],
        f"{{}} would stay unread; a {family.model_type} of this config.json has no such tensors",
    )
    place = {name: number for number, name in enumerate(tensors)}
    in_file_order = sorted(slots, key=lambda slot: place[readable[slot.names[0]].parts[0].name])
    return Accounting(tuple(in_file_order), readable, ignored)


def slots_of(config: ModelConfig, family: Family, present: Collection[str]) -> tuple[Slot, ...]:
    """What fills each parameter: of alternatives the first of which a tensor is `present`, else the first."""
    slots: list[Slot] = []
    for path, spec in flat_specs(config).items():
        stack = {"layers": config.moe_layers, "dense": config.dense_layers}.get(path.split("/")[0], ())
        shape = spec.shape[1:] if stack else spec.shape
        chosen: list[Slot] = []
        for stored in family.tensors:
            if stored.path != path or len(stored.layout.partition(" -> ")[2].split()) != len(shape):
                continue
            experts = range(config.num_experts) if "{expert}" in stored.names[0] else (0,)
            separate = ("e",) * ("{expert}" in stored.names[0]) + ("g",) * (len(stored.names) > 1)
            layout, filled = parse_layout(stored.layout, shape, separate), []
            for row, layer in enumerate(stack or (0,)):
                names = tuple(name.format(layer=layer, expert=expert) for expert in experts for name in stored.names)
                filled.append(Slot(path, row if stack else None, names, stored.storage, **layout))
            chosen = chosen or filled
            if any(_on_disk(slot, slot.names[0]) in present for slot in filled):
                chosen = filled
                break
        if not chosen:
            raise ValueError(f"{family.model_type}: no tensor fills the parameter {path}.")
        slots += chosen
    return tuple(slots)


def _on_disk(slot: Slot, name: str) -> str:
    return f"{name}_blocks" if slot.storage == "mxfp4" else name


def _why_ignored(name: str, checkpoint: Checkpoint, config: ModelConfig, family: Family) -> str:
    """The reason why a tensor may stay unread; empty if there is none."""
    extra = int(checkpoint.config.get("num_nextn_predict_layers") or 1)
    for pattern, reason in family.ignored.items():
        match = re.search(pattern, name)
        beyond = match and match.groupdict().get("beyond")
        if match and (beyond is None or 0 <= int(beyond) - config.num_layers < extra):
            return reason
    return ""
