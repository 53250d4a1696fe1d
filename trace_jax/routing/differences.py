"""How differently two corpora use the experts, and how far a model's routing has moved.

Functions of plain arrays take experts on the last axis and any axes before it (layers; resamples and layers).
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.models.model import Model
from trace_jax.parallel.mesh import to_host
from trace_jax.routing.statistics import Assignments


def frequency_gap(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """sum_e |f_e - g_e| of two frequency vectors, which sum to K each: 0 to 2K (TRACE's mismatch, 2606.10338)."""
    return np.abs(f - g).sum(axis=-1)


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """sum_e p log(p / q), in nats (Kullback & Leibler 1951); 0 log 0 = 0, and inf where p > 0 = q."""
    used = p > 0
    ratio = np.ones_like(p)
    np.divide(p, q, out=ratio, where=used & (q > 0))
    terms = np.where(used & (q == 0), np.inf, p * np.log(ratio))
    return terms.sum(axis=-1)


def js_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in nats (Lin 1991): the mean of KL(p | m) and KL(q | m), m = (p + q) / 2.

    Symmetric, finite, at most log 2.
    """
    middle = (p + q) / 2
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


def smoothed_shares(counts: np.ndarray) -> np.ndarray:
    """Shares of activations with half an activation added to every expert: (c_e + 1/2) / (sum c + E/2).

    This is the posterior mean under Jeffreys' prior (Krichevsky & Trofimov 1981). No share is zero, so that a KL
    divergence between two corpora is finite where one of them never uses an expert that the other uses.
    """
    padded = counts + 0.5
    return padded / padded.sum(axis=-1, keepdims=True)


def load_entropy(frequency: np.ndarray) -> np.ndarray:
    """Entropy of the experts' shares of the load over log E: 1 is even, 0 is a single expert. One expert gives 1."""
    experts = frequency.shape[-1]
    if experts == 1:
        return np.ones(frequency.shape[:-1])
    share = frequency / frequency.sum(axis=-1, keepdims=True)
    return 1 - kl_divergence(share, np.full_like(share, 1 / experts)) / np.log(experts)


def overlap_by_row(original: Assignments, current: Assignments) -> dict[str, np.ndarray]:
    """How much of the original model's routing is left on the same tokens, summed over each of N rows that have any.

    "tokens" f64 [N]; "jaccard" f64 [N, L], |A and B| / |A or B| of a token's chosen experts (Jaccard 1912), 1 is no
    change; "unchanged" f64 [N, L], 1 where both sets are the same.
    """
    before, after = original.indices, current.indices
    if before.shape != after.shape or not np.array_equal(original.rows, current.rows):
        raise ValueError(
            f"assignments {before.shape} and {after.shape} are not of the same tokens; make both from the same rows."
        )
    _, row = np.unique(original.rows, return_inverse=True)
    top_k, sums = before.shape[2], {"jaccard": [], "unchanged": []}
    for old, new in zip(before, after, strict=True):
        shared = (old[:, :, None] == new[:, None, :]).any(axis=2).sum(axis=1)  # [T]
        sums["jaccard"].append(np.bincount(row, shared / (2 * top_k - shared)))
        sums["unchanged"].append(np.bincount(row, shared == top_k))
    by_row = {name: np.stack(layers, axis=1) for name, layers in sums.items()}
    return {"tokens": np.bincount(row).astype(np.float64)} | by_row


def overlap(original: Assignments, current: Assignments) -> dict[str, np.ndarray]:
    """Means over tokens of `overlap_by_row`, f64 [L] each."""
    by_row = overlap_by_row(original, current)
    tokens = by_row.pop("tokens").sum()
    return {name: sums.sum(axis=0) / tokens for name, sums in by_row.items()}


def counts_by_row(assignments: Assignments, num_experts: int) -> np.ndarray:
    """i64 [N, L, E]: how often each row that has tokens uses each expert."""
    rows, row = np.unique(assignments.rows, return_inverse=True)
    cell = row[:, None] * num_experts
    counts = [
        np.bincount((cell + layer).ravel(), minlength=len(rows) * num_experts).reshape(-1, num_experts)
        for layer in assignments.indices
    ]
    return np.stack(counts, axis=1)


def router_drift(original: Model, current: Model) -> tuple[np.ndarray, np.ndarray]:
    """(f64 [L], f64 [L, E]): |R - R_0| / |R_0| of each layer's router weights R [D, E], and of each expert's column.

    Norms are Euclidean (Frobenius). Biases and corrections are left out.
    """
    before, after = (to_host(model.params["layers"]["router"]).astype(np.float64) for model in (original, current))

    def change(axes: tuple[int, ...]) -> np.ndarray:
        norm = np.sqrt((before**2).sum(axis=axes))
        return np.sqrt(((after - before) ** 2).sum(axis=axes)) / np.where(norm > 0, norm, 1.0)

    return change((1, 2)), change((1,))


def expert_drift(original: Model, current: Model) -> np.ndarray:
    """f64 [L, E]: |W - W_0| / |W_0| of all weights W of each routed expert together, its biases too.

    Sums are float32, on the devices that hold the experts; an expert that didn't train gives exactly 0.
    """
    change, norm = to_host(_squares(*(model.params["layers"]["experts"] for model in (original, current))))
    return np.sqrt(change.astype(np.float64) / np.where(norm > 0, norm, 1.0))


@jax.jit
def _squares(before: dict[str, jax.Array], after: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(|W - W_0|^2, |W_0|^2), f32 [L, E]."""

    def total(arrays: Iterable[jax.Array]) -> Any:
        # Summed in two turns, which XLA would join: a float32 sum over an expert's millions of weights loses digits.
        rows = [jax.lax.optimization_barrier(jnp.sum(jnp.square(x), axis=-1)) for x in arrays]
        return sum(jnp.sum(x, axis=tuple(range(2, x.ndim))) for x in rows)

    w0, w = ([tree[name].astype(jnp.float32) for name in before] for tree in (before, after))
    return total(x - x0 for x, x0 in zip(w, w0, strict=True)), total(w0)
