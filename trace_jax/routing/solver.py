"""The solver: weights with which features come as close to wanted means as a sample size allows (docs/method.md).

    minimise  1/2 sum_c (f~_c - p_c)^2 + rho D(w)   over weights of mean one, 0 <= w_u <= max_weight,
              with the smallest rho at which the effective sample size (sum w)^2 / (U sum w^2) is still large enough
    weights   w_u = clip(lambda . a_u + nu, 0, max_weight)          D is half the chi-square divergence from uniform
              w_u = min(exp(lambda . a_u + nu), max_weight)         D is the entropy, "kl"
    dual      minimise over (lambda, nu)  mean_u phi(lambda . a_u + nu) - lambda . p - nu + rho/2 |lambda|^2, phi' = w

f~ is the weighted mean of the features a; means count each unit by its base weight. The dual is convex, its gradient
(f~ - p + rho lambda, mean w - 1); the larger rho, the closer the weights are to one. Where rho falls to 0 the match is
exact, or as close as any weights come. Source of "kl" without bounds: entropy balancing, Hainmueller (2012).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy

Matrix = Any  # np.ndarray or scipy.sparse.csr_array, f64
AIM = 1e-11  # largest gradient entry at which Newton stops
ENOUGH = 1e-8  # largest gradient entry that still counts as solved, where rounding ends the descent earlier
MOST_STEPS = 100  # of Newton's method
MOST_PRODUCTS = 12  # of the linear solver, before the Hessian that steers it is made anew
SAMPLE = 65_536  # units whose Hessian steers the linear solver; the equations themselves use all
CHUNK = 8_192  # units of one product on the device
CLOSE = 1e-8  # of the logarithm of an effective sample size
NEAR = 1e-4  # the same where only a place to begin is sought
LOOK = 16_384  # tokens that tell whether patterns repeat
MOST_SECANTS = 6  # of the search for rho from a good guess
STRIDE = float(np.log(8.0))  # of log rho, on the way down


@dataclasses.dataclass(frozen=True)
class Balance:
    """A solution for one rho."""

    multipliers: np.ndarray  # f64 [C], lambda
    intercept: float  # nu
    weights: np.ndarray  # f64 [U], of mean one
    rho: float
    iterations: int  # Newton steps
    gradient_norm: float  # largest entry of the final gradient
    effective_sample_size: float
    missed: float  # |f~ - p|, Euclidean
    elasticity: float = 0.5  # d log effective sample size / d log rho near here, as the search saw it


def weight_of(scores: Any, divergence: str, max_weight: Any, xp: Any = np) -> Any:
    """Weights from scores lambda . a + nu; xp: numpy or jax.numpy."""
    if divergence == "chi2":
        return xp.clip(scores, 0.0, max_weight)
    return xp.exp(xp.minimum(scores, xp.log(max_weight)))


class _Dual:
    """The dual of one problem, and Newton's method for it."""

    def __init__(self, features: Matrix, target: np.ndarray, base: np.ndarray, divergence: str, max_weight: float):
        self.features, self.target = features, target
        self.base, self.divergence, self.max_weight = base / base.sum(), divergence, max_weight
        self.factor: Any = None  # Cholesky factor of a Hessian near here, which steers the linear solver

    def potential(self, scores: np.ndarray, weights: np.ndarray) -> float:
        """mean_u phi(score_u)."""
        if self.divergence == "chi2":  # a square up to the largest weight, then its tangent; 0 below 0
            return float(self.base @ (weights * (scores - weights / 2)))
        above = np.maximum(scores - np.log(self.max_weight), 0.0)
        return float(self.base @ (weights * (1 + above)))

    def curvature(self, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """f64 [U], base weight times phi''."""
        free = weights < self.max_weight
        return self.base * np.where(free, np.where(scores > 0, 1.0, 0.0) if self.divergence == "chi2" else weights, 0.0)

    def solve(self, rho: float, multipliers: np.ndarray, intercept: float) -> Balance:
        """Newton's method with line search from a first guess, in float64."""
        norm, scores = np.inf, self.features @ multipliers + intercept
        weights = weight_of(scores, self.divergence, self.max_weight)
        value = self._value(rho, multipliers, intercept, scores, weights)
        for iteration in range(MOST_STEPS + 1):
            mass = self.base * weights
            mean = self.features.T @ mass
            gradient = np.append(mean - self.target + rho * multipliers, mass.sum() - 1.0)
            norm, before = float(np.abs(gradient).max()), norm
            if norm <= AIM or iteration == MOST_STEPS or (norm <= ENOUGH and norm >= before):
                break  # solved, or the descent is lost in rounding
            step = self._step(self.curvature(scores, weights), gradient, rho)
            along, slope = self.features @ step[:-1] + step[-1], gradient @ step
            for size in 0.5 ** np.arange(40):
                trial = multipliers + size * step[:-1], intercept + size * step[-1], scores + size * along
                of_trial = weight_of(trial[2], self.divergence, self.max_weight)
                new = self._value(rho, *trial, of_trial)
                if new <= value + 1e-4 * size * slope + 1e-14 * max(1.0, abs(value)):
                    (multipliers, intercept, scores), weights, value = trial, of_trial, new
                    break
            else:
                break  # no step is downhill any more
        size, missed = effective_sample_size(weights, self.base), float(np.linalg.norm(mean - self.target))
        return Balance(multipliers, float(intercept), weights, rho, iteration, norm, size, missed)

    def _value(self, rho, multipliers, intercept, scores, weights) -> float:
        penalty = rho / 2 * multipliers @ multipliers
        return self.potential(scores, weights) - float(multipliers @ self.target + intercept - penalty)

    def _step(self, curvature: np.ndarray, gradient: np.ndarray, rho: float) -> np.ndarray:
        """-H^-1 g by conjugate gradients, H = mean phi'' (a, 1) (a, 1)^T + rho I; a Hessian of near here steers."""

        def product(v: np.ndarray) -> np.ndarray:
            along = curvature * (self.features @ v[:-1] + v[-1])
            return np.append(self.features.T @ along + rho * v[:-1], along.sum() + 1e-12 * v[-1])

        operator: Any = functools.partial(scipy.sparse.linalg.LinearOperator, (len(gradient),) * 2, dtype=np.float64)
        rtol = min(0.1, float(np.sqrt(np.abs(gradient).max())))
        for products in (MOST_PRODUCTS, 200):
            if products == 200 or self.factor is None:
                self.factor = _factor(self._hessian(curvature, rho))
            steering = operator(matvec=functools.partial(scipy.linalg.cho_solve, self.factor))
            step, failed = scipy.sparse.linalg.cg(
                operator(matvec=product), -gradient, M=steering, rtol=rtol, maxiter=products
            )
            if not failed:
                break
        return step if step @ gradient < 0 else -steering.matvec(gradient)

    def _hessian(self, curvature: np.ndarray, rho: float) -> np.ndarray:
        """f64 [C + 1, C + 1], from at most `SAMPLE` units with curvature, spread evenly; products on the device."""
        used = np.flatnonzero(curvature)
        used = used[:: -(-len(used) // SAMPLE) or 1]
        scale = curvature.sum() / max(curvature[used].sum(), 1e-300)
        total = np.zeros((len(self.target) + 1,) * 2)
        for start in range(0, len(used), CHUNK):
            part = used[start : start + CHUNK]
            rows = self.features[part]
            chunk = np.ones((CHUNK, len(total)), np.float32)
            chunk[: len(part), :-1] = rows if isinstance(rows, np.ndarray) else rows.toarray()
            weight = np.zeros(CHUNK, np.float32)
            weight[: len(part)] = curvature[part] * scale / self.base.max()
            total += np.asarray(_gram(chunk, weight), np.float64)
        total *= self.base.max()
        diagonal = np.einsum("ii->i", total)
        diagonal += 1e-6 * diagonal + 1e-12
        diagonal[:-1] += rho
        return total


def _factor(hessian: np.ndarray) -> Any:
    """Cholesky's, of float32 products: where rounding made them indefinite, the diagonal grows until they aren't."""
    more = 1e-5 * hessian.diagonal().max()
    while True:
        try:
            return scipy.linalg.cho_factor(hessian)
        except scipy.linalg.LinAlgError:
            hessian, more = hessian + more * np.eye(len(hessian)), 10 * more


@jax.jit
def _gram(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """f32 [C, C], sum_u weight_u a_u a_u^T."""
    return jax.numpy.matmul((rows * weight[:, None]).T, rows, precision=jax.lax.Precision.HIGHEST)


def closest_match(
    features: Matrix,
    target: np.ndarray,
    *,
    base: np.ndarray,
    sizes: Sequence[float],
    divergence: str = "chi2",
    max_weight: float = 50.0,
    close: float = CLOSE,
) -> list[Balance]:
    """The closest match at each effective sample size of `sizes`, which fall; 0 asks for the exact match.

    A solution keeps more than that size where the target is met before, or no weights come closer. features f64 [U, C],
    dense or scipy CSR; target f64 [C]; base f64 [U], base weight of each unit, above 0, of any scale; close: of the
    logarithm of a size, counts as met.
    """
    if max_weight == 1.0:  # leaves one solution
        target = features.T @ (base / base.sum())
    dual = _Dual(features, target, base, divergence, max_weight)
    neutral = np.zeros(len(target)), 1.0 if divergence == "chi2" else 0.0  # all weights one
    moved = features @ (target - features.T @ dual.base)
    spread = float(np.sqrt(dual.base @ (moved - dual.base @ moved) ** 2))  # of weights, times rho, where rho is large
    if not spread > 1e-14:
        return [dual.solve(1.0, *neutral)] * len(sizes)
    guesses, solved = {np.log(spread): neutral}, {}  # by log rho
    coarse: list[Balance | None] = [None] * len(sizes)
    if len(base) > 2 * SAMPLE:  # where to begin is found on every n-th unit
        some = slice(None, None, len(base) // SAMPLE)
        options: dict[str, Any] = {"sizes": sizes, "divergence": divergence, "max_weight": max_weight, "close": NEAR}
        coarse = [*closest_match(features[some], target, base=base[some], **options)]
        guesses |= {np.log(b.rho): (b.multipliers, b.intercept) for b in coarse if b is not None}

    def solve(x: float) -> Balance:
        if x not in solved:
            solved[x] = found = dual.solve(float(np.exp(x)), *guesses[min(guesses, key=lambda y: abs(y - x))])
            guesses[x] = found.multipliers, found.intercept
        return solved[x]

    def excess(x: float, size: float) -> float:
        """log of the effective sample size over what is wanted; 0 within `close`, so that the search ends there."""
        over = float(np.log(solve(x).effective_sample_size / max(size, 1e-300)))
        return over if abs(over) > close else 0.0

    def slope(x: float) -> float:
        """The elasticity at x, by the other solution that is nearest."""
        y = min((y for y in solved if y != x), key=lambda y: abs(y - x), default=x)
        here, there = (np.log(solve(z).effective_sample_size) for z in (x, y))
        return float((here - there) / (x - y)) if x != y else 0.5

    found, x = [], np.log(spread)
    for size, guess in zip(sizes, coarse, strict=True):
        if guess is not None and guess.effective_sample_size < 1.01 * size:
            x, step = np.log(guess.rho), guess.elasticity
            for _ in range(MOST_SECANTS):
                if excess(x, size) == 0:
                    break
                x -= excess(x, size) / max(step, 0.01)
                step = slope(x)
        while excess(x, size) < 0:
            x += STRIDE
        above = x
        while excess(x, size) > 0 and not _settled(solve(x), solved.get(above) if above > x else None):
            above, x = x, x - STRIDE
        if excess(x, size) < 0:
            below, x = x, above
            root: Any = scipy.optimize.brentq(excess, below, above, args=(size,), xtol=1e-12)
            x = root
        found.append(dataclasses.replace(solve(x), elasticity=slope(x)))
    return found


def _settled(balance: Balance, before: Balance | None) -> bool:
    """Whether a smaller rho brings nothing: the target is met, or no weights come closer than those of a larger rho."""
    stalled = before is not None and balance.missed > (1 - 1e-9) * before.missed
    return balance.missed <= 1e-10 or balance.rho <= 1e-12 or stalled


def effective_sample_size(weights: np.ndarray, base: np.ndarray | None = None) -> float:
    """(sum w)^2 / (T sum w^2), in (0, 1]; 1 when all count the same. `base`: how much each entry counts."""
    base = np.ones(weights.shape) if base is None else base
    return float((base * weights).sum() ** 2 / (base.sum() * (base * weights**2).sum()))


def concentrated(scores: np.ndarray, base: np.ndarray, *, size: float, max_weight: float) -> np.ndarray:
    """f64 [U], min(exp(b score + nu), max_weight) of mean one, for weights that nothing is solved for.

    The power b is 1, or the largest that keeps the effective sample size at or above `size`. base f64 [U]: how much
    each entry counts.
    """
    base = base / base.sum()

    def powered(b: float) -> np.ndarray:
        weights, above = np.empty(len(scores)), np.zeros(len(scores), bool)
        while not above.all():  # what is above the largest weight gets that, the rest share what is left
            left, rest = 1.0 - max_weight * base[above].sum(), scores[~above]
            shares = np.exp(b * (rest - rest.max()))
            weights[~above] = shares * left / (base[~above] @ shares)
            if not (more := (weights > max_weight) & ~above).any():
                break
            weights[more], above = max_weight, above | more
        return weights

    def excess(b: float) -> float:
        return effective_sample_size(powered(b), base) - size

    power: Any = 1.0 if excess(1.0) >= 0 else scipy.optimize.brentq(excess, 0.0, 1.0, xtol=1e-12)
    return powered(power)


# --- the units that are weighted, as features


def find_patterns(
    indices: np.ndarray, matched: np.ndarray, units: np.ndarray | None
) -> tuple[Matrix, np.ndarray, np.ndarray, float]:
    """The distinct activation patterns of the units of a corpus of T tokens, for C experts: (features, base, unit,
    share of the tokens that use any of the experts).

    Two units with the same activations always get the same weight, so only distinct patterns are kept, in an order that
    depends on the patterns alone: the solver returns the same bits however the corpus was shuffled, batched or sharded.
    Where most tokens differ (a look at some says so) the tokens stand for themselves.

    indices integer [L, T, K], the chosen experts of every valid token; matched bool [L, E], the columns of the features
    in the order of `np.nonzero`; units integer [T], the row or document of each token, None: each token is one. Returns
    f64 [P, C], 0 or 1 for a token (sparse), a mean over tokens for a row or document (dense); f64 [P], how many tokens
    the pattern stands for (whole numbers: exact sums); and the pattern of each token, integer [T].
    """
    activations = activation_matrix(indices, matched)
    touched = float(np.count_nonzero(np.diff(activations.indptr)) / activations.shape[0])
    # A random number of 64 bits stands for each column; a pattern's key is the sum over its activations, modulo 2^64.
    # Sums have no order, and two of 10^6 different patterns share a key with probability 10^-7.
    numbers = np.random.default_rng(0).integers(0, 2**64, activations.shape[1], np.uint64, endpoint=False)

    def keys(of: Matrix) -> np.ndarray:
        return of.astype(np.uint64) @ numbers

    if units is None:
        tokens = activations.shape[0]
        some = keys(activations[:: tokens // LOOK + 1])
        if tokens > 4 * LOOK and len(np.unique(some)) > 0.9 * len(some):
            return activations, np.ones(tokens), np.arange(tokens), touched
        _, first, unit, counts = np.unique(
            keys(activations), return_index=True, return_inverse=True, return_counts=True
        )
        features = activations[first]
        features.sort_indices()  # so that sums over a pattern don't depend on the order of a token's experts
        return features, counts.astype(np.float64), unit, touched
    _, of_token = np.unique(units, return_inverse=True)
    ones = np.ones(len(of_token))
    members = scipy.sparse.csr_array(
        (ones, (of_token, np.arange(len(of_token)))), (int(of_token.max()) + 1, len(of_token))
    )
    length_key = np.uint64(0x9E3779B97F4A7C15)  # counted once per token, so that a unit's key holds its length
    unit_keys = members.astype(np.uint64) @ (keys(activations) + length_key)
    _, first, pattern = np.unique(unit_keys, return_index=True, return_inverse=True)
    lengths = members @ ones
    features = (members[first] @ activations).toarray() / lengths[first, None]
    return features, np.bincount(pattern, lengths, minlength=len(first)), pattern[of_token], touched


def activation_matrix(indices: np.ndarray, matched: np.ndarray, chunk: int = 4_096) -> Matrix:
    """a_c(t) as a sparse f64 [T, C]: 1 where the expert of column c is among the token's top K."""
    column_of = np.full(matched.shape, -1, np.int16 if matched.size < 2**15 else np.int32)
    column_of[matched] = np.arange(matched.sum())
    columns, per_token = [], []
    for start in range(0, indices.shape[1], chunk):
        pairs = zip(column_of, indices[:, start : start + chunk], strict=True)
        table = np.concatenate([of_layer[chosen] for of_layer, chosen in pairs], axis=1)  # [chunk, L K]
        columns.append(np.extract(table >= 0, table).astype(np.int32))
        per_token.append(np.count_nonzero(table >= 0, axis=1))
    column = np.concatenate(columns)
    ends = np.concatenate([[0], np.cumsum(np.concatenate(per_token))]).astype(np.int32 if len(column) < 2**31 else int)
    return scipy.sparse.csr_array((np.ones(len(column)), column, ends), (indices.shape[1], int(matched.sum())))


def reachable(features: Matrix, matched: np.ndarray, moment: np.ndarray, goal: np.ndarray, top_k: int) -> np.ndarray:
    """f64 [C], the goal without what no weights can change, because it is the same in every unit.

    That is the mean of a feature that never varies (an expert that is always on), and the sum over a layer whose every
    activation is matched: what is asked of it too much or too little is spread evenly over its experts.
    """
    fixed = moment == 1.0
    if isinstance(features, np.ndarray) and len(moment):
        fixed = np.ptp(features, axis=0) == 0
    goal, layer = np.where(fixed, moment, goal), np.nonzero(matched)[0]
    for number in np.unique(layer):
        free = (layer == number) & ~fixed
        if free.any() and np.isclose(moment[layer == number].sum(), top_k, rtol=1e-12, atol=0.0):
            goal[free] -= (goal - moment)[free].mean()
    return goal
