"""The files of a checkpoint that is written: which tensor goes where, the index, and the directory as a whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from trace_jax.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from trace_jax.checkpoints.tensor_file import CheckpointError, TensorWriter, writing_tensors
from trace_jax.parallel.processes import is_main

Specs = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # type and shape by name


def nbytes(specs: Specs) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def plan_shards(specs: Specs, limit: int, source: Checkpoint | None) -> Mapping[str, Specs]:
    """The tensors of every file: as in `source` if it has the same and no file beyond `limit` bytes, else cut anew."""
    if source is not None:
        files = {file.path.name: {t.name: (t.dtype, t.shape) for t in file.in_order()} for file in source.files}
        same = {name: spec for file in files.values() for name, spec in file.items()} == specs
        if same and all(nbytes(file) <= limit for file in files.values()):
            return files
    shards: list[dict] = [{}]
    size = 0
    for name, spec in specs.items():
        size += nbytes({name: spec})
        if shards[-1] and size > limit:
            shards.append({})
            size = nbytes({name: spec})
        shards[-1][name] = spec
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards)}


@contextlib.contextmanager
def writing_shards(
    directory: Path, shards: Mapping[str, Specs], source: Checkpoint | None
) -> Iterator[dict[str, TensorWriter]]:
    """Yields every tensor's `TensorWriter` by name. Writes the index, if there are several files, at the end."""
    metadata = {file.path.name: file.metadata for file in source.files} if source else {}
    kept = source if source and {file: list(specs) for file, specs in shards.items()} == _names(source) else None
    with contextlib.ExitStack() as stack:
        writers = {}
        for file, specs in shards.items():
            about = metadata[file] if kept else {"format": "pt"}
            writer = stack.enter_context(writing_tensors(directory / file, specs, about))
            writers |= dict.fromkeys(specs, writer)
        yield writers
    if kept and kept.index is not None:
        shutil.copyfile(kept.directory / INDEX, directory / INDEX)
    elif SINGLE not in shards:
        total = sum(nbytes(specs) for specs in shards.values())
        files = {name: file for file, specs in shards.items() for name in specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names(checkpoint: Checkpoint) -> dict[str, list[str]]:
    return {file.path.name: [tensor.name for tensor in file.in_order()] for file in checkpoint.files}


def check_destination(path: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuses a directory that must not be replaced.

    Raises:
      CheckpointError: it exists and `overwrite` is false, it holds something else than a checkpoint, or `source`.
    """
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists; choose another directory, or overwrite it (--overwrite).")
    if source is not None and source.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path} holds the checkpoint that the model came from; choose another directory.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists()):
        raise CheckpointError(f"{path} is no checkpoint, and is not replaced by one; choose another directory.")


def check_space(path: Path, needed: int) -> None:
    """Raises CheckpointError if `path`, which need not exist yet, hasn't `needed` bytes free."""
    there = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(f"{path} needs {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free.")


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`; on success it takes the place of `path`, on any error it vanishes.

    In other processes than 0 it always vanishes.
    """
    if not is_main():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
