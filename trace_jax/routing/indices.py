"""Chosen experts as integers: how they are kept, counted and checked, and how they are had from any function."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from trace_jax.data.rows import Batch


def index_type(num_experts: int) -> Any:
    """The smallest type for the number of an expert."""
    return np.uint8 if num_experts <= 256 else np.uint16


def count_activations(indices: np.ndarray, num_experts: int) -> np.ndarray:
    """i64 [L, E]: how often each expert occurs in `indices` [L, T, K]."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in indices])


def first_misfit(indices: np.ndarray, num_experts: int) -> tuple[int, int, str] | None:
    """(layer, token, what is wrong) of the first token of indices [L, T, K] that hasn't K different experts."""
    outside = ((indices < 0) | (indices >= num_experts)).any(axis=2)
    repeated = (np.diff(np.sort(indices, axis=2), axis=2) == 0).any(axis=2)
    for wrong, why in ((outside, f"there are {num_experts}, from 0"), (repeated, "those of a token are distinct")):
        if np.any(wrong):
            token, layer = np.argwhere(np.transpose(wrong))[0]
            return int(layer), int(token), f"the experts are {indices[layer, token].tolist()}; {why}"
    return None


def of_function(
    function: Callable[..., Any], batches: Iterable[Batch], num_experts: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray, np.ndarray]]:
    """For every batch: itself, counts i64 [L, E], NaN for affinities, and the experts [L, T, K] of its valid positions.

    `function` takes tokens i32 [B, S] and gives integers [L, B, S, K]. It reads every document in a row of its own,
    from the first position on, so that none needs to be hidden from another; zeros follow, and fill up the last rows.
    """
    layers, top_k = None, None
    for batch in batches:
        tokens, segments, valid = (np.asarray(x) for x in (batch.tokens, batch.segments, batch.valid))
        size, length = tokens.shape
        row, place = np.nonzero(segments)
        key = row * (length + 1) + segments[row, place]
        _, first, document = np.unique(key, return_index=True, return_inverse=True)
        at = document, np.arange(len(row)) - first[document]  # a document is one run of positions
        alone = np.zeros((max(1, -(-len(first) // size)) * size, length), np.int32)
        alone[at] = tokens[row, place]
        parts = []
        for start in range(0, len(alone), size):
            part = np.asarray(function(alone[start : start + size]))
            whole = np.issubdtype(part.dtype, np.integer) and part.size > 0
            if not whole or part.ndim != 4 or part.shape[1:3] != (size, length):
                raise ValueError(
                    f"of tokens [{size}, {length}] the function gave {part.dtype} {list(part.shape)}; expected the "
                    f"numbers of experts as integers [layers, {size}, {length}, experts of a token]."
                )
            layers, top_k = layers or part.shape[0], top_k or part.shape[3]
            if (layers, top_k) != (part.shape[0], part.shape[3]):
                raise ValueError(
                    f"the function gave {layers} layers and {top_k} experts of a token, and then {part.shape[0]} and "
                    f"{part.shape[3]}; expected the same for all tokens."
                )
            parts.append(part)
        experts = np.concatenate(parts, axis=1)[:, *at][:, valid[row, place]]
        if misfit := first_misfit(experts, num_experts):
            raise ValueError(f"of the function, layer {misfit[0]}, valid token {misfit[1]} of a batch: {misfit[2]}.")
        counts = count_activations(experts, num_experts)
        yield batch, counts, np.full(counts.shape, np.nan), experts.astype(index_type(num_experts))
