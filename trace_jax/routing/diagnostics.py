"""Routing in numbers: how differently two corpora use the experts, and how far a model's routing has moved.

Functions of plain arrays take experts on the last axis and any axes before it (layers; resamples and layers).
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Agreement of two models' routing on the same tokens.

    Attributes:
      tokens: i64 [N], of each row that has any, or their number.
      jaccard: f64 [N, L], sum over a row's tokens of |A and B| / |A or B|, A and B the chosen experts (Jaccard 1912);
        or f64 [L], the mean over tokens, where 1 means that nothing has changed.
      unchanged: the same of "same set of experts".
    """

    tokens: np.ndarray
    jaccard: np.ndarray
    unchanged: np.ndarray


def overlap(original: Assignments, current: Assignments) -> Overlap:
    """How much of the original model's routing is left: means over tokens of `overlap_by_row`."""
    by_row = overlap_by_row(original, current)
    tokens = by_row.tokens.sum()
    return Overlap(tokens, by_row.jaccard.sum(axis=0) / tokens, by_row.unchanged.sum(axis=0) / tokens)


def overlap_by_row(original: Assignments, current: Assignments) -> Overlap:
    """Sums over the tokens of each row, from both models' `expert_assignments` of one corpus.

    Raises:
      ValueError: the assignments are of different tokens.
    """
    before, after = original.indices, current.indices
    same_tokens = np.array_equal(original.rows, current.rows) and np.array_equal(original.positions, current.positions)
    if before.shape != after.shape or not same_tokens:
        raise ValueError(
            f"assignments {before.shape} and {after.shape} are not of the same tokens; make both from the same rows."
        )
    _, row = np.unique(original.rows, return_inverse=True)
    top_k, jaccard, unchanged = before.shape[2], [], []
    for old, new in zip(before, after, strict=True):
        shared = (old[:, :, None] == new[:, None, :]).any(axis=2).sum(axis=1)  # [T]
        jaccard.append(np.bincount(row, shared / (2 * top_k - shared)))
        unchanged.append(np.bincount(row, shared == top_k))
    return Overlap(np.bincount(row), np.stack(jaccard, axis=1), np.stack(unchanged, axis=1))


def counts_by_row(assignments: Assignments, num_experts: int) -> np.ndarray:
    """i64 [N, L, E]: how often each row that has tokens uses each expert."""
    rows, row = np.unique(assignments.rows, return_inverse=True)
    cell = row[:, None] * num_experts
    counts = [
        np.bincount((cell + layer).ravel(), minlength=len(rows) * num_experts).reshape(len(rows), num_experts)
        for layer in assignments.indices
    ]
    return np.stack(counts, axis=1)


def router_drift(original: Model, current: Model) -> np.ndarray:
    """f64 [L]: |R - R_0| / |R_0| of each layer's router weights [D, E] (Frobenius norm)."""
    return _relative_change(*_routers(original, current), axes=(1, 2))


def expert_drift(original: Model, current: Model) -> np.ndarray:
    """f64 [L, E]: |r - r_0| / |r_0| of each expert's column r [D] of the router (Euclidean norm)."""
    return _relative_change(*_routers(original, current), axes=(1,))


def _routers(original: Model, current: Model) -> tuple[np.ndarray, np.ndarray]:
    """Router weights f64 [L, D, E] of both; biases and corrections are left out."""
    before, after = (to_host(model.params["layers"]["router"]).astype(np.float64) for model in (original, current))
    return before, after


def _relative_change(before: np.ndarray, after: np.ndarray, *, axes: tuple[int, ...]) -> np.ndarray:
    norm = np.sqrt((before**2).sum(axis=axes))
    return np.sqrt(((after - before) ** 2).sum(axis=axes)) / np.where(norm > 0, norm, 1.0)
