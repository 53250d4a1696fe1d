"""How retain tokens are weighted: which experts are selected, what is matched, where the weights act (docs/method.md).

A weighting and a selection rule are named and carry their own settings: `{"name": "matching", "unit": "row", "rule":
{"name": "difference", "top": 4}}`.
"""

from typing import Any, ClassVar

import numpy as np

from trace_jax.config import ConfigError, Section, Variant, option, resolve
from trace_jax.routing.statistics import ExpertStatistics


class SelectionRule(Variant):
    """Which experts are forget-critical; f^F and f^R are their forget and retain frequencies."""


class Ratio(SelectionRule, name="ratio"):
    """f^F >= kappa * K/E and f^F / (f^R + eps) >= tau."""

    kappa: float = option(0.5, help="least forget frequency, in units of K/E", minimum=0.0)
    tau: float = option(3.0, help="least ratio of forget to retain frequency", minimum=0.0)


class _Top(SelectionRule):
    top: int = option(4, help="experts selected, per `scope`", minimum=1)
    scope: str = option("layer", help="`top` experts of each layer, or of the model", choices=("layer", "model"))


class Difference(_Top, name="difference"):
    """The `top` experts by f^F - f^R."""


class LogOdds(SelectionRule, name="log_odds"):
    """Two-proportion z-score of f^F against f^R above `z`, so that a small corpus can't select by noise."""

    z: float = option(5.0, help="least two-proportion z-score", minimum=0.0)


class Cumulative(SelectionRule, name="cumulative"):
    """The fewest experts of a layer whose f^F sums to mass * K (ESFT, 2407.01906), of those the ones with f^F > f^R."""

    critical: ClassVar[bool] = True  # the last condition, which ESFT has not
    mass: float = option(0.5, help="share p of the forget activations to cover", minimum=0.0, maximum=1.0)


class Affinity(_Top, name="affinity"):
    """The `top` experts by mean gate weight in a forget document, and over these (SEUF, 2411.18797, eq. 2)."""


class Sensitivity(_Top, name="sensitivity"):
    """The `top` experts by mean |d NLL / d gate| on forget data (`statistics.expert_sensitivity`)."""


class Random(_Top, name="random"):
    """`top` experts drawn with the seed: a control."""


class All(SelectionRule, name="all"):
    """Every expert."""


def select_experts(
    forget: ExpertStatistics,
    retain: ExpertStatistics,
    *,
    rule: str | SelectionRule = "difference",
    seed: int = 0,
    sensitivity: np.ndarray | None = None,
    **settings: Any,
) -> np.ndarray:
    """bool [L, E], the selected experts. Ties go to the lower layer, then the lower expert.

    rule: a `SelectionRule`, or the name of one in trace_jax/routing/config.py and its settings (`tau=1.5`).
    seed: of the rule "random".  sensitivity: of the rule of that name, `expert_sensitivity` of forget rows.

    Raises:
      ConfigError: an unknown rule or setting of it, or `top` beyond the number of experts.
      ValueError: statistics of different models, or no `sensitivity` for its rule.

    Example:
      >>> of_forget, of_retain = tj.expert_statistics(model, forget), tj.expert_statistics(model, retain)
      >>> selected = tj.select_experts(of_forget, of_retain, rule="difference", top=2)
      >>> selected.sum(axis=1)  # of each layer
      array([2, 2])
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
        case Ratio(kappa, tau):  # an expert that the retain corpus never uses has a ratio, too
            uniform = forget.top_k / f_forget.shape[1]
            return (f_forget >= kappa * uniform) & (f_forget / (f_retain + 1e-12) >= tau)
        case LogOdds(z):
            return z_scores(forget, retain) > z
        case Cumulative(mass):
            falling = -np.sort(-f_forget, axis=1)
            higher = np.take_along_axis(np.cumsum(falling, axis=1) - falling, ranks(f_forget), axis=1)
            prefix = higher < mass * forget.top_k - 1e-12
            return prefix & (f_forget > f_retain) if rule.critical else prefix
        case Difference(top, scope):
            return highest(f_forget - f_retain, top, scope)
        case Affinity(top, scope):
            if np.isnan(forget.affinity).any():
                raise ValueError("rule 'affinity' needs gate weights; these forget statistics were taken without any.")
            return highest(forget.affinity, top, scope)
        case Sensitivity(top, scope):
            if sensitivity is None:
                raise ValueError("rule 'sensitivity' needs sensitivity = expert_sensitivity(model, forget batches).")
            return highest(sensitivity, top, scope)
        case Random(top, scope):
            return highest(np.random.default_rng(seed).random(f_forget.shape), top, scope)
    return np.ones(f_forget.shape, bool)


def ranks(score: np.ndarray) -> np.ndarray:
    """i64 [L, E]: the place of each expert in its layer by falling score, from 0; of equal ones the lower first."""
    return np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)


def highest(score: np.ndarray, top: int, scope: str) -> np.ndarray:
    """bool [L, E]: the `top` highest scores of each layer, or of the model."""
    groups = score if scope == "layer" else score.reshape(1, -1)
    if top > groups.shape[1]:
        raise ConfigError(f"top is {top}; expected 1 to {groups.shape[1]}, the experts there are per {scope}.")
    return (ranks(groups) < top).reshape(score.shape)


def z_scores(forget: ExpertStatistics, retain: ExpertStatistics) -> np.ndarray:
    """f64 [L, E]: (f^F - f^R) over its standard error under equal frequencies (pooled); 0 where it has none."""
    pooled = (forget.counts + retain.counts) / (forget.tokens + retain.tokens)
    error = np.sqrt(pooled * (1 - pooled) * (1 / forget.tokens + 1 / retain.tokens))
    difference = forget.frequency - retain.frequency
    return np.divide(difference, error, out=np.zeros_like(error), where=error > 0)


def random_like(selected: np.ndarray, *, seed: int) -> np.ndarray:
    """bool [L, E]: in every layer as many experts as `selected` has there, drawn at random from the others: a control.

    Where the others are too few, all of them, and selected ones for the rest.
    """
    others_first = np.random.default_rng(seed).random(selected.shape) + selected  # selected ones are 1 and more
    return least_like(selected, others_first)


def least_like(selected: np.ndarray, criticality: np.ndarray) -> np.ndarray:
    """bool [L, E]: in every layer as many experts as `selected` has there, those of lowest criticality: a control."""
    return ranks(-criticality) < selected.sum(axis=1, keepdims=True)


# --- what is matched, and where the weights act


class RoutingSource(Variant):
    """Whose routing gives a token its weight."""


class Offline(RoutingSource, name="offline"):
    """The original model's."""


class Online(RoutingSource, name="online"):
    """The current model's, with the multipliers solved under the original one."""


class Recalibrated(RoutingSource, name="recalibrated"):
    """The current model's, with everything solved anew now and then."""

    every: int = option(20, help="steps between recalibrations", minimum=1)


class Weighting(Variant):
    """How retain tokens are weighted."""


class Uniform(Weighting, name="uniform"):
    """Every token counts the same."""


class Weighted(Weighting):
    """Weightings that concentrate: all keep the same sample, so that they can be compared."""

    min_effective_sample_size: float = option(
        0.2, help="share of the retain tokens that is to remain, (sum w)^2 / (T sum w^2); 0 = no bound",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip
    max_weight: float = option(50.0, help="largest weight (1 is uniform)", minimum=1.0)
    apply: str = option(
        "both", help="whether losses are weighted, rows drawn by them, or both", choices=("weights", "sampling", "both")
    )


class _Selecting(Weighted):
    rule: SelectionRule = option("difference", help="which experts are forget-critical")
    routing: RoutingSource = option("offline", help="whose routing gives a token its weight")
    max_ratio: float = option(100.0, help="largest forget/retain frequency ratio asked for, r_max", minimum=1.0)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.routing, Online) and isinstance(self, (RatioWeights, Permuted)):
            raise ConfigError(
                f"routing is 'online' and the weighting {self.name!r}, which has no multipliers to weigh a token by "
                "the experts it uses now; choose 'matching' or 'random_experts', or the routing 'recalibrated'."
            )
        if isinstance(self.routing, Online) and self.apply == "sampling":
            raise ConfigError(
                "routing is 'online' and apply 'sampling': rows are drawn before the current model sees them, and "
                "their losses are not weighted; set apply to 'both' or 'weights', or routing to 'recalibrated'."
            )


class Matching(_Selecting, name="matching"):
    """The calibration: the selected experts are used as on forget data, as nearly as the sample allows."""

    unit: str = option("token", help="what shares one weight", choices=("token", "row", "document"))
    divergence: str = option(
        "chi2", help="distance from uniform weights that is kept small: chi-square, or entropy", choices=("chi2", "kl")
    )


class Permuted(Matching, name="permuted"):
    """Control: the same weights dealt out at random."""


class RandomExperts(Matching, name="random_experts"):
    """Control: the calibration of as many experts per layer, drawn at random."""


class LeastExperts(Matching, name="least_experts"):
    """Control: the calibration of as many experts per layer, those with the lowest f^F - f^R."""


class RatioWeights(_Selecting, name="ratio"):
    """Rival: the mean frequency ratio of a token's selected experts."""


class NGram(Weighted, name="ngram"):
    """Rival: density ratio of rows under hashed uni- and bigrams (DSIR, 2302.03169)."""


class Similarity(Weighted, name="similarity"):
    """Rival: rows whose mean hidden states are nearest to those of forget rows (OpenReview EyXBv291ST)."""


class Hidden(Weighted, name="hidden"):
    """Rival: the same calibration of rows on mean hidden states in place of experts."""


class Gradient(Weighted, name="gradient"):
    """Rival: rows whose gradients are large where those of the forget set are. Two gradients are held in memory."""


class Loss(Weighted, name="loss"):
    """Rival: tokens weighted by their loss."""


class Domain(Weighted, name="domain"):
    """Upper reference: told which rows are near the forget domain, which get as much as the sample allows."""


class CalibrationConfig(Section):
    """Settings of selection and calibration. A weighting is given by name, or as a mapping with its settings.

    Example:
      >>> rule = {"name": "difference", "top": 2}
      >>> config = tj.CalibrationConfig(weighting={"name": "matching", "unit": "row", "rule": rule})
      >>> config.weighting.unit, config.weighting.min_effective_sample_size
      ('row', 0.2)
    """

    weighting: Weighting = option("uniform", help="how retain tokens are weighted")
    seed: int = option(0, help="seed of random experts and of the permutation", minimum=0)

    @property
    def recalibrates_every(self) -> int | None:
        """Steps after which weights are solved anew; None: never."""
        routing = getattr(self.weighting, "routing", None)
        return routing.every if isinstance(routing, Recalibrated) else None
