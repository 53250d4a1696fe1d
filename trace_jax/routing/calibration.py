"""Where weights are solved for: retain tokens are weighted so that the selected experts are used as on forget data.

    target   p_c = (1 - s) f^R_c + s min(f^F_c, r_max f^R_c)
    weights  w_t = min(exp(lambda . a_t - log_normalizer), max_weight) * scale,   mean one over the retain corpus

a_t says which selected experts token t uses (or, for unit "row", the mean of that over its row). The multipliers lambda
[L, E] are all that needs keeping: `token_weights` makes weights from them again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from trace_jax.io.files import decode, encode, local_copy, read_json, replacing, write_json
from trace_jax.routing import entropy_balancing as solver
from trace_jax.routing.config import Entropy
from trace_jax.routing.statistics import Assignments

_NUMBERS = ("multipliers", "log_normalizer", "max_weight", "scale")  # what a weight is computed from


@struct.dataclass
class Calibration:
    """What recomputes the weight of any token from its chosen experts: on the host, or as an argument of a step."""

    multipliers: Any  # f64 [L, E], lambda; 0 where an expert isn't matched
    log_normalizer: Any
    max_weight: Any
    scale: Any
    selected: Any = None  # bool [L, E], the matched experts (selected and used by the retain corpus); None in a step
    unit: str = struct.field(pytree_node=False, default="token")  # or "row"
    certificate: Any = struct.field(pytree_node=False, default=None)  # what was reached; None in a step

    def for_step(self) -> "Calibration":
        """The constants of a training step, f32, on the host."""
        return Calibration(*(np.asarray(getattr(self, name), np.float32) for name in _NUMBERS), unit=self.unit)

    def save(self, path) -> None:
        """Writes PATH.npz (arrays) and PATH.json (numbers and certificate), each whole or not at all."""
        with replacing(f"{path}.npz") as temporary:
            np.savez(temporary, multipliers=self.multipliers, selected=self.selected)
        plain = {name: getattr(self, name) for name in (*_NUMBERS[1:], "unit")}
        write_json(f"{path}.json", plain | {"certificate": encode(self.certificate)})

    @classmethod
    def load(cls, path) -> "Calibration | None":
        """The inverse of `save`; None if there is no calibration."""
        saved = read_json(f"{path}.json")
        if saved is None:
            return None
        with local_copy(f"{path}.npz") as local, np.load(local, allow_pickle=False) as file:
            arrays = dict(file)
        return cls(**arrays, **saved | {"certificate": decode(Certificate, saved["certificate"])})


def token_weights(indices: jax.Array, calibration: Calibration, *, mask: jax.Array | None = None) -> jax.Array:
    """Weights of tokens from their chosen experts, in float32; usable under `jax.jit`.

    Args:
      indices: i32 [L, ..., K], `forward(..., collect=("indices",)).router.indices`. For unit "row" the shape is
        [L, B, S, K] and a row of the batch is a row of the corpus.
      calibration: the result of `calibrate` (a constant of the jitted function), or its `for_step()` (arguments).
      mask: bool [...], the valid positions; others get weight zero and are left out of rows. Default: all.

    Returns:
      f32 [...], the weights; their mean over the valid positions of the retain corpus is one.
    """
    multipliers, log_normalizer, max_weight, scale = (
        jnp.asarray(getattr(calibration, name), jnp.float32) for name in _NUMBERS
    )
    if indices.shape[0] != multipliers.shape[0]:
        raise ValueError(f"indices has {indices.shape[0]} layers; the calibration was made for {multipliers.shape[0]}.")
    if calibration.unit == "row" and indices.ndim != 4:
        raise ValueError(f"weights per row need indices [L, B, S, K]; got shape {indices.shape}.")
    scores = jax.vmap(lambda values, chosen: values[chosen])(multipliers, indices).sum(axis=(0, -1))
    valid = jnp.ones(scores.shape, bool) if mask is None else mask
    if calibration.unit == "row":
        tokens = jnp.maximum(valid.sum(axis=1, keepdims=True, dtype=jnp.float32), 1.0)
        scores = jnp.broadcast_to(jnp.where(valid, scores, 0.0).sum(axis=1, keepdims=True) / tokens, scores.shape)
    return jnp.where(valid, jnp.minimum(jnp.exp(scores - log_normalizer), max_weight) * scale, 0.0)


def corpus_weights(indices: np.ndarray, calibration: Calibration, rows: np.ndarray | None = None) -> np.ndarray:
    """`token_weights` in float64 for a whole corpus, f64 [T]; the mean is one on the calibrated corpus.

    indices integer [L, T, K]; rows integer [T], the row of each token, for unit "row".
    """
    pairs = zip(calibration.multipliers, indices, strict=True)
    scores = np.sum([values[chosen].sum(-1) for values, chosen in pairs], axis=0)
    if calibration.unit == "row":
        assert rows is not None
        members, row = solver.row_members(rows)
        scores = ((members @ scores) / (members @ np.ones(len(scores))))[row]
    return np.minimum(np.exp(scores - calibration.log_normalizer), calibration.max_weight) * calibration.scale


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
    strength: float = 1.0,
    ridge: float = 1e-3,
    max_weight: float = 50.0,
    max_ratio: float = 100.0,
    min_effective_sample_size: float = 0.0,
) -> Calibration:
    """Solves for the multipliers that bring the retain frequencies of the selected experts to their target.

    Args:
      assignments: the retain corpus: `expert_assignments(...)`, or integers [L, T, K] (then `rows` [T] gives the row of
        each token, in reading order, for unit "row"). The K experts of a token are distinct.
      selected: bool [L, E].
      target: f64 [L, E], the forget frequencies f^F.
      unit: what shares one weight. "token": a_t is 0 or 1. "row": a_t is its mean over the row, each row counting by
        its tokens, so that the matched moment still is the token frequency.
      strength: s, 0 leaves the corpus as it is, 1 asks for f^F.
      ridge: rho. With 0 a feasible target is met exactly; if none of the weightings meets it, ridge 1e-3 is used and
        the certificate says so.
      max_weight: largest weight before renormalisation.
      max_ratio: r_max, the largest increase of a frequency that is asked for.
      min_effective_sample_size: the largest strength up to `strength` is used that keeps (sum w)^2 / (T sum w^2) at
        or above this (to 0.001 of `strength`).

    An expert that the retain corpus never uses can't be matched by weights: it is left out and named.

    Raises:
      ConfigError: a setting out of range.  ValueError: arrays that don't fit together, or hold NaN.
    """
    settings = Entropy(
        unit=unit, strength=strength, ridge=ridge, max_weight=max_weight, max_ratio=max_ratio,
        min_effective_sample_size=min_effective_sample_size,
    )  # fmt: skip
    if isinstance(assignments, Assignments):
        tokens = assignments
    else:
        if unit != "token" and rows is None:
            raise ValueError(f"unit {unit!r} needs rows, the row number of each token.")
        indices = np.asarray(assignments)
        tokens = Assignments(indices, np.zeros(indices.shape[1:2], int) if rows is None else np.asarray(rows))
    indices = tokens.indices
    if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"assignments is {indices.dtype} of shape {indices.shape}; expected integers [layers, tokens, top k]."
        )
    if indices.shape[1] == 0:
        raise ValueError("the retain corpus has no valid token; there is nothing to weight.")
    if tokens.rows.shape != indices.shape[1:2]:
        raise ValueError(f"rows is {tokens.rows.shape}; expected one row number for each of {indices.shape[1]} tokens.")
    if selected.dtype != bool or selected.shape != target.shape or selected.shape[0] != indices.shape[0]:
        raise ValueError(
            f"selected is {selected.dtype} {selected.shape}, target {target.shape}; expected bool and numbers, both "
            f"[layers, experts], for assignments of {indices.shape[0]} layers."
        )
    if int(indices.max()) >= selected.shape[1] or int(indices.min()) < 0:
        raise ValueError(f"assignments name expert {int(indices.max())}; there are {selected.shape[1]} (from 0).")
    if not (np.isfinite(target).all() and (target >= 0).all() and (target <= 1).all()):
        raise ValueError("target holds a number that is no frequency (NaN, negative, or above 1).")
    return match_frequencies(tokens, count_activations(indices, selected.shape[1]), selected, target, settings)[0]


def match_frequencies(
    tokens: Assignments, counts: np.ndarray, selected: np.ndarray, target: np.ndarray, settings: Entropy
) -> tuple[Calibration, np.ndarray, np.ndarray]:
    """`calibrate` with what it comes from and leads to.

    counts: i64 [L, E], activations of `tokens`. Returns the calibration, the weights f64 [T] of `tokens`, and the
    weighted frequency f64 [L, E].
    """
    indices, matched = tokens.indices, selected & (counts > 0)
    total = indices.shape[1]
    features, base = solver.find_patterns(indices, matched, settings.unit, tokens.rows)
    moment = counts[matched] / total
    goal = np.minimum(target[matched], settings.max_ratio * moment)
    constant = solver.constant_directions(features, matched, moment, indices.shape[2])
    strength, balance = solver.strongest_balance(
        features, moment, goal, base=base, settings=settings, constant=constant
    )
    of_patterns, scale = solver.clipped_to_mean_one(balance.weights, settings.max_weight, base)
    multipliers = np.zeros(selected.shape)
    multipliers[matched] = balance.multipliers
    numbers = balance.log_normalizer, settings.max_weight, scale
    calibration = Calibration(multipliers, *numbers, matched, settings.unit)
    weights = corpus_weights(indices, calibration, tokens.rows)
    frequency = weighted_frequency(indices, weights, selected.shape[1])

    layer, expert = np.nonzero(matched)
    names = np.array(tokens.layers or range(len(counts)))
    before, after = np.abs(counts / total - target), np.abs(frequency - target)
    touched = np.any([of_layer[chosen].any(axis=1) for of_layer, chosen in zip(matched, indices, strict=True)], axis=0)
    absent = tuple((int(names[row]), int(column)) for row, column in np.argwhere(selected & ~matched))
    certificate = Certificate(
        layer=names[layer], expert=expert, forget=target[matched], retain=moment,
        target=moment + strength * (goal - moment), weighted=frequency[matched],
        gap_before=float(before[matched].sum()), gap_after=float(after[matched].sum()),
        gap_elsewhere_before=float(before[~matched].sum()), gap_elsewhere_after=float(after[~matched].sum()),
        effective_sample_size=solver.effective_sample_size(of_patterns, base), largest_weight=float(of_patterns.max()),
        clipped=float(base[balance.weights > settings.max_weight].sum()) / total, touched=float(touched.mean()),
        infeasible=absent, infeasible_share=len(absent) / max(1, int(selected.sum())),
        strength=float(strength), strength_asked=float(settings.strength), ridge=float(balance.ridge),
        iterations=balance.iterations, gradient_norm=balance.gradient_norm, tokens=total,
    )  # fmt: skip
    certificate = dataclasses.replace(certificate, notes=_notes(certificate, balance, settings.ridge))
    return dataclasses.replace(calibration, certificate=certificate), weights, frequency


def count_activations(indices: np.ndarray, num_experts: int) -> np.ndarray:
    """i64 [L, E]: how often each expert occurs in `indices` [L, T, K]."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in indices])


# --- what a calibration did


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Frequencies before and after, and what the weights cost. Experts and layers of the network are counted from 0.

    Arrays hold one entry per matched expert (f64 [C]); frequencies are shares of tokens.
    """

    layer: np.ndarray
    expert: np.ndarray
    forget: np.ndarray  # f^F
    retain: np.ndarray  # f^R
    target: np.ndarray  # p, what was asked for
    weighted: np.ndarray  # f~, the weighted retain frequency sum_t w_t a_t / sum_t w_t over tokens, after clipping
    gap_before: float  # sum over the matched experts of |f^R - f^F|
    gap_after: float  # and of |f~ - f^F|
    gap_elsewhere_before: float  # the same over all other experts, which nothing was asked of
    gap_elsewhere_after: float
    effective_sample_size: float  # (sum w)^2 / (T sum w^2), a share of the tokens
    largest_weight: float  # after clipping and renormalisation (uniform is 1)
    clipped: float  # share of the tokens that were clipped
    touched: float  # share of the tokens that use a matched expert
    infeasible: tuple[tuple[int, int], ...]  # (layer, expert) selected, but not used by the retain corpus: left out
    infeasible_share: float  # their share of the selected experts
    strength: float
    strength_asked: float  # as configured: higher if the sample size bound held it back
    ridge: float  # that was solved with
    iterations: int  # Newton steps of the final solve
    gradient_norm: float  # its largest gradient entry
    tokens: int  # of the retain corpus
    notes: tuple[str, ...] = ()  # what a reader must know, in words

    def text(self, most: int = 24) -> str:
        """A page for a terminal: totals, notes, and the `most` experts with the largest forget-retain gap."""
        lines = [
            f"calibration: {len(self.layer)} experts matched on {self.tokens:,} retain tokens",
            f"  gap to the forget frequencies {self.gap_before:.4f} -> {self.gap_after:.4f}"
            f" (other experts {self.gap_elsewhere_before:.4f} -> {self.gap_elsewhere_after:.4f})",
            f"  effective sample size {self.effective_sample_size:.1%}, largest weight {self.largest_weight:.2f}, "
            f"{self.clipped:.2%} of the tokens clipped, {self.touched:.1%} touch a matched expert",
            f"  strength {self.strength:.3f} (asked {self.strength_asked:.3f}), ridge {self.ridge:g}, "
            f"{self.iterations} Newton steps, gradient {self.gradient_norm:.1e}",
            *(f"  note: {note}" for note in self.notes),
        ]
        order = np.argsort(-np.abs(self.forget - self.retain), kind="stable")
        if len(order):
            lines.append("  layer expert   forget   retain   target weighted")
        for c in order[:most]:
            numbers = (self.forget[c], self.retain[c], self.target[c], self.weighted[c])
            lines.append(f"  {self.layer[c]:5d} {self.expert[c]:6d} " + " ".join(f"{n:8.5f}" for n in numbers))
        if len(order) > most:
            lines.append(f"  ... and {len(order) - most} more")
        return "\n".join(lines)


def _notes(c: Certificate, balance: solver.Balance, ridge: float) -> tuple[str, ...]:
    """What a reader must know of a solution; ridge: the one that was asked for."""
    notes = []
    if not len(c.layer):
        notes.append("no expert is matched, so every weight is one.")
    if c.infeasible:
        listed = ", ".join(f"layer {layer} expert {expert}" for layer, expert in c.infeasible[:8])
        more = f" and {len(c.infeasible) - 8} more" if len(c.infeasible) > 8 else ""
        notes.append(
            f"{len(c.infeasible)} selected experts never occur in the retain corpus, left out: {listed}{more}."
        )
    if c.ridge != ridge:
        notes.append(
            f"no weights of these tokens were found that meet the target; solved with ridge {c.ridge:g}, not {ridge:g}."
        )
    elif not balance.converged:
        notes.append(f"the solver stopped short of the optimum (gradient {balance.gradient_norm:.1e}).")
    missed = np.abs(c.weighted - c.target)
    if missed.max(initial=0.0) > 0.01:
        i = int(missed.argmax())
        why = "weights were clipped" if c.clipped else "the ridge holds it back"
        why = "no weights can meet it" if balance.infeasible or not (c.clipped or c.ridge) else why
        notes.append(
            f"the target is missed by up to {missed[i]:.4f} (layer {c.layer[i]} expert {c.expert[i]}: "
            f"asked {c.target[i]:.4f}, got {c.weighted[i]:.4f}): {why}."
        )
    if c.strength < c.strength_asked:
        notes.append(
            f"strength lowered from {c.strength_asked:g} to {c.strength:.4f} to keep the effective sample size."
        )
    return tuple(notes)
