"""Export: a model as a directory that transformers loads, `save_pretrained`.

The files begin as copies of the source's; over them is written what is no longer what the import made of them. Only
quantised tensors that have changed, models trained here and other sizes of files need files of their own.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trace_jax.checkpoints.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    CheckpointError,
    Quantised,
    Readable,
    Specs,
    Tensor,
    TensorFile,
    check_arrays,
    create_file,
    open_checkpoint,
    readable_tensor,
)
from trace_jax.checkpoints.model_card import ModelCard, base_model_of, licence_of, mixtral_config_json, readme
from trace_jax.checkpoints.parts import PIECE_BYTES, THREADS, Slot, account, parts_of, places, slots_of, take
from trace_jax.io.files import free_bytes, is_remote
from trace_jax.io.progress import progress
from trace_jax.models.architecture import flat_specs, flatten
from trace_jax.models.families import FAMILIES, family_of
from trace_jax.models.model import Model
from trace_jax.parallel.processes import is_main

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
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `model` as a Hugging Face checkpoint: like its source, with what has changed put in.

    Tensors keep the source's names, layout and type, and numbers that are those of the import keep their bytes; so does
    what the import ignored. If a quantised tensor has changed, all quantised ones are written as bfloat16 and
    config.json loses its quantization_config. A model without a source (trained here) becomes a `mixtral`. Everything
    is written under a temporary name and renamed at the end. Memory is as in `load_pretrained`. Of several processes
    all must call it, and process 0 writes.

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
    destination, params, specs = Path(path).absolute(), flatten(model.params), flat_specs(model.config)
    check_arrays("the model", params, specs)
    _check_destination(destination, overwrite=overwrite, source=model.source.directory if model.source else None)
    checkpoint, written, merged, ignored = None, (), (), {}  # written: slots whose tensors are new in the files
    if model.source is None:
        config_json = mixtral_config_json(model.config, model.special)
        written = slots_of(model.config, FAMILIES["mixtral"], ())
        dtypes = {path: np.dtype(leaf.dtype) for path, leaf in params.items()}
        files = {name: (dtypes[slot.path], slot.tensor_shape) for slot in written for name in slot.names}
    else:
        family, checkpoint = family_of({"model_type": model.source.model_type}), open_checkpoint(model.source.directory)
        slots, readable, unread = account(checkpoint, model.config, family)
        config_json = dict(checkpoint.config)
        imported = {p: reference() for p, reference in model.source.imported.items()}
        touched = [slot for slot in slots if params[slot.path] is not imported.get(slot.path)]
        packed = [slot for slot in touched if isinstance(readable[slot.names[0]], Quantised)]
        merged = [slot for slot in touched if isinstance(readable[slot.names[0]], Tensor)]
        files = {tensor.name: (tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values()}
        if _write(packed, params, readable, dry=True):
            config_json.pop("quantization_config", None)
            slots = slots_of(model.config, family, readable)
            written = [slot for slot in slots if isinstance(readable[slot.names[0]], Quantised)]
            files, ignored = _decoded(files, written, checkpoint, readable, unread)
    if (needed := _nbytes(files) + 2**26) > (free := free_bytes(destination)):
        raise CheckpointError(f"{destination} needs {needed / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB free.")
    with _replacing_directory(destination) as directory:
        tensors = _lay_out(directory, files, checkpoint, shard_bytes) if directory else {}
        changed = _write([*written, *merged], params, tensors)
        if directory is None:
            return
        for name, tensor in ignored.items():
            step = max(1, PIECE_BYTES // tensor.shape[-1]) * tensor.shape[-1]
            for start in range(0, tensors[name].size, step):
                numbers = tensor.read(start, min(start + step, tensors[name].size))
                tensors[name].write(numbers.astype(tensors[name].dtype), start)
        changed |= ignored.keys() | {name for slot in written for name in slot.names}
        _write_others(directory, model, checkpoint, config_json)
        text = readme(
            card,
            base_model=base_model_of(checkpoint.directory, checkpoint.config) if checkpoint else None,
            licence=licence_of(checkpoint.directory) if checkpoint else {},
            note=_note(len(changed), len(files), bool(checkpoint), decoded=bool(written)),
        )
        (directory / "README.md").write_text(text, encoding="utf-8")


def _decoded(
    specs: Specs, slots: Sequence[Slot], checkpoint: Checkpoint, readable: Mapping[str, Readable], unread: Iterable[str]
) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...]]], dict[str, Readable]]:
    """All tensors in the order of the files, those of `slots` as bfloat16 and without their scales; and the ignored
    ones that are decoded too, because config.json no longer says how they are stored."""
    tensors = checkpoint.tensors
    ignored = {
        name: readable_tensor(name, tensors, checkpoint.config)
        for name in unread
        if tensors[name].dtype == DTYPES["F8_E4M3"] and f"{name}_scale_inv" in tensors
    }
    shapes = {name: slot.tensor_shape for slot in slots for name in slot.names}
    decoded, scales = {}, set()
    for name in [*shapes, *ignored]:
        data, scale = (ignored.get(name) or readable[name]).parts
        decoded[data.name] = name, (DTYPES["BF16"], shapes.get(name, data.shape))
        scales.add(scale.name)
    return dict(decoded.get(name, (name, spec)) for name, spec in specs.items() if name not in scales), ignored


def _lay_out(directory: Path, specs: Specs, checkpoint: Checkpoint | None, limit: int) -> dict[str, Tensor]:
    """Makes the files, with the source's bytes wherever a tensor has its type and shape. Returns the tensors.

    They are copies of the source's files if these hold the same tensors and none is beyond `limit` bytes; else they are
    cut anew, with an index if there are several.
    """
    source = checkpoint.tensors if checkpoint else {}
    sizes = [sum(tensor.nbytes for tensor in file.tensors.values()) for file in checkpoint.files] if checkpoint else []
    if checkpoint and max(sizes) <= limit and specs == {name: (t.dtype, t.shape) for name, t in source.items()}:
        names = [file.path.name for file in checkpoint.files]
        for name in (*names, *[INDEX] * (names != [SINGLE])):
            shutil.copyfile(checkpoint.directory / name, directory / name)
        files = [TensorFile(directory / name, writable=True) for name in names]
        return {name: tensor for file in files for name, tensor in file.tensors.items()}
    shards: list[dict] = [{}]
    for name, spec in specs.items():
        if shards[-1] and _nbytes({**shards[-1], name: spec}) > limit:
            shards.append({})
        shards[-1][name] = spec
    tensors, file_of = {}, {}
    for number, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors |= create_file(directory / file, shard, {"format": "pt"}).tensors
        file_of |= dict.fromkeys(shard, file)
    for name, (dtype, shape) in specs.items():
        if name in source and (source[name].dtype, source[name].shape) == (dtype, shape):
            tensors[name].copy(source[name])
    if len(shards) > 1:
        index = {"metadata": {"total_size": _nbytes(specs)}, "weight_map": dict(sorted(file_of.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return tensors


def _nbytes(specs: Specs) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _write(
    slots: Sequence[Slot],
    params: Mapping[str, jax.Array],
    tensors: Mapping[str, Readable],
    *,
    dry: bool = False,
) -> set[str]:
    """Writes parameters over the tensors of their slots; returns the names of those that got other numbers.

    A number that the import would cast to the parameter's stays as it is, bit by bit.

    Args:
      tensors: of the files; empty in processes that don't write.
      dry: only compares.
    """

    def write(place: tuple[int, str, int, np.ndarray]) -> str | None:
        _, name, start, view = place
        tensor, numbers = tensors[name], view.reshape(-1)
        before = tensor.read(start, start + numbers.size)
        on_device = before.astype(jax.dtypes.canonicalize_dtype(before.dtype), copy=False)
        differs = _bits(on_device.astype(numbers.dtype, copy=False)) != _bits(numbers)
        if not differs.any():
            return None
        if not dry and isinstance(tensor, Tensor):
            np.copyto(_bits(before), _bits(numbers.astype(tensor.dtype, copy=False)), where=differs)
            tensor.write(before, start)
        return name

    changed: set[str | None] = set()
    if not slots:
        return set()
    with ThreadPoolExecutor(THREADS) as pool, progress("Writing", len(slots), unit="slot") as advance:
        for done, slot in enumerate(slots):
            parameter = params[slot.path]
            for part in parts_of(slot, parameter.sharding, parameter.dtype.itemsize):
                numbers = take(parameter, part)
                if tensors:
                    changed.update(pool.map(write, places(part, numbers)))
            advance(done + 1, slot.path)
    return {name for name in changed if name}


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _write_others(directory: Path, model: Model, checkpoint: Checkpoint | None, config_json: Mapping[str, Any]) -> None:
    """config.json, the tokenizer and what else travels along."""
    if checkpoint and config_json == checkpoint.config:
        shutil.copyfile(checkpoint.directory / "config.json", directory / "config.json")
    else:
        (directory / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
    if checkpoint:
        for file in sorted({file for pattern in _ALONG for file in checkpoint.directory.glob(pattern)}):
            if file.is_file() and file.suffix not in _NEVER:
                shutil.copyfile(file, directory / file.name)
    elif model.tokenizer is not None:
        model.tokenizer.save(str(directory / "tokenizer.json"))
        ids = {"bos": model.special.bos, "eos": next(iter(model.special.eos), None), "pad": model.special.pad}
        tokens = {
            f"{kind}_token": model.tokenizer.id_to_token(token) for kind, token in ids.items() if token is not None
        }
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens}, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _note(changed: int, total: int, has_source: bool, *, decoded: bool) -> str:
    """How the files differ from the source's."""
    if not has_source:
        return "All tensors are this model's own."
    if decoded:
        return (
            f"The base model's quantised tensors changed; all of them are written as bfloat16. {changed} of "
            f"{total} tensors are not the base model's bytes; the rest are."
        )
    if not changed:
        return f"An unchanged re-export: all {total} tensors are the base model's, byte for byte."
    return f"{changed} of {total} tensors differ from the base model's; the rest are its bytes."


def _check_destination(path: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuses a directory that must not be replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists; choose another directory, or overwrite it (--overwrite).")
    if source is not None and source.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path} holds the checkpoint that the model came from; choose another directory.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists()):
        raise CheckpointError(f"{path} is no checkpoint, and is not replaced by one; choose another directory.")


@contextlib.contextmanager
def _replacing_directory(path: Path) -> Iterator[Path | None]:
    """Yields a new directory beside `path`; on success it takes the place of `path`, on any error it vanishes.

    Yields None in other processes than 0.
    """
    if not is_main():
        yield None
        return
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
