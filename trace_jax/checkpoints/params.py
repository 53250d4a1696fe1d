"""Parameters of a finished stage: one safetensors file, readable by anybody, written whole or not at all."""

import contextlib
import json
import os
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from trace_jax.checkpoints.checkpoint import create_file
from trace_jax.io.files import local_copy, replacing
from trace_jax.parallel.mesh import to_host
from trace_jax.parallel.processes import is_main


def save_params(path: str | os.PathLike, params: Any, metadata: dict | None = None) -> None:
    """Writes nested parameters to `path`, one at a time, under a temporary name. `metadata` must be JSON.

    With several processes all must call it; process 0 writes.
    """
    flat = _dotted(params)
    specs = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in flat.items()}
    about = {"trace_jax": json.dumps(metadata or {})}
    with replacing(path) if is_main() else contextlib.nullcontext() as temporary:
        file = create_file(temporary, specs, about) if temporary else None
        for name, leaf in flat.items():
            numbers = to_host(leaf)
            if file:
                file.tensors[name].write(numbers)


def load_params(path: str | os.PathLike, abstract: Any) -> tuple[Any, dict]:
    """Reads (params, metadata). Names, shapes and types must be exactly those of `abstract`.

    Raises:
      ValueError: the file is missing, truncated or holds other tensors than the model needs; each is named.
    """
    flat = _dotted(abstract)
    try:
        with local_copy(path) as local, safe_open(local, framework="flax") as file:
            names = set(file.keys())
            if names != set(flat):
                raise ValueError(
                    f"{path}: missing tensors {sorted(set(flat) - names)}, unexpected {sorted(names - set(flat))}."
                )
            tensors = {name: file.get_tensor(name) for name in flat}
            metadata = json.loads((file.metadata() or {}).get("trace_jax", "{}"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read as safetensors ({error}). Remove it to make it anew.") from error
    for name, want in flat.items():
        if tensors[name].shape != want.shape or tensors[name].dtype != want.dtype:
            got = tensors[name]
            raise ValueError(
                f"{path}: {name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}."
            )
    return traverse_util.unflatten_dict(tensors, sep="."), metadata


def _dotted(params: Any) -> dict[str, Any]:
    """Nested parameters as {"layers.experts.down": array}, the spelling of the file."""
    return dict(traverse_util.flatten_dict(params, sep="."))


def parameter_bytes(params: Any) -> int:
    """Bytes of a tree of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def parameter_count(params: Any) -> int:
    """Numbers in a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
