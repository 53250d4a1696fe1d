"""What the configurations of published benchmarks share: a variant names a model and a method.

`MODEL`, `MODEL,METHOD` or `MODEL,METHOD:published`; the method is TRACE unless named. Methods train the same parameters
with the same retain loss, rows and steps, unless one is asked for as its authors published it. Numbers stand in the
configurations, with their sources.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from trace_jax.config import ConfigError, nearest
from trace_jax.models.families import PUBLISHED

# What each method is. How fast it works, and what its objective is set to, is the benchmark's to say.
_GRADDIFF = {"name": "gradient_difference", "nll_ceiling": 6.0}  # as in configs/huggingface.py
METHODS: Mapping[str, Mapping[str, Any]] = {
    "trace": {"objective": _GRADDIFF},
    "graddiff": {"objective": _GRADDIFF},
    "npo": {"objective": "npo"},
    "simnpo": {"objective": "simnpo"},
    # GradDiff on the one expert of the whole model with the largest gate on forget tokens, and its layer's router.
    "seuf": {
        "objective": _GRADDIFF,
        "trainable": {
            "name": "seuf",
            "experts": {"name": "affinity", "scope": "model", "top": 1},
            "anchor": 1.0,
            "anchor_form": "sum",
        },
    },
    # RMU's length c must fit the hidden states and is published for three of the models; elsewhere the first batch's.
    "rmu": {"objective": {"name": "adaptive_rmu", "steering_scale": 5.0}},
}
# What all have alike beside a benchmark's steps and rows, with alpha at its default; SEUF is what it trains.
_ALIKE = {"optimizer": {"b2": 0.999}, "retain_loss": "kl", "trainable": "layers/experts/down"}
_OWN = ("objective", "learning_rate")  # of a benchmark's settings of a method, what it has all the same
# METHOD:published has all of these, and what its authors train and hold on to. TRACE's settings aren't published.
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "graddiff": {"objective": "gradient_difference", "retain_loss": "nll", "trainable": "all"},
    "npo": {"retain_loss": "nll", "trainable": "all"},
    "simnpo": {"retain_loss": "nll", "trainable": "all"},
    "seuf": {"objective": "gradient_difference", "retain_loss": "nll"},
    "rmu": {
        "objective": {"form": "wmdp"},  # as the authors' code has it, whose alpha counts padding too
        "retain_loss": "hidden",
        "clip_norm": 0.0,
        "trainable": "down_projections",
    },
}
_DEFAULT = "trace"


def rmu(steering: float, layer: int, **changes: Any) -> Mapping[str, Any]:
    """RMU of a layer with a length c that is known, instead of the adaptive one of `METHODS`."""
    return {"objective": {"name": "rmu", "form": "wmdp", "steering": steering, "layer": layer}, **changes}


def benchmark_config(
    name: str,
    variant: str,
    *,
    data: Mapping[str, Any],
    common: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    models: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> ml_collections.ConfigDict:
    """The experiment of a variant of a benchmark.

    Args:
      data: settings of `data` beside the benchmark's name.
      common, methods, models: settings of `unlearning`: of every variant, by method, and by (method, model), the last
        for published variants. Later ones replace earlier ones, which replace those of `METHODS`; settings without the
        name of an objective add to it. Variants that are not as published take `_OWN` of a method's.

    Raises:
      ConfigError: a variant that names no model or method of these.
    """
    model, _, method = variant.partition(",")
    check_name("model", model, PUBLISHED, name)
    variants = [*methods, *(f"{one}:published" for one in methods if one in _PUBLISHED)]
    check_name("method", method or _DEFAULT, variants, name)
    method, _, published = (method or _DEFAULT).partition(":")
    weighting = "trace" if method == "trace" else "uniform"
    config = ml_collections.ConfigDict()
    config.name = f"{name}-{model}-{method}{'-published' if published else ''}"
    config.methods = (weighting,)
    config.export = weighting
    config.model = {"path": "", "published": model}
    config.data = {"benchmark": "text", **data}
    parts = [METHODS[method], common, {key: value for key, value in methods[method].items() if key in _OWN}]
    if published:
        of_model = (models or {}).get((method, model), {})
        parts = [METHODS[method], _PUBLISHED[method], common, methods[method], of_model]
    config.unlearning = _merged(_ALIKE, *parts)
    config.evaluation = {"batch_size": 8}
    config.parallel = {"remat": "layer"}
    return config


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in (item for part in parts for item in part.items()):
        if isinstance(value, Mapping) and "name" not in value:
            before = merged.get(key, {})
            value = {**({"name": before} if isinstance(before, str) else before), **value}
        merged[key] = value
    return merged


def check_name(what: str, name: str, names: Iterable[str], config: str) -> None:
    """Refuses a part of a variant of configs/CONFIG.py that is none of `names`, with the nearest of them."""
    if name not in (names := list(names)):
        raise ConfigError(
            f"configs/{config}.py has no {what} {name!r}{nearest(name, names)} A variant is MODEL or MODEL,METHOD; "
            f"{what}s: {', '.join(names)}."
        )
