"""Routing that another program recorded, as `Assignments`: `.npz` or `.npy` files of expert ids.

Shapes and encodings of four servers, and how to write such a file from their answers: docs/method.md.
"""

import os
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from trace_jax.data.published import DataError
from trace_jax.io.files import local_copy
from trace_jax.routing.statistics import Assignments, first_misfit, index_type

BLOCK = 256  # tokens that stand for a row where a capture names no rows
_KEYS = ("expert_ids", "row_lengths", "gate_weights")


def read_capture(path: str | os.PathLike, num_experts: int) -> Assignments:
    """The chosen experts of every token that a capture holds, in its order.

    `expert_ids` is an integer array [tokens, layers, K] or [layers, tokens, K]: its axis of tokens is the one that
    `row_lengths` sums to, or without row lengths the longer one, and blocks of 256 tokens then stand for rows. A layer
    with nothing but zeros (a dense one, to which servers give a place) and tokens of which every id is -1 (which were
    not recorded) are left out; rows keep their numbers. `gate_weights` must have the shape of the ids; nothing reads
    them. A bare `.npy` holds the ids.

    Raises:
      DataError: no such file; pickled, ragged or wrong arrays; an id that is no expert, or twice in one token.

    Example:
      >>> routed = tj.expert_assignments(model, retain)
      >>> np.savez("retain.npz", expert_ids=routed.indices, row_lengths=np.bincount(routed.rows))
      >>> np.array_equal(tj.read_capture("retain.npz", num_experts=8).indices, routed.indices)
      True
    """
    name, arrays = os.fspath(path), _read(path)
    if "expert_ids" not in arrays or arrays.keys() - set(_KEYS):
        raise DataError(f"{name}: has the keys {', '.join(arrays) or 'none'}; expected {', '.join(_KEYS)}.")
    ids, lengths, gates = arrays["expert_ids"], arrays.get("row_lengths"), arrays.get("gate_weights")
    if ids.ndim != 3 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{name}: expert_ids is {ids.dtype} {ids.shape}; expected integers [tokens, layers, K].")
    if gates is not None and gates.shape != ids.shape:
        raise DataError(f"{name}: gate_weights is {gates.shape}; expected {ids.shape}, the shape of expert_ids.")
    if lengths is None:
        tokens, said = max(ids.shape[:2]), "there are no row_lengths"
        lengths = np.full(-(-tokens // BLOCK), BLOCK)
        lengths[-1] -= lengths.sum() - tokens
    elif lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (lengths < 0).any():
        raise DataError(f"{name}: row_lengths is {lengths.dtype} {lengths.shape}; expected counts [rows].")
    else:
        tokens = int(lengths.sum())
        said = f"row_lengths sum to {tokens}"
    axes = [axis for axis in (0, 1) if ids.shape[axis] == tokens]
    if len(axes) != 1:
        why = "either of the first two axes can be the tokens" if axes else "none of the first two axes is that long"
        raise DataError(f"{name}: expert_ids is {ids.shape} and {said}; {why}.")
    ids = np.moveaxis(ids, axes[0], 1)
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    routed = ~np.isin(ids, (0, -1)).all(axis=(1, 2)) | (ids.shape[2] == 1)
    layers, places = np.flatnonzero(routed), np.flatnonzero((ids[routed] != -1).any(axis=(0, 2)))
    ids, rows = ids[routed][:, places], rows[places]
    if not ids.size:
        raise DataError(f"{name}: expert_ids holds nothing but 0 and -1; the server recorded no routing.")
    if misfit := first_misfit(ids, num_experts):
        layer, token, what = misfit
        raise DataError(f"{name}: token {places[token]} (row {rows[token]}), layer {layers[layer]}: {what}.")
    return Assignments(ids.astype(index_type(num_experts)), rows, rows, tuple(layers.tolist()))


def _read(path: str | os.PathLike) -> Mapping[str, np.ndarray]:
    name = os.fspath(path)
    try:
        with local_copy(path) as local, local.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"expert_ids": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file.") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{name}: can't be read as .npz or .npy ({error}). Pickled arrays are refused; rows of unequal length are "
            "one array, with row_lengths."
        ) from None


def join(parts: list[Assignments]) -> Assignments:
    """Several captures of one model as one corpus. Raises DataError: they differ in layers or in K."""
    first = parts[0]
    for part in parts:
        if part.layers != first.layers or part.indices.shape[2] != first.indices.shape[2]:
            raise DataError(
                f"captures of one model have the same layers and K; one is {first.indices.shape} [layers, tokens, K], "
                f"another {part.indices.shape}."
            )
    starts = np.cumsum([0, *(part.rows.max() + 1 for part in parts[:-1])])
    rows = np.concatenate([part.rows + start for part, start in zip(parts, starts, strict=True)])
    return Assignments(np.concatenate([part.indices for part in parts], axis=1), rows, rows, first.layers)
