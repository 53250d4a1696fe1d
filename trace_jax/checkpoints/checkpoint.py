"""A published checkpoint: a directory with config.json and one safetensors file, or several with an index."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_jax.checkpoints.tensor_file import CheckpointError, Tensor, TensorFile
from trace_jax.io.files import is_remote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")


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
