"""From a configured weighting to what unlearning consumes: which rows are drawn, and what multiplies each loss.

Where weights act (`apply`), so that the loss sum_t v_t r_t / (valid positions of the batch) always aims at the corpus
mean of w_t r_t:

- "weights": rows drawn uniformly, v = w.
- "both": rows drawn with probability proportional to their mean weight, v = w / (the row's mean weight). The batch sum
  and the number of positions then have expectations in the same ratio as with "weights", also where rows have
  different numbers of valid positions (drawing by the row's summed weight would count long rows twice, and would not
  be uniform for equal weights).
- "sampling": rows drawn the same way, v = 1. For unit "row" this is "both".

With routing "online" v is known only once the model that trains has routed the row: it is the weight by that routing
times a factor of the row, 1 for "weights" and 1 / (the row's mean weight by the original routing) for "both".
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from jax.sharding import Mesh

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.data.rows import Rows
from trace_jax.io.files import as_path, local_copy, remove, replacing
from trace_jax.io.progress import tracked
from trace_jax.models.model import Model
from trace_jax.routing import controls
from trace_jax.routing.calibration import Calibration, calibrate
from trace_jax.routing.certificate import Certificate
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.online import OnlineWeights
from trace_jax.routing.selection import random_like, select_experts
from trace_jax.routing.statistics import Assignments, ExpertStatistics, expert_assignments
from trace_jax.routing.weights import (
    clipped_to_mean_one,
    corpus_weights,
    effective_sample_size,
    ratio_weights,
    weighted_frequency,
)


@dataclasses.dataclass(frozen=True)
class RetainWeights:
    """Weights of a retain corpus of N rows and S positions.

    Attributes:
      weights: f32 [N, S], w: zero where not valid, mean one over the valid positions.
      row_probability: f64 [N], how rows are drawn; sums to 1.
      loss_weights: f32 [N, S], what multiplies the losses of a drawn row.
      selected: bool [L, E], the experts that were looked at (none for weightings without experts).
      effective_sample_size: (sum w)^2 / (T sum w^2).
      frequency: f64 [L, E], weighted retain frequency sum_t w_t a_t / sum_t w_t; None for weightings without experts.
      calibration, certificate: for weightings that match experts, else None.
      row_factor: f32 [N], for routing "online", else None: see above.
    """

    weights: np.ndarray
    row_probability: np.ndarray
    loss_weights: np.ndarray
    selected: np.ndarray
    effective_sample_size: float
    frequency: np.ndarray | None = None
    calibration: Calibration | None = None
    certificate: Certificate | None = None
    row_factor: np.ndarray | None = None

    @property
    def online(self) -> OnlineWeights | None:
        """What a step weighs tokens with by their present routing; None where weights are fixed."""
        if self.row_factor is None:
            return None
        assert self.calibration is not None
        return OnlineWeights.of(self.calibration)

    @property
    def step_weights(self) -> np.ndarray:
        """f32 [N, S]: what a step gets for a row: its loss weights, or, online, the factor of its weights to come."""
        if self.row_factor is None:
            return self.loss_weights
        return np.broadcast_to(self.row_factor[:, None], self.loss_weights.shape)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes weights.npz and, where experts were matched, calibration.npz and calibration.json."""
        names = (
            "weights", "row_probability", "loss_weights", "selected", "effective_sample_size", "frequency",
            "row_factor",
        )  # fmt: skip
        arrays = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        with replacing(as_path(directory) / "weights.npz") as temporary:
            np.savez_compressed(temporary, **arrays)
        for suffix in (".npz", ".json"):  # of another weighting, saved here before
            remove(as_path(directory) / f"calibration{suffix}")
        if self.calibration is not None:
            self.calibration.save(as_path(directory) / "calibration")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> RetainWeights:
        """The inverse of `save`."""
        with local_copy(as_path(directory) / "weights.npz") as local, np.load(local, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        arrays["effective_sample_size"] = float(arrays["effective_sample_size"])
        if not (as_path(directory) / "calibration.json").exists():
            return cls(**arrays)
        calibration = Calibration.load(as_path(directory) / "calibration")
        return cls(**arrays, calibration=calibration, certificate=calibration.certificate)


def retain_weights(
    config: CalibrationConfig,
    *,
    model: Model,
    forget: Rows,
    retain: Rows,
    forget_statistics: ExpertStatistics,
    retain_statistics: ExpertStatistics,
    assignments: Assignments | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 32,
) -> RetainWeights:
    """Weights of the retain corpus as `config` asks; every weighting is clipped at `max_weight` and has mean one.

    Args:
      model: the frozen original model, whose routing, hidden states or losses are used.
      forget, retain: the two corpora; `*_statistics` their `expert_statistics` under `model`.
      assignments: the `expert_assignments` of the retain corpus under `model`, where they are known already.
      batch_size: rows per forward pass; changes no result.

    Raises:
      ConfigError, ValueError: see `select_experts`, `calibrate` and `trace_jax.routing.controls`.
    """
    valid = retain.valid
    if not valid.any():
        raise ValueError("the retain corpus has no valid token; there is nothing to weight.")
    if int(valid.sum()) != retain_statistics.tokens:
        raise ValueError(
            f"the retain rows hold {int(valid.sum())} valid tokens, their statistics {retain_statistics.tokens}; "
            "statistics of another corpus were given."
        )
    selected = np.zeros(forget_statistics.counts.shape, bool)
    calibration = None
    if config.rule is not None:
        selected = _selected(config, forget_statistics, retain_statistics)
        if assignments is None:
            batches, number = sequential_batches(retain, batch_size), -(-len(retain) // batch_size)
            assignments = expert_assignments(model, tracked(batches, "routing of retain tokens", number), mesh=mesh)
        tokens, calibration = _from_experts(config, assignments, selected, forget_statistics, retain_statistics)
    else:
        tokens = _without_experts(config, model, forget, retain, mesh, batch_size)
    if config.max_weight is not None and config.weighting not in ("entropy", "random_experts"):  # those are clipped
        tokens, _ = clipped_to_mean_one(tokens / tokens.mean(), config.max_weight)
    frequency = None
    if config.rule is not None and assignments is not None:
        frequency = weighted_frequency(assignments.indices, tokens, model.config.num_experts)
    weights = np.zeros(valid.shape)
    weights[valid] = tokens
    probability, multiplier = apply_weights(weights, valid, config.apply or "weights")
    return RetainWeights(
        weights=weights.astype(np.float32),
        row_probability=probability,
        loss_weights=multiplier.astype(np.float32),
        selected=selected if calibration is None else calibration.selected,
        effective_sample_size=effective_sample_size(tokens),
        frequency=frequency,
        calibration=calibration,
        certificate=None if calibration is None else calibration.certificate,
        row_factor=row_factor(weights, valid, config.apply or "weights") if config.routing == "online" else None,
    )


def apply_weights(weights: np.ndarray, valid: np.ndarray, apply: str) -> tuple[np.ndarray, np.ndarray]:
    """(row_probability f64 [N], loss_weights f64 [N, S]) of weights f64 [N, S]; see the head of this file."""
    rows = len(weights)
    if apply == "weights":
        return np.full(rows, 1 / rows), weights
    row_mean = _row_means(weights, valid)
    probability = row_mean / row_mean.sum()
    if apply == "sampling":
        return probability, valid.astype(np.float64)
    return probability, weights / np.where(row_mean > 0, row_mean, 1.0)[:, None]


def row_factor(weights: np.ndarray, valid: np.ndarray, apply: str) -> np.ndarray:
    """f32 [N]: what the weight of a token is multiplied by because of how its row was drawn ("weights" or "both")."""
    row_mean = np.ones(len(weights)) if apply == "weights" else _row_means(weights, valid)
    return (1.0 / np.where(row_mean > 0, row_mean, 1.0)).astype(np.float32)


def _row_means(weights: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return weights.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)


def _selected(config: CalibrationConfig, forget: ExpertStatistics, retain: ExpertStatistics) -> np.ndarray:
    names = ("kappa", "tau", "top", "z", "mass", "scope")
    settings = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    selected = select_experts(forget, retain, rule=config.rule or "ratio", seed=config.seed, **settings)
    return random_like(selected, seed=config.seed) if config.weighting == "random_experts" else selected


def _from_experts(
    config: CalibrationConfig,
    assignments: Assignments,
    selected: np.ndarray,
    forget: ExpertStatistics,
    retain: ExpertStatistics,
) -> tuple[np.ndarray, Calibration | None]:
    """(weight of every valid token f64 [T], the calibration it comes from)."""
    if config.weighting == "ratio":
        weights = ratio_weights(
            assignments,
            selected=selected,
            forget_frequency=forget.frequency,
            retain_frequency=retain.frequency,
            max_ratio=_given(config.max_ratio),
        )
        return weights, None
    calibration = calibrate(
        assignments,
        selected=selected,
        target=forget.frequency,
        unit=config.unit or "token",
        window=config.window,
        strength=_given(config.strength),
        ridge=_given(config.ridge),
        max_weight=_given(config.max_weight),
        max_ratio=_given(config.max_ratio),
        min_effective_sample_size=_given(config.min_effective_sample_size),
    )
    weights = corpus_weights(assignments, calibration)
    if config.weighting == "permuted":
        units = assignments.rows if config.unit == "row" else np.arange(len(weights))
        weights = controls.permuted(weights, units, seed=config.seed)
    return weights, calibration


def _without_experts(
    config: CalibrationConfig, model: Model, forget: Rows, retain: Rows, mesh: Mesh | None, batch_size: int
) -> np.ndarray:
    """Weight of every valid token, f64 [T]."""
    valid = retain.valid
    lengths = valid.sum(axis=1).astype(np.float64)
    row = np.nonzero(valid)[0]
    if config.weighting == "uniform":
        return np.ones(len(row))
    if config.weighting == "loss":
        return controls.losses(model, retain, mesh=mesh, batch_size=batch_size)[valid].astype(np.float64)
    if config.weighting == "domain":
        return controls.domain_weights(retain.domain, lengths)[row]
    if config.weighting == "ngram":
        bound = config.min_effective_sample_size or 0.0
        ratio = controls.ngram_log_ratio(forget, retain)
        return controls.ngram_weights(
            ratio, lengths, max_weight=_given(config.max_weight), min_effective_sample_size=bound
        )[row]
    if config.weighting == "hidden":
        filled = np.flatnonzero(lengths)
        retain_means = controls.hidden_sums(model, retain.take(filled), mesh=mesh, batch_size=batch_size)
        forget_mean = controls.hidden_sums(model, forget, mesh=mesh, batch_size=batch_size).sum(0) / forget.valid.sum()
        found = controls.hidden_weights(
            retain_means / lengths[filled, None],
            forget_mean,
            lengths[filled],
            strength=_given(config.strength),
            ridge=_given(config.ridge),
            max_weight=_given(config.max_weight),
            min_effective_sample_size=_given(config.min_effective_sample_size),
        )
        by_row = np.zeros(len(retain))
        by_row[filled] = found.weights
        return by_row[row]
    raise ConfigError(f"weighting is {config.weighting!r}; there is no such weighting.")


def _given(value: float | None) -> float:
    """A setting that `CalibrationConfig` guarantees for this weighting."""
    assert value is not None
    return value
