"""Which experts are forget-critical: a set C of (layer, expert), from the statistics of both corpora."""

from typing import Any

import numpy as np

from trace_jax.config import ConfigError, resolve
from trace_jax.routing import config as rules
from trace_jax.routing.config import SelectionRule
from trace_jax.routing.statistics import ExpertStatistics

EPSILON = 1e-12  # in the ratio rule, so that an expert the retain corpus never uses has a ratio


def select_experts(
    forget: ExpertStatistics,
    retain: ExpertStatistics,
    *,
    rule: str | SelectionRule = "ratio",
    seed: int = 0,
    **settings: Any,
) -> np.ndarray:
    """bool [L, E], the selected experts.

    rule: a `SelectionRule`, or the name of one in trace_jax/routing/config.py, and its settings (`tau=1.5`).
    seed: of the rule "random".

    `scope`: "layer" takes `top` experts in each layer, "model" takes `top` over all layers. Ties go to the lower layer,
    then the lower expert.

    Raises:
      ConfigError: an unknown rule or setting of it, or `top` beyond the number of experts.
      ValueError: statistics of different models.
    """
    if isinstance(rule, str):
        if rule not in SelectionRule.kinds:
            raise ConfigError(f"rule is {rule!r}; expected one of {', '.join(SelectionRule.kinds)}.")
        rule = resolve(SelectionRule.kinds[rule], settings, path=rule)
    if forget.counts.shape != retain.counts.shape or forget.top_k != retain.top_k:
        raise ValueError(
            f"forget statistics are {forget.counts.shape} with top {forget.top_k}, retain statistics "
            f"{retain.counts.shape} with top {retain.top_k}; both must come from the same model."
        )
    f_forget, f_retain = forget.frequency, retain.frequency
    match rule:
        case rules.Ratio(kappa, tau):
            uniform = forget.top_k / f_forget.shape[1]
            return (f_forget >= kappa * uniform) & (f_forget / (f_retain + EPSILON) >= tau)
        case rules.LogOdds(z):
            return z_scores(forget, retain) > z
        case rules.Cumulative(mass):
            return fewest_covering(f_forget, mass * forget.top_k) & (f_forget > f_retain)
        case rules.Difference(top, scope):
            return highest(f_forget - f_retain, top, scope)
        case rules.Affinity(top, scope):
            return highest(forget.gate_mass / forget.tokens, top, scope)
        case rules.Random(top, scope):
            return highest(np.random.default_rng(seed).random(f_forget.shape), top, scope)
    return np.ones(f_forget.shape, bool)


def highest(score: np.ndarray, top: int, scope: str = "layer") -> np.ndarray:
    """bool [L, E]: the `top` highest scores of each layer, or of the model (scope "model")."""
    groups = score if scope == "layer" else score.reshape(1, -1)
    if not 1 <= top <= groups.shape[1]:
        raise ConfigError(f"top is {top}; expected 1 to {groups.shape[1]}, the experts there are per {scope}.")
    order = np.argsort(-groups, axis=1, kind="stable")[:, :top]
    chosen = np.zeros(groups.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen.reshape(score.shape)


def fewest_covering(frequency: np.ndarray, total: float) -> np.ndarray:
    """bool [L, E]: the fewest experts of each layer, by falling frequency, whose frequencies sum to `total`."""
    order = np.argsort(-frequency, axis=1, kind="stable")
    falling = np.take_along_axis(frequency, order, axis=1)
    before = np.cumsum(falling, axis=1) - falling  # the sum of those ranked higher
    chosen = np.zeros(frequency.shape, bool)
    np.put_along_axis(chosen, order, before < total - 1e-12, axis=1)
    return chosen


def z_scores(forget: ExpertStatistics, retain: ExpertStatistics) -> np.ndarray:
    """f64 [L, E]: (f^F - f^R) over its standard error under equal frequencies (pooled); 0 where it has none."""
    pooled = (forget.counts + retain.counts) / (forget.tokens + retain.tokens)
    error = np.sqrt(pooled * (1 - pooled) * (1 / forget.tokens + 1 / retain.tokens))
    difference = forget.frequency - retain.frequency
    return np.divide(difference, error, out=np.zeros_like(error), where=error > 0)


def random_like(selected: np.ndarray, *, seed: int) -> np.ndarray:
    """bool [L, E]: in every layer as many experts as `selected` has there, drawn at random: a control."""
    rank = np.argsort(np.argsort(np.random.default_rng(seed).random(selected.shape), axis=1), axis=1)
    return rank < selected.sum(axis=1, keepdims=True)
