"""The solver: the least change of weights that gives features a wanted mean (entropy balancing, Hainmueller 2012).

    w_u proportional to exp(lambda . a_u),   mean w = 1
    lambda = argmin  log mean_u exp(lambda . a_u) - lambda . p + (rho/2) |lambda|^2

Means count each unit by its base weight. The problem is convex; its gradient is f~ - p + rho lambda, with f~ the
weighted mean of the features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.linalg
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, cg

from trace_jax.routing.features import Matrix

AIM = 1e-10  # largest gradient entry at which Newton stops
ENOUGH = 1e-8  # largest gradient entry that still counts as solved, where rounding ends the descent earlier
SAMPLE = 16_384  # patterns whose Hessian steers the linear solver; the equations themselves use all


@dataclasses.dataclass(frozen=True)
class Balance:
    """A solution.

    Attributes:
      multipliers: f64 [C], lambda.  log_normalizer: log mean_u exp(lambda . a_u).
      weights: f64 [U], exp(lambda . a_u - log_normalizer), of mean one.
      iterations: Newton steps.  gradient_norm: largest entry of the final gradient.
      converged: the gradient vanished.  infeasible: it was proved that no weights at all have the wanted means.
    """

    multipliers: np.ndarray
    log_normalizer: float
    weights: np.ndarray
    iterations: int
    gradient_norm: float
    converged: bool
    infeasible: bool


def entropy_balance(
    features: Matrix,
    target: np.ndarray,
    *,
    base: np.ndarray | None = None,
    ridge: float = 0.0,
    constant: np.ndarray | None = None,
    start: np.ndarray | None = None,
    max_iterations: int = 100,
) -> Balance:
    """Solves for the multipliers by Newton's method with line search, in float64.

    Args:
      features: f64 [U, C], dense or scipy CSR.
      target: f64 [C], the wanted weighted means p.
      base: f64 [U], base weight of each unit, above 0, of any scale (default: equal).
      ridge: rho; 0 meets a feasible target exactly.
      constant: f64 [C, n], orthonormal directions in which every unit has the same feature value. No weights can
        change the mean there, so the multipliers are kept out of them (they would change no weight either).
      start: f64 [C], first guess of the multipliers.

    Source: Hainmueller (2012), Entropy balancing for causal effects, Political Analysis 20(1), eq. 8.
    """
    units, columns = features.shape
    base = np.ones(units) if base is None else base
    total = base.sum()
    constant = np.zeros((columns, 0)) if constant is None else constant
    multipliers = np.zeros(columns) if start is None else start

    def dual(multipliers: np.ndarray, scores: np.ndarray) -> tuple[float, float, np.ndarray]:
        top = scores.max()
        mass = base * np.exp(scores - top)
        log_normalizer = top + np.log(mass.sum() / total)
        value = log_normalizer - multipliers @ target + 0.5 * ridge * multipliers @ multipliers
        return float(value), float(log_normalizer), mass / mass.sum()

    variance = np.maximum(_squares(features).T @ base / total - (features.T @ base / total) ** 2, 0.0)

    # Any weights of mean one have an entropy that bounds the dual of a feasible target from below.
    lowest = np.log(base.min() / total) - 1e-6
    norm, scores = np.inf, features @ multipliers
    value, log_normalizer, mass = dual(multipliers, scores)
    for iteration in range(max_iterations + 1):
        mean = features.T @ mass
        gradient = mean - target + ridge * multipliers
        gradient -= constant @ (constant.T @ gradient)
        norm, before = float(np.abs(gradient).max(initial=0.0)), norm
        if norm <= AIM or iteration == max_iterations or (ridge == 0 and value < lowest):
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
    infeasible = bool(value < lowest)
    return Balance(multipliers, log_normalizer, weights, iteration, norm, norm <= ENOUGH, infeasible)


def _newton_step(
    features: Matrix, mass: np.ndarray, mean: np.ndarray, gradient: np.ndarray, ridge: float, variance: np.ndarray
) -> np.ndarray:
    """-H^-1 g with H = Cov_mass(features) + rho I, by conjugate gradients.

    The preconditioner is the inverse Hessian of a sample of the patterns, drawn evenly by mass (no chance is involved).
    With few patterns the sample is all of them, and one or two iterations give the exact Newton step. `variance` f64
    [C], of the unweighted features, keeps both matrices positive where the sample or the weights have nothing.
    """
    columns = features.shape[1]
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

    step, _ = cg(
        _operator(columns, curvature),
        -gradient,
        M=_operator(columns, lambda v: scipy.linalg.cho_solve(factor, v)),
        rtol=min(0.1, float(np.sqrt(np.abs(gradient).max()))),
        maxiter=200,
    )
    return step if step @ gradient < 0 else -scipy.linalg.cho_solve(factor, gradient)


def _squares(features: Matrix) -> Matrix:
    if isinstance(features, np.ndarray):
        return features**2
    return csr_array((features.data**2, features.indices, features.indptr), features.shape)


def _operator(size: int, apply: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
    return LinearOperator((size, size), matvec=apply, dtype=np.float64)  # pyright: ignore[reportCallIssue]
