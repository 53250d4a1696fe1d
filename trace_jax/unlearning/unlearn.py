"""Unlearning: from a model, forget rows and weighted retain rows to a model that has forgotten."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError, fingerprint
from trace_jax.data.batches import forget_batches, retain_batches
from trace_jax.data.rows import Batch, Rows
from trace_jax.files import as_path
from trace_jax.models.arrays import unflatten
from trace_jax.models.model import Model
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.config import PLAIN, ParallelConfig
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import ROWS
from trace_jax.routing.retain_weights import RetainWeights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.loop import Loop
from trace_jax.unlearning.objectives import OBJECTIVES, steering_direction
from trace_jax.unlearning.selected import cut_rows, put_back, selected_index
from trace_jax.unlearning.step import (
    Constants,
    as_stored,
    coefficients,
    initial_state,
    pad_rows,
    row_multiple,
    unlearning_settings,
    unlearning_step,
)
from trace_jax.unlearning.trainable import partition, trainable_table, update_masks


@dataclasses.dataclass(frozen=True)
class Unlearned:
    """The model after unlearning, the step it is from, why it stopped early (or ""), what trained, and the speed."""

    model: Model
    step: int
    stopped: str
    trained: list[dict]
    seconds_per_step: float


def unlearn(
    model: Model,
    forget: Rows,
    retain: Rows | None,
    *,
    config: UnlearningConfig,
    weights: RetainWeights | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    parallel: ParallelConfig = PLAIN,
    directory: str | os.PathLike | None = None,
    identity: str | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    title: str = "unlearning",
) -> Unlearned:
    """Unlearns `forget` from `model` while holding on to `retain`.

    Args:
      model: the target model; it is not changed, and its frozen parameters are shared with the result.
      forget, retain: packed rows. `retain` may be None for objectives without a retain term.
      weights: of retain tokens, and how often each row is drawn (`trace_jax.routing`); None = uniform. Its selected
        experts are what trains when `config.trainable` is "selected_experts".
      seed: of batch order and of RMU's direction.
      mesh, parallel: the devices, and how the step is laid out on them; no mesh: one as `parallel` says.
      directory: where metrics.jsonl and resumable state go; None keeps nothing.
      identity: hash of everything that made this run; state of another one in `directory` is not continued.
      evaluate: called with parameters at step 0, every `config.evaluate_every` steps and at the end.
    Returns:
      `Unlearned`; after a NaN, the last good state and the reason.
    Raises:
      ConfigError: retain data missing for an objective that needs it; a layer the model doesn't have; selected
        experts missing.
    """
    selected = weights.selected if weights is not None and config.trainable == "selected_experts" else None
    _check(model, forget, retain, config, selected)
    mesh = mesh or parallel.mesh()
    trainable, specs = config.trainable or "all", param_specs(model.config, mesh)
    training, frozen = (
        place(part, mesh, {path: specs[path] for path in part}) for part in partition(model.params, trainable)
    )
    masks = place(update_masks(training, model.config, layers=trained_layers(config)), mesh)
    settings = unlearning_settings(config, model.config, parallel)
    direction = (
        steering_direction(jax.random.key(seed), model.config.hidden_size) if config.objective == "rmu" else None
    )
    numbers, index = place((coefficients(config), direction), mesh), None
    everything = {**frozen, **training}
    if selected is not None:
        index, frozen = place(selected_index(selected), mesh), everything
    constants = Constants(frozen, {} if selected is not None else training, index, masks, *numbers)
    batches = _Inputs(forget, retain, weights, config, seed, row_multiple(settings, mesh))

    def inputs(step_index):
        return place(batches.at(step_index), mesh, P(ROWS))

    def step(state, placed):
        return unlearning_step(state, constants, *placed, settings=settings, mesh=mesh)

    def start():
        rows = training if index is None else cut_rows(training, index, model.config, mesh)
        return initial_state(rows, settings, mesh, masks)

    def whole(trainable):
        changed = as_stored(trainable, everything)
        if index is not None:
            changed = put_back({path: everything[path] for path in changed}, changed, index, model.config, mesh)
        return unflatten({**everything, **changed})

    with tempfile.TemporaryDirectory() as scratch:
        loop = Loop(
            as_path(directory or scratch),
            identity or fingerprint(config, model.config, seed),
            config.steps,
            config.checkpoint_every,
            title,
            (lambda trainable: evaluate(whole(trainable))) if evaluate else None,
            config.evaluate_every,
            seed,
        )
        result = loop.run(start, inputs, step)
    table = trainable_table(model.params, trainable, masks, selected)
    return Unlearned(
        model.replace(params=whole(result.trainable)), result.step, result.stopped, table, result.seconds_per_step
    )


def trained_layers(config: UnlearningConfig) -> tuple[int, int] | None:
    """RMU trains the steered layer and the two below it, as its authors do."""
    if config.objective == "rmu" and config.trainable == "down_projections" and config.layer is not None:
        return max(1, config.layer - 2), config.layer
    return None


def _check(model: Model, forget: Rows, retain: Rows | None, config: UnlearningConfig, selected) -> None:
    if OBJECTIVES[config.objective].retains and retain is None:
        raise ConfigError(
            f"objective {config.objective!r} has a retain term; give retain rows, or use gradient_ascent."
        )
    if config.layer is not None and config.layer > model.config.num_layers:
        raise ConfigError(f"layer is {config.layer}, but the model has {model.config.num_layers} layers.")
    if config.trainable == "selected_experts" and (selected is None or not selected.any()):
        raise ConfigError(
            "trainable is 'selected_experts', but no expert is selected; use a weighting that selects experts, or "
            "lower tau."
        )
    for name, rows in (("forget", forget), ("retain", retain)):
        if rows is not None and not rows.valid.any():
            raise ValueError(f"the {name} rows hold no token that can be predicted; the data is too short.")


class _Inputs:
    """Batches as a function of the step alone."""

    def __init__(
        self,
        forget: Rows,
        retain: Rows | None,
        weights: RetainWeights | None,
        config: UnlearningConfig,
        seed: int,
        multiple: int,
    ):
        self._multiple = multiple
        self._forget = forget_batches(forget, config.forget_batch_size, seed=seed)
        self._retain = None
        if retain is None or not OBJECTIVES[config.objective].retains:
            return
        assert config.retain_batch_size is not None
        probability = weights.row_probability if weights is not None else None
        self._retain = retain_batches(retain, config.retain_batch_size, seed=seed + 1, probability=probability)
        self._weights = retain.valid.astype(np.float32) if weights is None else weights.loss_weights

    def at(self, index: int) -> tuple[Batch, Batch | None, np.ndarray | None]:
        forget = pad_rows(self._forget[index], self._multiple)
        if self._retain is None:
            return forget, None, None
        rows = self._retain.indices(index)
        retain = pad_rows(self._retain.rows.batch(rows), self._multiple)
        missing = retain.tokens.shape[0] - len(rows)
        return forget, retain, np.pad(self._weights[rows], ((0, missing), (0, 0)))
