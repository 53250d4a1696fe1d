"""How retain tokens are weighted: which experts are selected, what is matched, where the weights act."""

from __future__ import annotations

import dataclasses

from trace_jax.config import ConfigError, Section, option

RULES = ("ratio", "difference", "log_odds", "cumulative", "affinity", "random", "all")
WEIGHTINGS = ("uniform", "entropy", "ratio", "permuted", "random_experts", "ngram", "hidden", "loss", "domain")
UNITS = ("token", "row", "window")
APPLICATIONS = ("weights", "sampling", "both")
SCOPES = ("layer", "model")
ROUTINGS = ("offline", "online", "recalibrated")

_SELECTING = ("entropy", "ratio", "permuted", "random_experts")  # weightings that look at selected experts
_MATCHING = ("entropy", "permuted", "random_experts", "hidden")  # weightings that solve for multipliers
_ONLINE = ("entropy", "random_experts")  # weightings with multipliers that weigh any token by its experts
_WEIGHTED = tuple(w for w in WEIGHTINGS if w != "uniform")


@dataclasses.dataclass(frozen=True)
class CalibrationConfig(Section):
    """Settings of selection and calibration (docs/method.md)."""

    weighting: str = option("uniform", help="how retain tokens are weighted", choices=WEIGHTINGS)
    rule: str | None = option(
        "ratio", help="which experts are forget-critical", choices=RULES, when={"weighting": _SELECTING}
    )
    kappa: float | None = option(
        0.5, help="least forget frequency, in units of K/E", minimum=0.0, when={"rule": ("ratio",)}
    )
    tau: float | None = option(
        1.2, help="least ratio of forget to retain frequency", minimum=0.0, when={"rule": ("ratio",)}
    )
    top: int | None = option(
        4, help="experts selected, per `scope`", minimum=1, when={"rule": ("difference", "affinity", "random")}
    )
    scope: str | None = option(
        "layer",
        help="whether `top` experts are taken in each layer or over the whole model",
        choices=SCOPES,
        when={"rule": ("difference", "affinity", "random")},
    )
    z: float | None = option(5.0, help="least two-proportion z-score", minimum=0.0, when={"rule": ("log_odds",)})
    mass: float | None = option(
        0.5, help="share p of the forget activations to cover", minimum=0.0, maximum=1.0, when={"rule": ("cumulative",)}
    )
    unit: str | None = option(
        {"entropy": "token", "permuted": "token", "random_experts": "token", "hidden": "row"},
        help="what shares one weight (hidden: always the row)",
        choices=UNITS,
        when={"weighting": ("entropy", "permuted", "random_experts", "hidden")},
    )
    window: int | None = option(
        16, help="positions averaged when unit is window", minimum=1, when={"unit": ("window",)}
    )
    strength: float | None = option(
        1.0,
        help="how far the target goes from retain to forget frequency, s",
        minimum=0.0,
        maximum=1.0,
        when={"weighting": _MATCHING},
    )
    ridge: float | None = option(
        1e-3, help="quadratic penalty on the multipliers, rho", minimum=0.0, when={"weighting": _MATCHING}
    )
    max_weight: float | None = option(
        50.0, help="largest weight before renormalisation (1 is uniform)", minimum=1.0, when={"weighting": _WEIGHTED}
    )
    max_ratio: float | None = option(
        100.0,
        help="largest forget/retain frequency ratio asked for, r_max",
        minimum=1.0,
        when={"weighting": ("entropy", "permuted", "random_experts", "ratio")},
    )
    min_effective_sample_size: float | None = option(
        0.0,
        help="least effective sample size as a share of the tokens; the strength is lowered to keep it",
        minimum=0.0,
        maximum=1.0,
        when={"weighting": (*_MATCHING, "ngram")},
    )
    apply: str | None = option(
        "both",
        help="where the weights act: on the loss, on which rows are drawn, or both",
        choices=APPLICATIONS,
        when={"weighting": _WEIGHTED},
    )
    routing: str | None = option(
        "offline",
        help="whose routing gives a token its weight: the original model's, the current model's, or the current "
        "model's with everything solved anew every few steps",
        choices=ROUTINGS,
        when={"weighting": _SELECTING},
    )
    recalibrate_every: int | None = option(
        20, help="steps between recalibrations", minimum=1, when={"routing": ("recalibrated",)}
    )
    seed: int = option(0, help="seed of random experts and of the permutation", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        if self.weighting == "hidden" and self.unit != "row":
            raise ConfigError(f"unit is {self.unit!r}; weighting 'hidden' compares rows, so unit must be 'row'.")
        if self.routing == "online" and self.weighting not in _ONLINE:
            raise ConfigError(
                f"routing is 'online' and weighting {self.weighting!r}, which has no multipliers that weigh a token by "
                f"the experts it uses now. Set weighting to {' or '.join(map(repr, _ONLINE))}, or routing to "
                "'recalibrated', which solves any weighting of experts anew."
            )
        if self.routing == "online" and self.apply == "sampling":
            raise ConfigError(
                "routing is 'online' and apply 'sampling', where rows are drawn before the current model sees them and "
                "their losses are not weighted; set apply to 'both' or 'weights', or routing to 'recalibrated'."
            )
