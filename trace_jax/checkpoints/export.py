"""Export: a model as a directory that transformers loads, `save_pretrained`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from trace_jax.checkpoints.accounting import Accounting, Slot, account, slots_of
from trace_jax.checkpoints.checkpoint import open_checkpoint
from trace_jax.checkpoints.layout import copy_tiled
from trace_jax.checkpoints.model_card import ModelCard, base_model_of, licence_of, readme
from trace_jax.checkpoints.new_checkpoint import mixtral_config_json, write_tokenizer
from trace_jax.checkpoints.placing import equal, take
from trace_jax.checkpoints.quantized import Readable, fp8_tensor
from trace_jax.checkpoints.shards import (
    Specs,
    check_destination,
    check_space,
    nbytes,
    plan_shards,
    replacing_directory,
    writing_shards,
)
from trace_jax.checkpoints.streaming import PIECE_BYTES, Part, parts_of, pieces, stream
from trace_jax.checkpoints.tensor_file import DTYPES, CheckpointError, Tensor, TensorWriter
from trace_jax.io.files import is_remote
from trace_jax.io.progress import progress
from trace_jax.models.arrays import flat_specs, flatten
from trace_jax.models.families import FAMILIES, family_of
from trace_jax.models.model import Model

SHARD_BYTES = 5 * 10**9
_BFLOAT16 = DTYPES["BF16"]
# What travels along with the tensors. Code and weights of other formats don't.
_ALONG = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_ALONG += ("vocab*", "merges.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_NEVER = {".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"}


def save_pretrained(
    model: Model,
    path: str | os.PathLike,
    *,
    card: ModelCard | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model` as a Hugging Face checkpoint: like its source, with what has changed put in.

    Tensors keep the source's names, layout and type. One whose values are those that the import had is copied byte by
    byte; so is what the import ignored. If a quantised tensor has changed, all quantised ones are written as bfloat16
    and config.json loses its quantization_config. A model without a source (trained here) becomes a `mixtral`.
    Everything is written under a temporary name and renamed at the end. Memory is as in `load_pretrained`. Of several
    processes all must call it, and process 0 writes.

    Args:
      card: what README.md says was done; without it, only how the tensors differ from the source's.
      overwrite: replaces an existing checkpoint at `path`.
      shard_bytes: largest file of tensors.

    Raises:
      CheckpointError: `path` exists or has too little space; the source is gone or doesn't fit the model.
      ConfigError: a model without a source that no `mixtral` config.json describes.
    """
    if is_remote(path):
        raise CheckpointError(f"{os.fspath(path)}: a checkpoint is exported to a local disk. Copy it there afterwards.")
    destination = Path(path).absolute()
    check_destination(destination, overwrite=overwrite, source=model.source.directory if model.source else None)
    params = _checked_params(model)
    plan = _plan_from_source(model, params) if model.source else _plan_new(model)
    source = plan.accounting.checkpoint if plan.accounting else None
    shards = plan_shards(plan.specs, shard_bytes, source)
    check_space(destination, nbytes(plan.specs) + 2**26)
    with replacing_directory(destination) as directory:
        with writing_shards(directory, shards, source) as writers:
            changed = _write(plan, params, writers)
        _write_others(plan, model, directory)
        text = readme(
            card,
            base_model=base_model_of(source.directory, source.config) if source else None,
            licence=licence_of(source.directory) if source else {},
            notes=_notes(plan, changed),
        )
        (directory / "README.md").write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is written: `specs` of all tensors; `accounting` of the source; `decoded`: slots written as bfloat16
    because quantised tensors have changed; `new`: slots of a model without a source."""

    specs: Specs
    accounting: Accounting | None = None
    decoded: tuple[Slot, ...] = ()
    new: tuple[Slot, ...] = ()


def _checked_params(model: Model) -> dict[str, jax.Array]:
    """The parameters by path.

    Raises:
      ValueError: they aren't those of the configuration.
    """
    params, specs = flatten(model.params), flat_specs(model.config)
    if set(params) != set(specs):
        raise ValueError(f"the parameters {sorted(set(params) ^ set(specs))} don't correspond to the configuration.")
    for path, leaf in params.items():
        want = specs[path]
        if leaf.shape != want.shape or leaf.dtype != want.dtype:
            raise ValueError(f"{path} is {leaf.dtype}{list(leaf.shape)}, expected {want.dtype}{list(want.shape)}.")
    return params


def _sharding(leaf: jax.Array) -> NamedSharding | None:
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None


def _plan_new(model: Model) -> _Plan:
    mixtral_config_json(model.config, model.special)  # raises if it is none
    specs = flat_specs(model.config)
    slots = slots_of(model.config, FAMILIES["mixtral"], ())
    tensors = {
        name: (np.dtype(jax.numpy.dtype(specs[slot.path].dtype)), slot.layout.tensor_shape)
        for slot in slots
        for name in slot.names
    }
    return _Plan(tensors, new=slots)


def _plan_from_source(model: Model, params: Mapping[str, jax.Array]) -> _Plan:
    assert model.source is not None
    family = family_of({"model_type": model.source.model_type})
    accounting = account(open_checkpoint(model.source.directory), model.config, family)
    checkpoint = accounting.checkpoint
    tensors = {tensor.name: tensor for file in checkpoint.files for tensor in file.in_order()}
    quantised = [slot for slot in accounting.slots if _is_quantised(slot, accounting)]
    if not any(changed for _, changed in _compare(params, accounting, quantised)):
        return _Plan({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, accounting)
    places = {(slot.path, slot.row) for slot in quantised}
    slots = slots_of(model.config, family, accounting.readable)
    decoded = tuple(slot for slot in slots if (slot.path, slot.row) in places)
    return _Plan(_decoded_specs(tensors, decoded, accounting), accounting, decoded)


def _is_quantised(slot: Slot, accounting: Accounting) -> bool:
    return not isinstance(accounting.readable[slot.names[0]], Tensor)


def _decoded_specs(tensors: Mapping[str, Tensor], decoded: Sequence[Slot], accounting: Accounting) -> dict:
    """All tensors in the order of the files, quantised ones as bfloat16 and without their scales."""
    shapes = {name: slot.layout.tensor_shape for slot in decoded for name in slot.names}
    names = {accounting.readable[name].parts[0].name: name for name in shapes}
    scales = {accounting.readable[name].parts[1].name for name in shapes}
    for name in accounting.ignored:
        if tensors[name].dtype == DTYPES["F8_E4M3"] and f"{name}_scale_inv" in tensors:
            names[name], shapes[name] = name, tensors[name].shape
            scales.add(f"{name}_scale_inv")
    specs = {}
    for name, tensor in tensors.items():
        if name in names:
            specs[names[name]] = (_BFLOAT16, shapes[names[name]])
        elif name not in scales:
            specs[name] = (tensor.dtype, tensor.shape)
    return specs


def _compare(
    params: Mapping[str, jax.Array], accounting: Accounting, slots: Sequence[Slot]
) -> Iterator[tuple[Slot, frozenset[str]]]:
    """Yields every slot with the names of its tensors whose parameter is no longer what the import made of them."""
    parts = [part for slot in slots for part in parts_of(slot, _sharding(params[slot.path]), accounting.itemsize(slot))]
    changed: set[str] = set()
    for number, (part, numbers) in enumerate(stream(parts, accounting.readable)):
        same = equal(params[part.slot.path], numbers, part).reshape(-1)
        changed |= {name for name, equals in zip(part.names, same, strict=True) if not equals}
        if number + 1 == len(parts) or parts[number + 1].slot is not part.slot:
            yield part.slot, frozenset(changed)
            changed = set()


def _write(plan: _Plan, params: Mapping[str, jax.Array], writers: Mapping[str, TensorWriter]) -> int:
    """Writes every tensor; returns how many are not copies of the source's."""
    count = 0
    accounting = plan.accounting
    slots = [slot for slot in accounting.slots if not _is_quantised(slot, accounting)] if accounting else []
    with progress("Writing", len(slots) + len(plan.new) + len(plan.decoded), unit="slot") as advance:
        done = 0
        for slot in (*plan.new, *plan.decoded):
            _write_slot(slot, slot.names, params[slot.path], plan.specs[slot.names[0]][0], writers)
            count, done = count + len(slot.names), done + 1
            advance(done, slot.path)
        if accounting is None:
            return count
        for slot, changed in _compare(params, accounting, slots):
            for name in slot.names:
                if name not in changed:
                    writers[name].copy(name, accounting.checkpoint.tensors[name])
            _write_slot(slot, changed, params[slot.path], plan.specs[slot.names[0]][0], writers)
            count, done = count + len(changed), done + 1
            advance(done, slot.path)
    return count + _copy_the_rest(plan.specs, accounting, writers)


def _write_slot(
    slot: Slot, names: Collection[str], parameter: jax.Array, dtype: np.dtype, writers: Mapping[str, TensorWriter]
) -> None:
    """Writes the tensors `names` of a slot from the parameter."""
    for part in parts_of(slot, _sharding(parameter), dtype.itemsize) if names else ():
        if not set(part.names) & set(names):
            continue
        disk = _on_disk(part, take(parameter, part, dtype))
        if slot.layout.separate:
            for name, numbers in zip(part.names, disk.reshape(len(part.names), -1), strict=True):
                if name in names:
                    writers[name].write(name, numbers)
        else:
            for first, place in part.first_indices:
                writers[slot.names[0]].write(slot.names[0], disk[place], first * math.prod(disk.shape[1:]))


def _on_disk(part: Part, numbers: np.ndarray) -> np.ndarray:
    """The numbers of a part with their axes as on disk, contiguous."""
    layout, bits = part.slot.layout, np.dtype(f"u{numbers.dtype.itemsize}")
    disk = np.empty(layout.apart(numbers).shape, bits)
    source, target = numbers.view(bits), disk.transpose(layout.order)
    for index, _, _ in pieces(source.shape, PIECE_BYTES // bits.itemsize):
        copy_tiled(source[index], target[index])
    return disk.view(numbers.dtype)


def _copy_the_rest(specs: Specs, accounting: Accounting, writers: Mapping[str, TensorWriter]) -> int:
    """Copies what no parameter is written to: ignored tensors, and quantised ones that stay so.

    Returns how many are decoded instead (ignored ones, where config.json loses its quantization_config).
    """
    tensors, count = accounting.checkpoint.tensors, 0
    for name, (dtype, _) in specs.items():
        writer = writers[name]
        if name not in writer.missing:
            continue
        if dtype == tensors[name].dtype:
            writer.copy(name, tensors[name])
        else:
            _write_decoded(name, fp8_tensor(tensors[name], tensors, accounting.checkpoint.config), writer)
            count += 1
    return count


def _write_decoded(name: str, tensor: Readable, writer: TensorWriter) -> None:
    size, columns = math.prod(tensor.shape), tensor.shape[-1]
    step = max(1, PIECE_BYTES // columns) * columns
    for start in range(0, size, step):
        writer.write(name, tensor.read(start, min(start + step, size)).astype(_BFLOAT16), start)


def _write_others(plan: _Plan, model: Model, directory: Path) -> None:
    """config.json, the tokenizer and what else travels along."""
    if plan.accounting is None:
        text = json.dumps(mixtral_config_json(model.config, model.special), indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        write_tokenizer(model, directory)
        return
    checkpoint = plan.accounting.checkpoint
    for file in sorted({file for pattern in _ALONG for file in checkpoint.directory.glob(pattern)}):
        if file.is_file() and file.suffix not in _NEVER:
            shutil.copyfile(file, directory / file.name)
    if plan.decoded:
        config: dict[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(checkpoint.directory / "config.json", directory / "config.json")


def _notes(plan: _Plan, changed: int) -> list[str]:
    if plan.accounting is None:
        return ["All tensors are this model's own."]
    if plan.decoded:
        return [
            f"The base model's quantised tensors changed; all of them are written as bfloat16. {changed} of "
            f"{len(plan.specs)} tensors are not the base model's bytes; the rest are."
        ]
    if not changed:
        return [f"An unchanged re-export: all {len(plan.specs)} tensors are the base model's, byte for byte."]
    return [f"{changed} of {len(plan.specs)} tensors differ from the base model's; the rest are its bytes."]
