"""Where weights are solved for: retain tokens are weighted so that the selected experts are used as on forget data, as
nearly as a given sample of retain tokens allows (docs/method.md; the solver is `trace_jax.routing.solver`).

    target   p_c = min(f^F_c, r_max f^R_c)
    weights  w_t = clip(lambda . a_t + nu, 0, max_weight), for "kl" min(exp(lambda . a_t + nu), max_weight);
             their mean over the retain corpus is one

a_t says which selected experts token t uses (for unit "row" or "document" the mean of that over its row or document).
The multipliers lambda [L, E] and nu are all that needs keeping: `token_weights` makes weights from them again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from trace_jax.io.drawing import TIMES_UNIFORM, card, heat_map, times
from trace_jax.io.files import decode, encode, read_arrays, read_json, write_arrays, write_json
from trace_jax.models.loss import document_sums
from trace_jax.routing import solver
from trace_jax.routing.config import Matching
from trace_jax.routing.statistics import Assignments, count_activations

_NUMBERS = ("multipliers", "intercept", "max_weight")  # what a weight is computed from
SIZES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)  # effective sample sizes that a choice is shown for


@struct.dataclass
class Calibration:
    """What recomputes the weight of any token from its chosen experts: on the host, or as an argument of a step."""

    multipliers: Any  # f64 [L, E], lambda; 0 where an expert isn't calibrated
    intercept: Any  # nu
    max_weight: Any
    selected: Any = None  # bool [L, E], the calibrated experts (selected and used by the retain corpus); None in a step
    unit: str = struct.field(pytree_node=False, default="token")  # or "row" or "document"
    divergence: str = struct.field(pytree_node=False, default="chi2")  # or "kl"
    certificate: Any = struct.field(pytree_node=False, default=None)  # what was reached; None in a step

    def __repr__(self) -> str:
        return f"Calibration({'constants of a step' if self.certificate is None else self.certificate.summary})"

    def _repr_html_(self) -> str | None:
        """Forget over retain frequency of the calibrated experts, before and after, in the layers that have any."""
        c, selected = self.certificate, self.selected
        if c is None or selected is None or not selected.any():
            return None
        rows = np.flatnonzero(selected.any(axis=1))
        scale, maps = TIMES_UNIFORM._replace(labels=[(v, "equal" if not v else t) for v, t in TIMES_UNIFORM.labels]), []
        for caption, retain in (("forget / retain frequency", c.retain), ("after weighting", c.weighted)):
            ratio = np.full(selected.shape, np.nan)
            ratio[selected] = times(c.forget, retain)
            about = {"selected": selected[rows], "layers": list(dict.fromkeys(c.layer.tolist()))}
            maps.append(heat_map(ratio[rows], scale, caption, c.summary, **about))
        return card(repr(self), maps, scale)

    def for_step(self) -> "Calibration":
        """The constants of a training step, f32, on the host."""
        numbers = (np.asarray(getattr(self, name), np.float32) for name in _NUMBERS)
        return Calibration(*numbers, unit=self.unit, divergence=self.divergence)

    def save(self, path) -> None:
        """Writes PATH.npz (arrays) and PATH.json (numbers and certificate), each whole or not at all."""
        write_arrays(f"{path}.npz", {"multipliers": self.multipliers, "selected": self.selected}, compress=False)
        plain = {name: getattr(self, name) for name in (*_NUMBERS[1:], "unit", "divergence")}
        write_json(f"{path}.json", plain | {"certificate": encode(self.certificate)})

    @classmethod
    def load(cls, path) -> "Calibration | None":
        """The inverse of `save`; None if there is no calibration."""
        saved = read_json(f"{path}.json")
        if saved is None:
            return None
        plain = saved | {"certificate": decode(Certificate, saved["certificate"])}
        return cls(**read_arrays(f"{path}.npz"), **plain)


def token_weights(
    indices: jax.Array, calibration: Calibration, *, mask: jax.Array | None = None, segments: jax.Array | None = None
) -> jax.Array:
    """Weights of tokens from their chosen experts, in float32; usable under `jax.jit`.

    Args:
      indices: i32 [L, ..., K], `forward(..., collect=("indices",)).router.indices`. For units "row" and "document" the
        shape is [L, B, S, K] and a row of the batch is a row of the corpus.
      calibration: the result of `calibrate` (a constant of the jitted function), or its `for_step()` (arguments).
      mask: bool [...], the valid positions; others get weight zero and are left out of rows. Default: all.
      segments: i32 [B, S], for unit "document" the documents of each row, numbered from 1 (`Batch.segments`).

    Returns:
      f32 [...], the weights; their mean over the valid positions of the retain corpus is one.

    Example:
      >>> routed, target = tj.expert_assignments(model, retain), tj.expert_statistics(model, forget).frequency
      >>> solved = tj.calibrate(routed, selected=target > 0.3, target=target)
      >>> weights = tj.token_weights(jax.numpy.asarray(routed.indices, "int32"), solved)
      >>> round(float(weights.mean()), 3)
      1.0
    """
    multipliers, intercept, max_weight = (jnp.asarray(getattr(calibration, name), jnp.float32) for name in _NUMBERS)
    if indices.shape[0] != multipliers.shape[0]:
        raise ValueError(f"indices has {indices.shape[0]} layers; the calibration was made for {multipliers.shape[0]}.")
    if calibration.unit != "token" and indices.ndim != 4:
        raise ValueError(f"weights per {calibration.unit} need indices [L, B, S, K]; got shape {indices.shape}.")
    if calibration.unit == "document" and segments is None:
        raise ValueError("weights per document need segments [B, S], the document of each position.")
    scores = jax.vmap(lambda values, chosen: values[chosen])(multipliers, indices).sum(axis=(0, -1))
    valid = jnp.ones(scores.shape, bool) if mask is None else mask
    if calibration.unit != "token":
        unit = jnp.ones(scores.shape, jnp.int32) if calibration.unit == "row" or segments is None else segments
        sums = document_sums(jnp.where(valid, scores, 0.0), unit)
        means = sums / jnp.maximum(document_sums(valid.astype(jnp.float32), unit), 1.0)
        scores = jnp.take_along_axis(means, unit, axis=1)
    weights = solver.weight_of(scores + intercept, calibration.divergence, max_weight, jnp)
    return jnp.where(valid, weights, 0.0)


def weighted_frequency(indices: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """f64 [L, E]: sum_t w_t a_t / sum_t w_t. indices integer [L, T, K], weights f64 [T]."""
    repeated = np.repeat(weights, indices.shape[2])
    sums = [np.bincount(layer.ravel(), repeated, minlength=num_experts) for layer in indices]
    return np.stack(sums) / weights.sum()


def calibrate(
    assignments: Assignments | np.ndarray,
    *,
    selected: np.ndarray,
    target: np.ndarray,
    unit: str = "token",
    rows: np.ndarray | None = None,
    divergence: str = "chi2",
    min_effective_sample_size: float = 0.2,
    max_weight: float = 50.0,
    max_ratio: float = 100.0,
) -> Calibration:
    """Solves for the multipliers that bring the retain frequencies of the selected experts close to their target.

    Args:
      assignments: the retain corpus: `expert_assignments(...)`, or integers [L, T, K] (then `rows` [T] gives the row or
        document of each token, for these units). The K experts of a token are distinct.
      selected: bool [L, E].
      target: f64 [L, E], the forget frequencies f^F.
      unit: what shares one weight. "token": a_t is 0 or 1. "row", "document": a_t is its mean over the row or document,
        each counting by its tokens, so that what is matched still is the token frequency.
      divergence: what is kept small beside the mismatch: "chi2" gives weights linear in a_t, clipped at 0 and
        max_weight; "kl" gives exponential ones (entropy balancing), clipped at max_weight.
      min_effective_sample_size: share (sum w)^2 / (T sum w^2) of the tokens that is to remain. The match is the closest
        that keeps it; 0 asks for the exact match, or the closest that any weights give.
      max_weight: largest weight (1 is uniform).
      max_ratio: r_max, the largest increase of a frequency that is asked for.

    An expert that the retain corpus never uses can't be matched by weights: it is left out and named.

    Raises:
      ConfigError: a setting out of range.  ValueError: arrays that don't fit together, or hold NaN.

    Example:
      >>> routed, target = tj.expert_assignments(model, retain), tj.expert_statistics(model, forget).frequency
      >>> solved = tj.calibrate(routed, selected=target > 0.3, target=target, min_effective_sample_size=0.5)
      >>> solved.certificate.gap_after < solved.certificate.gap_before, solved.certificate.effective_sample_size >= 0.49
      (True, True)
    """
    settings = Matching(
        unit=unit, divergence=divergence, max_weight=max_weight, max_ratio=max_ratio,
        min_effective_sample_size=min_effective_sample_size,
    )  # fmt: skip
    tokens, counts = _checked(assignments, selected, target, unit, rows)
    return match_frequencies(tokens, counts, selected, target, settings)[0][0]


def trade_off(
    assignments: Assignments | np.ndarray,
    *,
    selected: np.ndarray,
    target: np.ndarray,
    unit: str = "token",
    rows: np.ndarray | None = None,
    sizes: Sequence[float] = SIZES,
) -> "tuple[Certificate, ...]":
    """What `calibrate` reaches at each effective sample size of `sizes`, which fall: the curve to choose one on.

    Example:
      >>> routed, target = tj.expert_assignments(model, retain), tj.expert_statistics(model, forget).frequency
      >>> large, small = tj.trade_off(routed, selected=target > 0.3, target=target, sizes=(0.9, 0.5))
      >>> large.closed < small.closed
      True
    """
    tokens, counts = _checked(assignments, selected, target, unit, rows)
    solved = match_frequencies(tokens, counts, selected, target, Matching(unit=unit), sizes)
    return tuple(calibration.certificate for calibration, _, _ in solved)


def _checked(
    assignments, selected: np.ndarray, target: np.ndarray, unit: str, rows: np.ndarray | None
) -> tuple[Assignments, np.ndarray]:
    """The assignments of a caller and their counts i64 [L, E], where everything that came with them fits together."""
    tokens = assignments
    if not isinstance(tokens, Assignments):
        if unit != "token" and rows is None:
            raise ValueError(f"unit {unit!r} needs rows, the number of the {unit} of each token.")
        indices = np.asarray(assignments)
        units = np.zeros(indices.shape[1:2], int) if rows is None else np.asarray(rows)
        tokens = Assignments(indices, units, units)
    indices = tokens.indices
    if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"assignments is {indices.dtype} of shape {indices.shape}; expected integers [layers, tokens, top k]."
        )
    if indices.shape[1] == 0:
        raise ValueError("the retain corpus has no valid token; there is nothing to weight.")
    if tokens.rows.shape != indices.shape[1:2]:
        raise ValueError(f"rows is {tokens.rows.shape}; expected one number for each of {indices.shape[1]} tokens.")
    if selected.dtype != bool or selected.shape != target.shape or selected.shape[0] != indices.shape[0]:
        raise ValueError(
            f"selected is {selected.dtype} {selected.shape}, target {target.shape}; expected bool and numbers, both "
            f"[layers, experts], for assignments of {indices.shape[0]} layers."
        )
    if int(indices.max()) >= selected.shape[1] or int(indices.min()) < 0:
        raise ValueError(f"assignments name expert {int(indices.max())}; there are {selected.shape[1]} (from 0).")
    if not (np.isfinite(target).all() and (target >= 0).all() and (target <= 1).all()):
        raise ValueError("target holds a number that is no frequency (NaN, negative, or above 1).")
    return tokens, count_activations(indices, selected.shape[1])


def match_frequencies(
    tokens: Assignments,
    counts: np.ndarray,
    selected: np.ndarray,
    target: np.ndarray,
    settings: Matching,
    sizes: Sequence[float] | None = None,
) -> list[tuple[Calibration, np.ndarray, np.ndarray]]:
    """`calibrate` with what it comes from and leads to, at each effective sample size of `sizes` (that of settings).

    counts: i64 [L, E], activations of `tokens`. Gives calibrations, weights f64 [T], weighted frequencies f64 [L, E].
    """
    indices, matched, total = tokens.indices, selected & (counts > 0), tokens.indices.shape[1]
    features, base, pattern, touched = solver.find_patterns(indices, matched, tokens.units(settings.unit))
    moment = counts[matched] / total
    goal = np.minimum(target[matched], settings.max_ratio * moment)
    reachable = solver.reachable(features, matched, moment, goal, indices.shape[2])
    sizes = [settings.min_effective_sample_size] if sizes is None else sizes
    options: dict[str, Any] = {"divergence": settings.divergence, "max_weight": settings.max_weight}
    balances = solver.closest_match(features, reachable, base=base, sizes=sizes, **options)

    layer, expert = np.nonzero(matched)
    names = np.array(tokens.layers or range(len(counts)))
    absent = tuple((int(names[row]), int(column)) for row, column in np.argwhere(selected & ~matched))
    before = np.abs(counts / total - target)
    same: dict[str, Any] = {
        "layer": names[layer], "expert": expert, "forget": target[matched], "retain": moment, "target": goal,
        "gap_before": float(before[matched].sum()), "gap_elsewhere_before": float(before[~matched].sum()),
        "touched": touched, "infeasible": absent, "tokens": total, "num_experts": int(selected.size),
    }  # fmt: skip
    solved = []
    for size, balance in zip(sizes, balances, strict=True):
        weights = balance.weights[pattern]
        frequency = weighted_frequency(indices, weights, selected.shape[1])
        after = np.abs(frequency - target)
        certificate = Certificate(
            **same, weighted=frequency[matched], gap_after=float(after[matched].sum()),
            gap_elsewhere_after=float(after[~matched].sum()), closed=_closed(before[matched], after[matched]),
            closed_all=_closed(before, after), effective_sample_size=balance.effective_sample_size,
            largest_weight=float(weights.max()), clipped=float((weights >= settings.max_weight).mean()),
            zero=float((weights == 0).mean()), rho=balance.rho, iterations=balance.iterations,
            gradient_norm=balance.gradient_norm,
        )  # fmt: skip
        certificate = dataclasses.replace(certificate, notes=_notes(certificate, balance, size))
        multipliers = np.zeros(selected.shape)
        multipliers[matched] = balance.multipliers
        numbers = multipliers, balance.intercept, settings.max_weight
        calibration = Calibration(*numbers, matched, settings.unit, settings.divergence, certificate)
        solved.append((calibration, weights, frequency))
    return solved


def _closed(before: np.ndarray, after: np.ndarray) -> float:
    """Share of a gap that is closed, of its size by expert before and after; 1 where there was none."""
    return 1.0 - float(after.sum() / before.sum()) if before.any() else 1.0


# --- what a calibration did


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Frequencies before and after, and what the weights cost. Experts and layers of the network are counted from 0.

    Arrays hold one entry per calibrated expert (f64 [C]); frequencies are shares of tokens.
    """

    closed: float  # share of the gap of the calibrated experts that is closed, 1 - gap_after / gap_before
    closed_all: float  # the same over all experts
    effective_sample_size: float  # (sum w)^2 / (T sum w^2), a share of the tokens
    largest_weight: float  # (uniform is 1)
    layer: np.ndarray
    expert: np.ndarray
    forget: np.ndarray  # f^F
    retain: np.ndarray  # f^R
    target: np.ndarray  # p, what was asked for
    weighted: np.ndarray  # f~, the weighted retain frequency sum_t w_t a_t / sum_t w_t over tokens
    gap_before: float  # sum over the calibrated experts of |f^R - f^F|
    gap_after: float  # and of |f~ - f^F|
    gap_elsewhere_before: float  # the same over all other experts, which nothing was asked of
    gap_elsewhere_after: float
    clipped: float  # share of the tokens whose weight is the largest that is allowed
    zero: float  # share of the tokens that get no weight
    touched: float  # share of the tokens that use a calibrated expert
    infeasible: tuple[tuple[int, int], ...]  # (layer, expert) selected, but not used by the retain corpus: left out
    rho: float  # coefficient of the divergence from uniform weights in the problem that was solved
    iterations: int  # Newton steps of the final solve
    gradient_norm: float  # its largest gradient entry
    tokens: int  # of the retain corpus
    num_experts: int  # of the model, in all layers
    notes: tuple[str, ...] = ()  # what a reader must know, in words

    @property
    def summary(self) -> str:
        """What it does and costs, in a line."""
        return (
            f"closes {self.closed:.1%} of the gap of {len(self.layer)} selected experts "
            f"({self.closed_all:.1%} over all {self.num_experts}), effective sample {self.effective_sample_size:.1%}, "
            f"largest weight {self.largest_weight:.2f}"
        )

    def __repr__(self) -> str:
        return f"Certificate({self.summary})"

    def text(self, most: int = 24) -> str:
        """A page for a terminal: totals, notes, and the `most` experts with the largest forget-retain gap."""
        lines = [
            f"calibration: {self.summary}",
            f"  gap to the forget frequencies {self.gap_before:.4f} -> {self.gap_after:.4f}"
            f" (other experts {self.gap_elsewhere_before:.4f} -> {self.gap_elsewhere_after:.4f})",
            f"  {self.tokens:,} retain tokens: {self.touched:.1%} use a selected expert, {self.zero:.1%} weigh 0, "
            f"{self.clipped:.2%} the most",
            *(f"  note: {note}" for note in self.notes),
        ]
        order = np.argsort(-np.abs(self.forget - self.retain), kind="stable")
        if len(order) and most:
            lines.append("  layer expert   forget   retain   target weighted")
        for c in order[:most]:
            numbers = (self.forget[c], self.retain[c], self.target[c], self.weighted[c])
            lines.append(f"  {self.layer[c]:5d} {self.expert[c]:6d} " + " ".join(f"{n:8.5f}" for n in numbers))
        if len(order) > most > 0:
            lines.append(f"  ... and {len(order) - most} more")
        return "\n".join(lines)


def _notes(c: Certificate, balance: solver.Balance, size: float) -> tuple[str, ...]:
    """What a reader must know of a solution; size: the effective sample size that was to remain."""
    notes, share = [], (len(c.layer) + len(c.infeasible)) / c.num_experts
    if not len(c.layer):
        notes.append("no expert is calibrated, so every weight is one.")
    if share > 0.25:
        notes.append(f"{share:.0%} of all experts are selected: that is hardly a selection.")
    if c.infeasible:
        listed = ", ".join(f"layer {layer} expert {expert}" for layer, expert in c.infeasible[:8])
        more = f" and {len(c.infeasible) - 8} more" if len(c.infeasible) > 8 else ""
        notes.append(
            f"{len(c.infeasible)} selected experts never occur in the retain corpus, left out: {listed}{more}."
        )
    if balance.gradient_norm > solver.ENOUGH:
        notes.append(f"the solver stopped short of the optimum (gradient {balance.gradient_norm:.1e}).")
    missed = np.abs(c.weighted - c.target)
    if missed.max(initial=0.0) > 0.01:
        i = int(missed.argmax())
        bound = c.effective_sample_size < 1.001 * size
        why = f"the effective sample size of {size:g} allows no more" if bound else "no weights come closer"
        notes.append(
            f"the target is missed by up to {missed[i]:.4f} (layer {c.layer[i]} expert {c.expert[i]}: "
            f"asked {c.target[i]:.4f}, got {c.weighted[i]:.4f}): {why}."
        )
    return tuple(notes)
