"""Where weights are solved for: retain tokens are weighted so that the selected experts are used as on forget data.

    target   p_c = (1 - s) f^R_c + s min(f^F_c, r_max f^R_c)
    weights  w_t = min(exp(lambda . a_t - log_normalizer), max_weight) * scale,   mean one over the retain corpus

a_t says which selected experts token t uses (or, for unit "row" and "window", the mean of that over the unit). The
multipliers lambda [L, E] are all that needs keeping: `trace_jax.routing.weights` makes weights from them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.io.files import local_copy, read_json, replacing, write_json
from trace_jax.routing.certificate import Certificate
from trace_jax.routing.config import UNITS
from trace_jax.routing.entropy_balancing import Balance, entropy_balance
from trace_jax.routing.features import Patterns, find_patterns
from trace_jax.routing.statistics import Assignments, as_assignments
from trace_jax.routing.weights import clipped_to_mean_one, effective_sample_size, weighted_frequency

FALLBACK_RIDGE = 1e-3  # used where ridge 0 was asked for and no weights meet the target


_PLAIN = ("log_normalizer", "max_weight", "scale", "unit", "window")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What recomputes the weight of any token from its chosen experts.

    Attributes:
      multipliers: f64 [L, E], lambda; 0 where an expert isn't matched.
      selected: bool [L, E], the matched experts (selected and used by the retain corpus).
      log_normalizer, max_weight, scale: of the formula above.
      unit: "token", "row" or "window".  window: its length, else None.
    """

    multipliers: np.ndarray
    selected: np.ndarray
    log_normalizer: float
    max_weight: float
    scale: float
    unit: str
    window: int | None
    certificate: Certificate

    def save(self, path) -> None:
        """Writes PATH.npz (arrays) and PATH.json (numbers and certificate), each whole or not at all."""
        with replacing(f"{path}.npz") as temporary:
            np.savez(temporary, multipliers=self.multipliers, selected=self.selected)
        plain = {name: getattr(self, name) for name in _PLAIN}
        write_json(f"{path}.json", plain | {"certificate": self.certificate.as_dict()})

    @classmethod
    def load(cls, path) -> Calibration:
        saved = read_json(f"{path}.json")
        if saved is None:
            raise FileNotFoundError(f"{path}.json: there is no calibration here.")
        plain = {name: saved[name] for name in _PLAIN}
        with local_copy(f"{path}.npz") as local, np.load(local, allow_pickle=False) as file:
            multipliers, selected = file["multipliers"], file["selected"]
        return cls(multipliers, selected, **plain, certificate=Certificate.from_dict(saved["certificate"]))


def calibrate(
    assignments: Assignments | np.ndarray,
    *,
    selected: np.ndarray,
    target: np.ndarray,
    unit: str = "token",
    window: int | None = None,
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
        each token, in reading order, for units "row" and "window"). The K experts of a token are distinct.
      selected: bool [L, E].
      target: f64 [L, E], the forget frequencies f^F.
      unit: what shares one weight. "token": a_t is 0 or 1. "row": a_t is its mean over the row, each row counting by
        its tokens, so that the matched moment still is the token frequency. "window": the mean over the last `window`
        tokens of the row; the matched moment, and f^R in the target, then is the mean of these means (tokens at the
        beginning of a row count a little more than in the frequency); the certificate states both.
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
    tokens = as_assignments(assignments, rows)
    _check_settings(unit, window, strength, ridge, max_weight, max_ratio, min_effective_sample_size)
    _check_arrays(tokens, assignments, rows, unit, selected, target)
    counts = count_activations(tokens.indices, selected.shape[1])
    matched = selected & (counts > 0)
    patterns = find_patterns(tokens.indices, matched, unit=unit, rows=tokens.rows, window=window)
    frequency = counts[matched] / tokens.indices.shape[1]
    moment = patterns.tokens @ patterns.features / patterns.tokens.sum() if unit == "window" else frequency
    constant = constant_directions(patterns, matched, moment, tokens.indices.shape[2])
    goal = np.minimum(target[matched], max_ratio * moment)

    def solve(s: float, start: np.ndarray | None) -> _Clipped:
        wanted = moment + s * (goal - moment)
        return _solve(patterns, wanted, ridge=ridge, constant=constant, start=start, max_weight=max_weight)

    found, used = strongest(solve, strength, min_effective_sample_size)
    multipliers = np.zeros(selected.shape)
    multipliers[matched] = found.balance.multipliers
    certificate = _certify(
        found, patterns, tokens, selected, matched, counts, target,
        wanted=moment + used * (goal - moment), strength=used, strength_asked=strength, max_weight=max_weight,
        ridge_asked=ridge,
    )  # fmt: skip
    normalizer = found.balance.log_normalizer
    return Calibration(multipliers, matched, normalizer, max_weight, found.scale, unit, window, certificate)


@dataclasses.dataclass(frozen=True)
class _Clipped:
    """A solution after clipping: weights f64 [P] of the patterns, with mean one over the tokens."""

    balance: Balance
    ridge: float
    weights: np.ndarray
    scale: float
    effective_sample_size: float


def _solve(patterns: Patterns, wanted, *, ridge, constant, start, max_weight) -> _Clipped:
    def balance(ridge, start):
        return entropy_balance(
            patterns.features, wanted, base=patterns.tokens, ridge=ridge, constant=constant, start=start
        )

    result = balance(ridge, start)
    if ridge == 0 and not result.converged:
        ridge = FALLBACK_RIDGE
        result = balance(ridge, None)
    weights, scale = clipped_to_mean_one(result.weights, max_weight, patterns.tokens)
    return _Clipped(result, ridge, weights, scale, effective_sample_size(weights, patterns.tokens))


class _HasSampleSize(Protocol):
    @property
    def balance(self) -> Balance: ...
    @property
    def effective_sample_size(self) -> float: ...


Solved = TypeVar("Solved", bound=_HasSampleSize)


def strongest(
    solve: Callable[[float, np.ndarray | None], Solved], strength: float, bound: float
) -> tuple[Solved, float]:
    """(solution, strength): the largest strength up to `strength` whose effective sample size is at least `bound`.

    Bisection, to 0.001 of `strength`; each solve starts from the multipliers of the weaker one.
    """
    best = solve(strength, None)
    if best.effective_sample_size >= bound:
        return best, strength
    low, high = 0.0, strength
    best = solve(0.0, None)
    while high - low > 1e-3 * strength:
        middle = (low + high) / 2
        solution = solve(middle, best.balance.multipliers)
        if solution.effective_sample_size >= bound:
            low, best = middle, solution
        else:
            high = middle
    return best, low


def count_activations(indices: np.ndarray, num_experts: int) -> np.ndarray:
    """i64 [L, E]: how often each expert occurs in `indices` [L, T, K]."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in indices])


def constant_directions(patterns: Patterns, matched: np.ndarray, moment: np.ndarray, top_k: int) -> np.ndarray:
    """f64 [C, n], orthonormal: what no weights can change, because it is the same in every unit.

    That is an expert that is always on, and the sum over a layer whose every activation is matched.
    """
    features, columns = patterns.features, len(moment)
    if isinstance(features, np.ndarray):
        fixed = np.ptp(features, axis=0) == 0 if columns else np.zeros(0, bool)
    else:
        fixed = moment == 1.0
    directions = [np.eye(columns)[c] for c in np.flatnonzero(fixed)]
    layer = np.nonzero(matched)[0]
    for number in np.unique(layer):
        inside = layer == number
        free = inside & ~fixed
        if free.any() and np.isclose(moment[inside].sum(), top_k, rtol=1e-12, atol=0.0):
            directions.append(free / np.sqrt(free.sum()))
    return np.stack(directions, axis=1) if directions else np.zeros((columns, 0))


def _certify(
    found: _Clipped, patterns: Patterns, assignments: Assignments, selected, matched, counts, target, *,
    wanted, strength, strength_asked, max_weight, ridge_asked,
) -> Certificate:  # fmt: skip
    indices = assignments.indices
    tokens, names = indices.shape[1], np.array(assignments.layers or range(len(indices)))
    of_token = found.weights[patterns.of_token]  # f64 [T]
    weighted = weighted_frequency(indices, of_token, selected.shape[1])
    touched = np.zeros(tokens, bool)
    for layer, layer_matched in zip(indices, matched, strict=True):
        touched |= layer_matched[layer].any(axis=1)
    retain, others = counts / tokens, ~matched
    before, after = np.abs(retain - target), np.abs(weighted - target)
    infeasible = tuple((int(names[row]), int(expert)) for row, expert in np.argwhere(selected & ~matched))
    row, expert = np.nonzero(matched)
    certificate = Certificate(
        layer=names[row], expert=expert, forget=target[matched], retain=retain[matched], target=wanted,
        moment=patterns.features.T @ (patterns.tokens * found.weights) / tokens, weighted=weighted[matched],
        gap_before=float(before[matched].sum()), gap_after=float(after[matched].sum()),
        gap_elsewhere_before=float(before[others].sum()), gap_elsewhere_after=float(after[others].sum()),
        effective_sample_size=found.effective_sample_size, largest_weight=float(found.weights.max()),
        clipped=float(patterns.tokens[found.balance.weights > max_weight].sum()) / tokens,
        touched=float(touched.mean()),
        infeasible=infeasible, infeasible_share=len(infeasible) / max(1, int(selected.sum())),
        strength=float(strength), strength_asked=float(strength_asked), ridge=float(found.ridge),
        iterations=found.balance.iterations, gradient_norm=found.balance.gradient_norm, tokens=tokens,
    )  # fmt: skip
    return dataclasses.replace(certificate, notes=_notes(certificate, ridge_asked, found.balance))


def _notes(c: Certificate, ridge_asked: float, balance: Balance) -> tuple[str, ...]:
    notes = []
    if not len(c.layer):
        notes.append("no expert is matched, so every weight is one.")
    if c.infeasible:
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in c.infeasible[:8])
        more = f" and {len(c.infeasible) - 8} more" if len(c.infeasible) > 8 else ""
        notes.append(f"{len(c.infeasible)} selected experts never occur in the retain corpus, left out: {named}{more}.")
    missed = np.abs(c.moment - c.target)
    if c.ridge != ridge_asked:
        notes.append(
            f"no weights of these tokens were found that meet the target; solved with ridge {c.ridge:g}, "
            f"not {ridge_asked:g}."
        )
    elif not balance.converged:
        notes.append(f"the solver stopped short of the optimum (gradient {balance.gradient_norm:.1e}).")
    if missed.max(initial=0.0) > 0.01:
        worst = int(missed.argmax())
        why = (
            "weights were clipped" if c.clipped else "the ridge holds it back" if c.ridge else "no weights can meet it"
        )
        why = "no weights can meet it" if balance.infeasible else why
        notes.append(
            f"the target is missed by up to {missed[worst]:.4f} (layer {c.layer[worst]} expert {c.expert[worst]}: "
            f"asked {c.target[worst]:.4f}, got {c.moment[worst]:.4f}): {why}."
        )
    if c.strength < c.strength_asked:
        notes.append(
            f"strength lowered from {c.strength_asked:g} to {c.strength:.4f} to keep the effective sample size."
        )
    return tuple(notes)


def _check_settings(unit, window, strength, ridge, max_weight, max_ratio, bound) -> None:
    if unit not in UNITS:
        raise ConfigError(f"unit is {unit!r}; expected one of {', '.join(UNITS)}.")
    if (unit == "window") != (window is not None) or (window is not None and window < 1):
        raise ConfigError(
            f"window is {window!r} with unit {unit!r}; unit 'window' needs one of at least 1, others none."
        )
    for name, value, low, high in (
        ("strength", strength, 0, 1), ("ridge", ridge, 0, np.inf), ("max_weight", max_weight, 1, np.inf),
        ("max_ratio", max_ratio, 1, np.inf), ("min_effective_sample_size", bound, 0, 1),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value!r}; expected {low} to {high}.")


def _check_arrays(tokens: Assignments, given, rows, unit, selected, target) -> None:
    indices = tokens.indices
    if indices.shape[1] == 0:
        raise ValueError("the retain corpus has no valid token; there is nothing to weight.")
    if selected.dtype != bool or selected.shape != target.shape or selected.shape[0] != indices.shape[0]:
        raise ValueError(
            f"selected is {selected.dtype} {selected.shape}, target {target.shape}; expected bool and numbers, both "
            f"[layers, experts], for assignments of {indices.shape[0]} layers."
        )
    if int(indices.max()) >= selected.shape[1] or int(indices.min()) < 0:
        raise ValueError(f"assignments name expert {int(indices.max())}; there are {selected.shape[1]} (from 0).")
    if not (np.isfinite(target).all() and (target >= 0).all() and (target <= 1).all()):
        raise ValueError("target holds a number that is no frequency (NaN, negative, or above 1).")
    if unit != "token" and rows is None and not isinstance(given, Assignments):
        raise ValueError(f"unit {unit!r} needs rows, the row number of each token.")
