"""The solver: the least change of weights that gives features a wanted mean (entropy balancing, Hainmueller 2012).

    w_u proportional to exp(lambda . a_u),   mean w = 1
    lambda = argmin  log mean_u exp(lambda . a_u) - lambda . p + (rho/2) |lambda|^2

Means count each unit by its base weight. The problem is convex; its gradient is f~ - p + rho lambda, with f~ the
weighted mean of the features.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, cg

from trace_jax.routing.config import Matching

Matrix = Any  # np.ndarray or scipy.sparse.csr_array, f64
AIM = 1e-10  # largest gradient entry at which Newton stops
ENOUGH = 1e-8  # largest gradient entry that still counts as solved, where rounding ends the descent earlier
MOST_STEPS = 100  # of Newton's method
SAMPLE = 16_384  # patterns whose Hessian steers the linear solver; the equations themselves use all


@dataclasses.dataclass(frozen=True)
class Balance:
    """A solution."""

    multipliers: np.ndarray  # f64 [C], lambda
    log_normalizer: float  # log mean_u exp(lambda . a_u)
    weights: np.ndarray  # f64 [U], exp(lambda . a_u - log_normalizer), of mean one
    ridge: float  # rho
    iterations: int  # Newton steps
    gradient_norm: float  # largest entry of the final gradient
    infeasible: bool  # it was proved that no weights at all have the wanted means

    @property
    def converged(self) -> bool:
        """Whether the gradient vanished."""
        return self.gradient_norm <= ENOUGH


def entropy_balance(
    features: Matrix,
    target: np.ndarray,
    *,
    base: np.ndarray,
    ridge: float = 0.0,
    constant: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Balance:
    """Solves for the multipliers by Newton's method with line search, in float64.

    Args:
      features: f64 [U, C], dense or scipy CSR.
      target: f64 [C], the wanted weighted means p.
      base: f64 [U], base weight of each unit, above 0, of any scale.
      ridge: rho; 0 meets a feasible target exactly.
      constant: f64 [C, n], orthonormal directions in which every unit has the same feature value. No weights can
        change the mean there, so the multipliers are kept out of them (they would change no weight either).
      start: f64 [C], first guess of the multipliers.

    Source: Hainmueller (2012), Entropy balancing for causal effects, Political Analysis 20(1), eq. 8.
    """
    total, columns = base.sum(), len(target)
    constant = np.zeros((columns, 0)) if constant is None else constant
    multipliers = np.zeros(columns) if start is None else start

    def dual(multipliers: np.ndarray, scores: np.ndarray) -> tuple[float, float, np.ndarray]:
        top = scores.max()
        mass = base * np.exp(scores - top)
        log_normalizer = top + np.log(mass.sum() / total)
        value = log_normalizer - multipliers @ target + 0.5 * ridge * multipliers @ multipliers
        return float(value), float(log_normalizer), mass / mass.sum()

    variance = np.maximum((features**2).T @ base / total - (features.T @ base / total) ** 2, 0.0)

    # Any weights of mean one have an entropy that bounds the dual of a feasible target from below.
    lowest = np.log(base.min() / total) - 1e-6
    norm, scores = np.inf, features @ multipliers
    value, log_normalizer, mass = dual(multipliers, scores)
    for iteration in range(MOST_STEPS + 1):
        mean = features.T @ mass
        gradient = mean - target + ridge * multipliers
        gradient -= constant @ (constant.T @ gradient)
        norm, before = float(np.abs(gradient).max(initial=0.0)), norm
        if norm <= AIM or iteration == MOST_STEPS or (ridge == 0 and value < lowest):
            break
        if norm <= ENOUGH and norm >= before:
            break  # the descent is lost in rounding
        step = _newton_step(features, mass, mean, gradient, ridge, variance)
        step -= constant @ (constant.T @ step)
        along, slope = features @ step, gradient @ step
        size = 1.0
        while size > 1e-12:
            new = dual(multipliers + size * step, scores + size * along)
            if new[0] <= value + 1e-4 * size * slope + 1e-14 * max(1.0, abs(value)):
                break
            size /= 2
        if size <= 1e-12:
            break
        multipliers, scores = multipliers + size * step, scores + size * along
        value, log_normalizer, mass = new
    weights = np.exp(scores - log_normalizer)
    return Balance(multipliers, log_normalizer, weights, ridge, iteration, norm, bool(value < lowest))


def _newton_step(
    features: Matrix, mass: np.ndarray, mean: np.ndarray, gradient: np.ndarray, ridge: float, variance: np.ndarray
) -> np.ndarray:
    """-H^-1 g with H = Cov_mass(features) + rho I, by conjugate gradients.

    The preconditioner is the inverse Hessian of a sample of the patterns, drawn evenly by mass (no chance is involved).
    With few patterns the sample is all of them, and one or two iterations give the exact Newton step. `variance` f64
    [C], of the unweighted features, keeps both matrices positive where the sample or the weights have nothing.
    """
    sample, sample_mass, jitter = features, mass, 1e-9
    if len(mass) > SAMPLE:  # a pattern is drawn as often as its mass says
        running = np.cumsum(mass)
        sample = features[np.searchsorted(running, (np.arange(SAMPLE) + 0.5) / SAMPLE * running[-1])]
        sample_mass, jitter = np.full(SAMPLE, 1 / SAMPLE), 1e-2
    sample = sample if isinstance(sample, np.ndarray) else sample.toarray()
    sample = sample - sample_mass @ sample
    approximate = sample.T @ (sample * sample_mass[:, None])
    floor = ridge + 1e-12 * variance.max(initial=0.0) + 1e-300  # defined also where the features do not vary
    approximate += np.diag(floor + jitter * variance)
    factor = scipy.linalg.cho_factor(approximate)

    def curvature(v: np.ndarray) -> np.ndarray:
        return features.T @ (mass * (features @ v - mean @ v)) + floor * v

    operator: Any = functools.partial(LinearOperator, features.shape[1:] * 2, dtype=np.float64)
    step, _ = cg(
        operator(matvec=curvature),
        -gradient,
        M=operator(matvec=lambda v: scipy.linalg.cho_solve(factor, v)),
        rtol=min(0.1, float(np.sqrt(np.abs(gradient).max()))),
        maxiter=200,
    )
    return step if step @ gradient < 0 else -scipy.linalg.cho_solve(factor, gradient)


# --- clipped weights, as strong as the sample size allows


def strongest_balance(
    features: Matrix,
    moment: np.ndarray,
    goal: np.ndarray,
    *,
    base: np.ndarray,
    settings: Matching,
    constant: np.ndarray | None = None,
) -> tuple[float, Balance]:
    """Moves the mean of the features from `moment` f64 [C] towards `goal`, by as much of the way as is allowed.

    That is the largest strength up to `settings.strength` whose effective sample size, after clipping, is at least the
    bound, found by bisection to 0.001 of it; each solve starts from the multipliers of the weaker one. Where the ridge
    asked for is 0 and no weights meet the target, it is 0.001. base f64 [U], `constant`: as in `entropy_balance`.
    Returns that strength, and its solution before clipping.
    """
    strength = settings.strength

    def solve(s: float, start: np.ndarray | None = None) -> Balance:
        problem: dict[str, Any] = {"target": moment + s * (goal - moment), "base": base, "constant": constant}
        balance = entropy_balance(features, **problem, ridge=settings.ridge, start=start)
        if settings.ridge == 0 and not balance.converged:
            balance = entropy_balance(features, **problem, ridge=1e-3)
        return balance

    def enough(balance: Balance) -> bool:
        weights, _ = clipped_to_mean_one(balance.weights, settings.max_weight, base)
        return effective_sample_size(weights, base) >= settings.min_effective_sample_size

    if enough(best := solve(strength)):
        return strength, best
    low, high, best = 0.0, strength, solve(0.0)
    while high - low > 1e-3 * strength:
        middle = (low + high) / 2
        if enough(balance := solve(middle, best.multipliers)):
            low, best = middle, balance
        else:
            high = middle
    return low, best


def clipped_to_mean_one(
    weights: np.ndarray, max_weight: float, base: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """(min(weights, max_weight) * scale, scale) with mean one. `base`: how much each entry counts."""
    base = np.ones(weights.shape) if base is None else base
    clipped = np.minimum(weights, max_weight)
    mean = float((base * clipped).sum() / base.sum())
    return clipped / mean, 1.0 / mean


def effective_sample_size(weights: np.ndarray, base: np.ndarray | None = None) -> float:
    """(sum w)^2 / (T sum w^2), in (0, 1]; 1 when all count the same. `base`: how much each entry counts."""
    base = np.ones(weights.shape) if base is None else base
    return float((base * weights).sum() ** 2 / (base.sum() * (base * weights**2).sum()))


# --- the units that are weighted, as features


def find_patterns(indices: np.ndarray, matched: np.ndarray, unit: str, rows: np.ndarray) -> tuple[Matrix, np.ndarray]:
    """The P distinct activation patterns of the units ("token" or "row") of a corpus of T tokens, for C experts.

    Two units with the same activations always get the same weight, so only distinct patterns are kept, in an order that
    depends on the patterns alone. The solver therefore returns bit for bit the same multipliers however the corpus was
    shuffled, batched or sharded.

    indices integer [L, T, K], the chosen experts of every valid token, and rows [T], its row; matched bool [L, E], the
    columns of the features, in the order of `np.nonzero`. Returns features f64 [P, C], 0 or 1 for a token (sparse), a
    mean over tokens for a row (dense); and f64 [P], how many tokens the pattern stands for (whole numbers: exact sums).
    """
    activations = activation_matrix(indices, matched)
    # A random number of 64 bits stands for each column; a pattern's key is the sum over its activations, modulo 2^64.
    # Sums have no order, and two of 10^6 different patterns share a key with probability 10^-7.
    numbers = np.random.default_rng(0).integers(0, 2**64, activations.shape[1], np.uint64, endpoint=False)
    key = activations.astype(np.uint64) @ numbers  # [T]
    if unit == "token":
        _, first, tokens = np.unique(key, return_index=True, return_counts=True)
        features = activations[first]
        features.sort_indices()  # so that sums over a pattern don't depend on the order of a token's experts
        return features, tokens.astype(np.float64)
    members, _ = row_members(rows)
    length_key = np.uint64(0x9E3779B97F4A7C15)  # counted once per token, so that a row's key holds its length
    row_keys = members.astype(np.uint64) @ (key + length_key)
    _, first, of_row = np.unique(row_keys, return_index=True, return_inverse=True)
    lengths = members @ np.ones(len(key))
    features = (members[first] @ activations).toarray() / lengths[first, None]
    return features, np.bincount(of_row, lengths, minlength=len(first))


def activation_matrix(indices: np.ndarray, matched: np.ndarray, chunk: int = 65_536) -> Matrix:
    """a_c(t) as a sparse f64 [T, C]: 1 where the expert of column c is among the token's top K."""
    column_of = np.full(matched.shape, -1, np.int32)
    column_of[matched] = np.arange(matched.sum())
    columns, per_token = [], []
    for start in range(0, indices.shape[1], chunk):
        pairs = zip(column_of, indices[:, start : start + chunk], strict=True)
        table = np.concatenate([of_layer[chosen] for of_layer, chosen in pairs], axis=1)  # [chunk, L K]
        columns.append(table[table >= 0])
        per_token.append((table >= 0).sum(axis=1))
    column = np.concatenate(columns)
    ends = np.concatenate([[0], np.cumsum(np.concatenate(per_token))]).astype(np.int32 if len(column) < 2**31 else int)
    return csr_array((np.ones(len(column)), column, ends), (indices.shape[1], int(matched.sum())))


def row_members(rows: np.ndarray) -> tuple[Matrix, np.ndarray]:
    """(0/1 matrix [rows, T], the row number of each token from 0)."""
    _, row = np.unique(rows, return_inverse=True)
    return csr_array((np.ones(len(rows)), (row, np.arange(len(rows)))), (int(row.max()) + 1, len(rows))), row


def constant_directions(features: Matrix, matched: np.ndarray, moment: np.ndarray, top_k: int) -> np.ndarray:
    """f64 [C, n], orthonormal: what no weights can change, because it is the same in every unit.

    That is an expert that is always on, and the sum over a layer whose every activation is matched.
    """
    fixed = moment == 1.0
    if isinstance(features, np.ndarray) and len(moment):
        fixed = np.ptp(features, axis=0) == 0
    directions, layer = list(np.eye(len(moment))[fixed]), np.nonzero(matched)[0]
    for number in np.unique(layer):
        inside = layer == number
        free = inside & ~fixed
        if free.any() and np.isclose(moment[inside].sum(), top_k, rtol=1e-12, atol=0.0):
            directions.append(free / np.sqrt(free.sum()))
    return np.stack(directions, axis=1) if directions else np.zeros((len(moment), 0))
