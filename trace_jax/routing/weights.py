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

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.data.rows import Rows
from trace_jax.io.files import as_path, read_arrays, remove, write_arrays
from trace_jax.models.model import Model
from trace_jax.routing import config as settings
from trace_jax.routing import controls
from trace_jax.routing.calibration import Calibration, match_frequencies, weighted_frequency
from trace_jax.routing.differences import frequency_gap, overlap
from trace_jax.routing.solver import effective_sample_size
from trace_jax.routing.statistics import (
    MIN_ACTIVATIONS,
    Assignments,
    ExpertStatistics,
    expert_assignments,
    expert_routing,
    expert_sensitivity,
    expert_statistics,
)


@dataclasses.dataclass(frozen=True)
class RetainWeights:
    """Weights of a retain corpus of N rows, S positions and T valid positions, and where they act."""

    tokens: np.ndarray  # f64 [T], w of the valid positions in row order, of mean one
    valid: np.ndarray  # bool [N, S]
    apply: str = "weights"  # or "sampling" or "both"
    online: bool = False  # whether a step weighs tokens by their present routing
    selected: np.ndarray | None = None  # bool [L, E], the experts that were looked at, of weightings that do
    frequency: np.ndarray | None = None  # f64 [L, E], of them the weighted frequency sum_t w_t a_t / sum_t w_t
    calibration: Calibration | None = None  # of weightings that match experts
    corpus: str = ""  # `Rows.digest` of the rows that they are of; "": unknown

    def __repr__(self) -> str:
        sizes = f"{len(self.valid):,} rows, {len(self.tokens):,} tokens, apply {self.apply}"
        sample = f"effective sample {self.effective_sample_size:.1%}, largest {self.tokens.max():.2f}"
        return f"RetainWeights({sizes}, {sample}{'' if self.calibration is None else f', {self.calibration}'})"

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / (T sum w^2)."""
        return effective_sample_size(self.tokens)

    @property
    def weights(self) -> np.ndarray:
        """f32 [N, S], w: zero where not valid."""
        return self._placed.astype(np.float32)

    @functools.cached_property
    def row_probability(self) -> np.ndarray:
        """f64 [N], how rows are drawn; sums to 1."""
        rows = len(self.valid)
        return np.full(rows, 1 / rows) if self.apply == "weights" else self._row_means / self._row_means.sum()

    @functools.cached_property
    def step_weights(self) -> np.ndarray:
        """f32 [N, S]: what multiplies the losses of a drawn row; online, the weights to come."""
        if self.apply == "sampling":
            return self.valid.astype(np.float32)
        weights = np.ones(self.valid.shape) if self.online else self._placed
        divisor = self._row_means if self.apply == "both" else np.zeros(len(self.valid))
        return (weights / np.where(divisor > 0, divisor, 1.0)[:, None]).astype(np.float32)

    @property
    def step_calibration(self) -> Calibration | None:
        """What a step weighs tokens with by their present routing; None where weights are fixed."""
        return self.calibration.for_step() if self.online and self.calibration is not None else None

    @functools.cached_property
    def _placed(self) -> np.ndarray:
        weights = np.zeros(self.valid.shape)
        weights[self.valid] = self.tokens
        return weights

    @functools.cached_property
    def _row_means(self) -> np.ndarray:
        means = self._placed.sum(axis=1) / np.maximum(self.valid.sum(axis=1), 1)
        return np.where(means > 1e-6, means, 0.0)  # less is the rounding of nothing, and no row to divide by

    def applied(self, weighting: settings.Weighting) -> "RetainWeights":
        """The same weights, acting where `weighting` says."""
        online = isinstance(getattr(weighting, "routing", None), settings.Online)
        return dataclasses.replace(self, apply=getattr(weighting, "apply", "weights"), online=online)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes weights.npz and, where experts were matched, calibration.npz and calibration.json."""
        names = ("tokens", "valid", "apply", "online", "selected", "frequency", "corpus")
        arrays = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        write_arrays(as_path(directory) / "weights.npz", arrays)
        for name in ("calibration.npz", "calibration.json"):  # of another weighting, saved here before
            remove(as_path(directory) / name)
        if self.calibration is not None:
            self.calibration.save(as_path(directory) / "calibration")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "RetainWeights":
        """The inverse of `save`."""
        arrays: dict[str, Any] = read_arrays(as_path(directory) / "weights.npz")
        plain = {"apply": str(arrays.pop("apply")), "online": bool(arrays.pop("online"))}
        plain["corpus"] = str(arrays.pop("corpus"))
        return cls(**arrays, **plain, calibration=Calibration.load(as_path(directory) / "calibration"))


def retain_weights(
    config: settings.CalibrationConfig,
    *,
    model: Model | Callable[..., Any],
    forget: Rows,
    retain: Rows,
    num_experts: int | None = None,
    forget_statistics: ExpertStatistics | None = None,
    retain_statistics: ExpertStatistics | None = None,
    assignments: Assignments | None = None,
    selected: np.ndarray | None = None,
    solved: RetainWeights | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 32,
) -> RetainWeights:
    """Weights of the retain corpus as `config` asks; every weighting keeps its bounds and has mean one.

    Args:
      model: the frozen original model, whose routing, hidden states or losses are used; or a function that routes,
        with `num_experts`, as `expert_statistics` takes it, for weightings that need no more.
      forget, retain: the two corpora.
      forget_statistics, retain_statistics: their `expert_statistics` under `model`, and
      assignments: the `expert_assignments` of the retain corpus, where they were made before.
      selected: bool [L, E], experts of your own choice in place of those that the weighting's rule selects.
      solved: for weighting "permuted", the weights that it deals out, where they were made before.
      batch_size: rows per forward pass; changes no result.

    Raises:
      ValueError: statistics of another corpus, a corpus too small for any, a function where the weighting looks into
        the model, or `selected` of another shape or with a weighting that looks at no expert.

    Example:
      >>> config = tj.CalibrationConfig(weighting={"name": "matching", "unit": "row", "apply": "sampling"})
      >>> weights = tj.retain_weights(config, model=model, forget=forget, retain=retain)
      >>> bool(abs(weights.tokens.mean() - 1) < 1e-9)
      True
    """
    valid, weighting = retain.valid, config.weighting
    if retain_statistics is not None and int(valid.sum()) != retain_statistics.tokens:
        raise ValueError(
            f"the retain rows hold {int(valid.sum())} valid tokens, their statistics {retain_statistics.tokens}; "
            "statistics of another corpus were given."
        )

    whole: Any = model
    inside = settings.Hidden, settings.Loss, settings.Similarity, settings.Gradient, settings.Sensitivity
    looking = [way.name for way in (weighting, getattr(weighting, "rule", None)) if isinstance(way, inside)]
    if looking and not isinstance(model, Model):
        raise ValueError(f"{looking[0]!r} looks into the model, and model is a function that routes; give a Model.")
    if selected is not None and not isinstance(weighting, (settings.Matching, settings.RatioWeights)):
        raise ValueError(f"selected is given, and the weighting {weighting.name!r} looks at no expert; leave it out.")
    if not isinstance(weighting, settings.Weighted):
        return RetainWeights(np.ones(int(valid.sum())), valid, corpus=retain.digest)
    if not isinstance(weighting, (settings.Matching, settings.RatioWeights)):
        tokens = controls.weights_without_experts(weighting, whole, forget, retain, mesh=mesh, batch_size=batch_size)
        return RetainWeights(tokens, valid, corpus=retain.digest).applied(weighting)
    passes: Any = {"batch_size": batch_size, "mesh": mesh, "num_experts": num_experts}
    if retain_statistics is None:
        retain_statistics, routed = expert_routing(model, retain, **passes, min_activations=MIN_ACTIVATIONS)
        assignments = assignments or routed
    assignments = assignments or expert_assignments(model, retain, **passes)
    forget_statistics = forget_statistics or expert_statistics(model, forget, **passes)
    if selected is None:
        slopes = None
        if isinstance(weighting.rule, settings.Sensitivity):
            slopes = expert_sensitivity(whole, forget, batch_size=batch_size, mesh=mesh)
        selected = settings.select_experts(
            forget_statistics, retain_statistics, rule=weighting.rule, seed=config.seed, sensitivity=slopes
        )
    elif selected.dtype != bool or selected.shape != (shape := retain_statistics.counts.shape):
        raise ValueError(f"selected is {selected.dtype} {selected.shape}; expected bool {shape} (layers, experts).")
    f_forget, calibration, frequency = forget_statistics.frequency, None, None
    if isinstance(weighting, settings.RatioWeights):
        frequencies = f_forget, retain_statistics.frequency
        raw = controls.ratio_weights(assignments.indices, selected, *frequencies, weighting.max_ratio)
        tokens = controls.bounded(np.log(raw), np.ones(len(raw)), weighting)
    elif solved is not None and solved.calibration is not None:
        calibration, tokens, frequency = solved.calibration, solved.tokens, solved.frequency
    else:
        critical = np.zeros_like(selected)
        if isinstance(weighting, settings.RandomExperts):
            critical, selected = selected, settings.random_like(selected, seed=config.seed)
        elif isinstance(weighting, settings.LeastExperts):
            critical, selected = selected, settings.least_like(selected, f_forget - retain_statistics.frequency)
        counts = retain_statistics.counts
        calibration, tokens, frequency = match_frequencies(assignments, counts, selected, f_forget, weighting)[0]
        if shared := int((critical & selected).sum()):
            of_all = f"{shared} of {int(selected.sum())} control experts"
            notes = *calibration.certificate.notes, f"{of_all} are forget-critical ones: there are too few others."
            certificate = dataclasses.replace(calibration.certificate, notes=notes)
            calibration = dataclasses.replace(calibration, certificate=certificate)
    if isinstance(weighting, settings.Permuted):
        units = assignments.units(weighting.unit)
        units = np.arange(len(tokens)) if units is None else units
        tokens, frequency = controls.permuted(tokens, units, seed=config.seed), None
        tokens = tokens / tokens.mean()  # units of other lengths got them
    if frequency is None:
        frequency = weighted_frequency(assignments.indices, tokens, selected.shape[1])
    selected = selected if calibration is None else calibration.selected
    about: dict[str, Any] = {"selected": selected, "frequency": frequency, "calibration": calibration}
    weights = RetainWeights(tokens, valid, corpus=retain.digest, **about)
    return weights.applied(weighting)


# --- solved anew


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far routing has moved when weights are solved anew."""

    layers: tuple[int, ...]  # which layer of the network each entry is of, counted from 0
    # By corpus f64 [L]: mean over tokens of the Jaccard overlap of a token's experts with those of the original model;
    # sum over experts of |f - f_original|, 0 to 2K
    overlap: Mapping[str, np.ndarray]
    frequency_change: Mapping[str, np.ndarray]
    selected: int  # how many experts are matched now; 0 where there was nothing to match
    selected_overlap: float  # Jaccard overlap of the experts selected now with those selected before
    # Sum over the experts selected now of |f~ - f^F| under the current model's routing: "unweighted" (f~ = f^R),
    # "before" with the weights in force until now, "after" with those from now on
    gap: Mapping[str, float]
    effective_sample_size: float  # of the weights from now on, (sum w)^2 / (T sum w^2)
    unchanged: bool  # nothing is selected under the current routing, so that the weights stay as they were

    def text(self) -> str:
        """One line for a terminal."""
        same = " and ".join(f"{values.mean():.1%} ({corpus})" for corpus, values in self.overlap.items())
        moved = " and ".join(f"{values.mean():.3f}" for values in self.frequency_change.values())
        routing = f"routing overlaps with the original by {same}, frequencies moved by {moved} per layer"
        if self.unchanged:
            return f"{routing}; no expert is selected any more, so the last weights are kept"
        return (
            f"{routing}; {self.selected} experts selected, gap {self.gap['before']:.4f} -> {self.gap['after']:.4f}, "
            f"effective sample size {self.effective_sample_size:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class Recalibration:
    """Solves weights anew for the model as it is after some steps.

    Example:
      >>> routing = {"name": "recalibrated", "every": 10}
      >>> config = tj.CalibrationConfig(weighting={"name": "matching", "routing": routing})
      >>> weights = tj.retain_weights(config, model=model, forget=forget, retain=retain)
      >>> recalibrate = tj.Recalibration(config, model, forget, retain)  # goes with `weights` into `tj.unlearn`
      >>> recalibrate.every
      10
    """

    config: settings.CalibrationConfig  # what to solve; the routing of its weighting is "recalibrated"
    original: Model  # before unlearning; drift is measured from its routing
    forget: Rows
    retain: Rows
    mesh: Mesh | None = None  # this and the next: of passes over the rows; they change no result
    batch_size: int = 32

    @property
    def every(self) -> int:
        """Steps between recalibrations."""
        assert self.config.recalibrates_every is not None
        return self.config.recalibrates_every

    def __call__(self, current: Model, last: RetainWeights) -> tuple[RetainWeights, Drift]:
        """(the weights from now on, how far routing has moved) under `current`; `last` are the weights until now.

        Where nothing is selected any more, the weights from now on are `last`.
        """
        now = self._route(current)
        (forget, _), (retain, assignments) = now["forget"], now["retain"]
        made_of = {"forget_statistics": forget, "retain_statistics": retain, "assignments": assignments}
        new = retain_weights(self.config, model=current, forget=self.forget, retain=self.retain, **made_of)
        assert new.selected is not None and new.frequency is not None and last.selected is not None
        unchanged = not new.selected.any()
        weights = last if unchanged else new
        before = weighted_frequency(assignments.indices, last.tokens, new.selected.shape[1])
        after = before if unchanged else new.frequency
        frequencies = {"unweighted": retain.frequency, "before": before, "after": after}
        either, both = int((last.selected | new.selected).sum()), int((last.selected & new.selected).sum())
        start = self._start
        return weights, Drift(
            layers=tuple(current.config.moe_layers),
            overlap={name: overlap(start[name][1], now[name][1])["jaccard"] for name in now},
            frequency_change={name: frequency_gap(now[name][0].frequency, start[name][0].frequency) for name in now},
            selected=int(new.selected.sum()),
            selected_overlap=both / either if either else 1.0,
            gap={name: float(np.abs(f - forget.frequency)[new.selected].sum()) for name, f in frequencies.items()},
            effective_sample_size=weights.effective_sample_size,
            unchanged=unchanged,
        )

    @functools.cached_property
    def _start(self) -> dict[str, tuple[ExpertStatistics, Assignments]]:
        """Under the original model; measured when first needed, and again in a process that continues a run."""
        return self._route(self.original)

    def _route(self, model: Model) -> dict[str, tuple[ExpertStatistics, Assignments]]:
        return {
            name: expert_routing(model, rows, batch_size=self.batch_size, mesh=self.mesh)
            for name, rows in (("forget", self.forget), ("retain", self.retain))
        }
