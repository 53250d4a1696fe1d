"""What `unlearn` refuses before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.data.rows import Rows
from trace_jax.models.model import Model
from trace_jax.routing.weights import Recalibration, RetainWeights
from trace_jax.unlearning.config import CHOOSING, STEERING, UnlearningConfig


def check_run(
    model: Model,
    forget: Rows,
    retain: Rows | None,
    config: UnlearningConfig,
    *,
    selected: np.ndarray | None,
    weights: RetainWeights | None,
    recalibrate: Recalibration | None,
    evaluate: Callable | None,
) -> None:
    """Raises a ConfigError or ValueError that says what does not fit together (arguments as in `unlearn`)."""
    if config.retains and retain is None:
        raise ConfigError(
            f"objective {config.objective!r} has a retain term; give retain rows, or set retain_loss to 'none'."
        )
    if config.layer is not None and config.layer > model.config.num_layers:
        raise ConfigError(f"layer is {config.layer}, but the model has {model.config.num_layers} layers.")
    if config.grip != "none" and retain is None:
        raise ConfigError(f"grip {config.grip!r} holds on to the routing of retain text; give retain rows.")
    for name, rows in (("forget", forget), ("retain", retain)):
        if rows is not None and not rows.valid.any():
            raise ValueError(f"the {name} rows hold no token that can be predicted; the data is too short.")
    if config.rules.asks and evaluate is None:
        raise ConfigError(
            "stop_forgetting, stop_utility and keep are about evaluations, and there are none; give `evaluate`, or "
            "leave them out."
        )
    if weights is not None and weights.online:
        config.check_online()
    if recalibrate is not None and weights is None:
        raise ConfigError("recalibrate is given without weights; the steps before the first recalibration need some.")
    if config.trainable in CHOOSING:
        _check_selected(model, config, selected)


def _check_selected(model: Model, config: UnlearningConfig, selected: np.ndarray | None) -> None:
    if selected is None or not selected.any():
        raise ConfigError(
            f"trainable is {config.trainable!r}, but no expert is selected (experts is {config.experts!r}): use a "
            "weighting that selects experts, lower its tau, or name another rule in unlearning.experts."
        )
    shape = len(model.config.moe_layers), model.config.num_experts
    if selected.shape != shape:
        raise ValueError(f"selected is {selected.shape}; the model has {shape} (layers with experts, experts).")
    layers = [model.config.moe_layers[i] + 1 for i in np.flatnonzero(selected.any(axis=1))]
    if config.objective in STEERING and config.layer is not None and layers[0] > config.layer:
        where = ", ".join(map(str, layers))
        raise ConfigError(
            f"objective {config.objective!r} steers the output of layer {config.layer}, and the selected experts are "
            f"in layers {where}, above it: they would learn nothing. Set unlearning.layer to {layers[0]} or more."
        )
