"""How retain tokens are weighted: which experts are selected, what is matched, where the weights act (docs/method.md).

A weighting and a selection rule are named and carry their own settings: `{"name": "entropy", "unit": "row", "rule":
{"name": "difference", "top": 4}}`.
"""

from trace_jax.config import ConfigError, Section, Variant, option


class SelectionRule(Variant):
    """Which experts are forget-critical; f^F and f^R are their forget and retain frequencies."""


class Ratio(SelectionRule, name="ratio"):
    """f^F >= kappa * K/E and f^F / (f^R + eps) >= tau."""

    kappa: float = option(0.5, help="least forget frequency, in units of K/E", minimum=0.0)
    tau: float = option(1.2, help="least ratio of forget to retain frequency", minimum=0.0)


class _Top(SelectionRule):
    top: int = option(4, help="experts selected, per `scope`", minimum=1)
    scope: str = option(
        "layer", help="whether `top` experts are taken in each layer or over the model", choices=("layer", "model")
    )


class Difference(_Top, name="difference"):
    """The `top` experts by f^F - f^R."""


class LogOdds(SelectionRule, name="log_odds"):
    """Two-proportion z-score of f^F against f^R above `z`, so that a small corpus can't select by noise."""

    z: float = option(5.0, help="least two-proportion z-score", minimum=0.0)


class Cumulative(SelectionRule, name="cumulative"):
    """The fewest experts of a layer whose f^F sums to mass * K (ESFT, 2407.01906), of those the ones with f^F > f^R."""

    mass: float = option(0.5, help="share p of the forget activations to cover", minimum=0.0, maximum=1.0)


class Affinity(_Top, name="affinity"):
    """The `top` experts by mean gate score on forget data (SEUF, 2411.18797)."""


class Random(_Top, name="random"):
    """`top` experts drawn with the seed: a control."""


class All(SelectionRule, name="all"):
    """Every expert."""


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
    max_weight: float = option(50.0, help="largest weight before renormalisation (1 is uniform)", minimum=1.0)
    apply: str = option(
        "both",
        help="where the weights act: on the loss, on which rows are drawn, or both",
        choices=("weights", "sampling", "both"),
    )


class _Bounded(Weighted):
    min_effective_sample_size: float = option(
        0.0,
        help="least effective sample size as a share of the tokens; the strength is lowered to keep it",
        minimum=0.0,
        maximum=1.0,
    )


class Matching(_Bounded):
    strength: float = option(
        1.0, help="how far the target goes from retain to forget frequency, s", minimum=0.0, maximum=1.0
    )
    ridge: float = option(1e-3, help="quadratic penalty on the multipliers, rho", minimum=0.0)


class _Selecting(Weighted):
    rule: SelectionRule = option("ratio", help="which experts are forget-critical")
    routing: RoutingSource = option("offline", help="whose routing gives a token its weight")
    max_ratio: float = option(100.0, help="largest forget/retain frequency ratio asked for, r_max", minimum=1.0)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.routing, Online) and isinstance(self, (RatioWeights, Permuted)):
            raise ConfigError(
                f"routing is 'online' and the weighting {self.name!r}, which has no multipliers that weigh a token by "
                "the experts it uses now. Choose a weighting 'entropy' or 'random_experts', or the routing "
                "'recalibrated', which solves any weighting of experts anew."
            )
        if isinstance(self.routing, Online) and self.apply == "sampling":
            raise ConfigError(
                "routing is 'online' and apply 'sampling', where rows are drawn before the current model sees them and "
                "their losses are not weighted; set apply to 'both' or 'weights', or routing to 'recalibrated'."
            )


class Entropy(Matching, _Selecting, name="entropy"):
    """The calibration: the least change of weights with which the selected experts are used as on forget data."""

    unit: str = option("token", help="what shares one weight", choices=("token", "row"))


class Permuted(Entropy, name="permuted"):
    """Control: the same weights dealt out at random."""


class RandomExperts(Entropy, name="random_experts"):
    """Control: the calibration of as many experts per layer, drawn at random."""


class RatioWeights(_Selecting, name="ratio"):
    """Rival: the mean frequency ratio of a token's selected experts."""


class NGram(_Bounded, name="ngram"):
    """Rival: density ratio of rows under hashed uni- and bigrams (DSIR, 2302.03169)."""


class Hidden(Matching, name="hidden"):
    """Rival: the same calibration of rows on mean hidden states in place of experts."""


class Loss(Weighted, name="loss"):
    """Rival: tokens weighted by their loss."""


class Domain(Weighted, name="domain"):
    """Upper reference: told which rows are near the forget domain."""


class CalibrationConfig(Section):
    """Settings of selection and calibration. A weighting is given by name, or as a mapping with its settings."""

    weighting: Weighting = option("uniform", help="how retain tokens are weighted")
    seed: int = option(0, help="seed of random experts and of the permutation", minimum=0)

    @property
    def recalibrates_every(self) -> int | None:
        """Steps after which weights are solved anew; None: never."""
        routing = getattr(self.weighting, "routing", None)
        return routing.every if isinstance(routing, Recalibrated) else None
