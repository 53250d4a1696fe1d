"""Routing in numbers: how differently two corpora use the experts, and how far a model's routing has moved."""

from __future__ import annotations

import dataclasses

import numpy as np

from trace_jax.models.model import Model
from trace_jax.parallel.hosts import to_host
from trace_jax.routing.statistics import Assignments, ExpertStatistics


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """How differently two corpora use the experts, per layer (f64 [L]).

    Attributes:
      gap: sum over experts of |f^F - f^R| (0 to 2K).
      kl: Kullback-Leibler divergence, forget from retain, of the activation shares f / K, in nats (inf where the forget
        corpus uses an expert that the retain corpus doesn't).
      js: Jensen-Shannon divergence of the same, in nats (0 to log 2).
      largest_ratio: largest f^F / f^R (inf where f^R = 0 < f^F).
      above_two: share of experts with f^F > 2 f^R.
    """

    gap: np.ndarray
    kl: np.ndarray
    js: np.ndarray
    largest_ratio: np.ndarray
    above_two: np.ndarray


def mismatch(forget: ExpertStatistics, retain: ExpertStatistics) -> Mismatch:
    """Compares the expert frequencies of a forget and a retain corpus under one model."""
    f_forget, f_retain = forget.frequency, retain.frequency
    p, q = f_forget / forget.top_k, f_retain / retain.top_k
    ratio = np.where(f_forget > 0, np.inf, 0.0)
    np.divide(f_forget, f_retain, out=ratio, where=f_retain > 0)
    return Mismatch(
        gap=np.abs(f_forget - f_retain).sum(axis=1),
        kl=kl_divergence(p, q),
        js=js_divergence(p, q),
        largest_ratio=ratio.max(axis=1),
        above_two=(f_forget > 2 * f_retain).mean(axis=1),
    )


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """sum_e p log(p / q) over the last axis, in nats; 0 log 0 = 0, and inf where p > 0 = q."""
    used = p > 0
    ratio = np.ones_like(p)
    np.divide(p, q, out=ratio, where=used & (q > 0))
    terms = np.where(used & (q == 0), np.inf, p * np.log(ratio))
    return terms.sum(axis=-1)


def js_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis, in nats: symmetric, finite, at most log 2."""
    middle = (p + q) / 2
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


@dataclasses.dataclass(frozen=True)
class Load:
    """How evenly a corpus uses the experts. entropy: f64 [L], of the activation shares over log E (1 is even).
    largest: f64 [L], frequency of the busiest expert in units of K/E. dead: (layer, expert) never used, from 0."""

    entropy: np.ndarray
    largest: np.ndarray
    dead: tuple[tuple[int, int], ...]


def load(statistics: ExpertStatistics) -> Load:
    """The balance of the experts' load over a corpus."""
    frequency = statistics.frequency
    experts = frequency.shape[1]
    share = frequency / statistics.top_k
    uniform = np.full_like(share, 1 / experts)
    entropy = 1 - kl_divergence(share, uniform) / np.log(experts) if experts > 1 else np.ones(len(share))
    names = statistics.layers or range(len(share))
    dead = tuple((int(names[row]), int(expert)) for row, expert in np.argwhere(statistics.counts == 0))
    return Load(entropy, frequency.max(axis=1) * experts / statistics.top_k, dead)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Agreement of two models' routing on the same tokens, f64 [L]: 1 means that nothing has changed.

    Attributes:
      jaccard: mean over tokens of |A and B| / |A or B|, A and B the chosen experts.
      unchanged: share of tokens with the same set of experts.
      same_first: share of tokens with the same first expert.
    """

    jaccard: np.ndarray
    unchanged: np.ndarray
    same_first: np.ndarray


def overlap(original: Assignments, current: Assignments) -> Overlap:
    """How much of the original model's routing is left, from both models' `expert_assignments` of one corpus.

    Raises:
      ValueError: the assignments are of different tokens.
    """
    before, after = original.indices, current.indices
    same_tokens = np.array_equal(original.rows, current.rows) and np.array_equal(original.positions, current.positions)
    if before.shape != after.shape or not same_tokens:
        raise ValueError(
            f"assignments {before.shape} and {after.shape} are not of the same tokens; make both from the same rows."
        )
    top_k = before.shape[2]
    shared = (before[..., :, None] == after[..., None, :]).any(axis=-1).sum(axis=-1)  # [L, T]
    return Overlap(
        jaccard=(shared / (2 * top_k - shared)).mean(axis=1),
        unchanged=(shared == top_k).mean(axis=1),
        same_first=(before[..., 0] == after[..., 0]).mean(axis=1),
    )


def frequency_change(original: ExpertStatistics, current: ExpertStatistics) -> np.ndarray:
    """f64 [L]: sum over experts of |f_current - f_original| of one corpus under two models, 0 to 2K."""
    return np.abs(current.frequency - original.frequency).sum(axis=1)


def router_drift(original: Model, current: Model) -> np.ndarray:
    """f64 [L]: |R - R_0| / |R_0| of each layer's router weights [D, E] (Frobenius norm)."""
    before = to_host(original.params["layers"]["router"]).astype(np.float64)
    after = to_host(current.params["layers"]["router"]).astype(np.float64)
    norm = np.sqrt((before**2).sum(axis=(1, 2)))
    return np.sqrt(((after - before) ** 2).sum(axis=(1, 2))) / np.where(norm > 0, norm, 1.0)
