"""What the configurations of published benchmarks share: a variant names a model and a method.

`MODEL` or `MODEL,METHOD`; the method is TRACE unless named. Numbers stand in the configurations, with their sources.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from trace_jax.config import ConfigError, nearest
from trace_jax.models.families import PUBLISHED

# What each method is; how strongly and how fast it works is the benchmark's to say. TRACE's base follows
# configs/huggingface.py, the others train what their authors train.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "trace": {
        "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
        "retain_loss": "kl",
        "trainable": "down_projections",
    },
    "graddiff": {"objective": "gradient_difference", "retain_loss": "nll", "trainable": "all"},
    "npo": {"objective": "npo", "retain_loss": "nll", "trainable": "all"},
    "simnpo": {"objective": "simnpo", "retain_loss": "nll", "trainable": "all"},
    # GradDiff on the one expert of the whole model with the largest gate on forget tokens, and its layer's router.
    "seuf": {
        "objective": "gradient_difference",
        "retain_loss": "nll",
        "trainable": {
            "name": "seuf",
            "experts": {"name": "affinity", "scope": "model", "top": 1},
            "anchor": 1.0,
            "anchor_form": "sum",
        },
    },
    # RMU's length c must fit the hidden states and is published for three of the models; elsewhere the first batch's.
    "rmu": {
        "objective": {"name": "adaptive_rmu", "steering_scale": 5.0},
        "clip_norm": 0.0,
        "trainable": "down_projections",
    },
}
_DEFAULT = "trace"


def rmu(steering: float, layer: int, **changes: Any) -> Mapping[str, Any]:
    """RMU of a layer with a length c that is known, instead of the adaptive one of `METHODS`."""
    return {"objective": {"name": "rmu", "steering": steering, "layer": layer}, **changes}


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
      common, methods, models: settings of `unlearning`: of every variant, by method, and by (method, model). Later ones
        replace earlier ones, which replace those of `METHODS`; settings without the name of an objective add to it.

    Raises:
      ConfigError: a variant that names no model or method of these.
    """
    model, _, method = variant.partition(",")
    check_name("model", model, PUBLISHED, name)
    check_name("method", method := method or _DEFAULT, methods, name)
    weighting = "trace_rows" if method == "trace" else "uniform"
    config = ml_collections.ConfigDict()
    config.name = f"{name}-{model}-{method}"
    config.methods = (weighting,)
    config.export = weighting
    config.model = {"path": "", "published": model}
    config.data = {"benchmark": "text", **data}
    of_model = (models or {}).get((method, model), {})
    config.unlearning = _merged({"optimizer": {"b2": 0.999}}, METHODS[method], common, methods[method], of_model)
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
