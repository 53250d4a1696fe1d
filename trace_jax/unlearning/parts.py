"""A model taken apart for a run: what trains, what both models share, and how a whole model is made of them again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trace_jax.models.arrays import unflatten
from trace_jax.models.model import Model
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import ParallelConfig
from trace_jax.unlearning.config import STEERING, UnlearningConfig
from trace_jax.unlearning.lora import factors
from trace_jax.unlearning.losses import coefficients
from trace_jax.unlearning.parameters import Flat, first_trainable, held_by_both, whole_params
from trace_jax.unlearning.selected import selected_index
from trace_jax.unlearning.state import StepSettings, TrainState, initial_state, unlearning_settings
from trace_jax.unlearning.trainable import partition, trainable_table, update_masks


@dataclasses.dataclass(frozen=True)
class Parts:
    """The arrays of a run on its mesh. Make them with `take_apart`.

    Attributes:
      model: the original one, on the mesh.
      training: the parameters of which anything trains. frozen, reference, index, masks, numbers: see
        `trace_jax.unlearning.losses.Constants`.
      table: what trains (`trainable_table`).
    """

    model: Model
    config: UnlearningConfig
    settings: StepSettings
    mesh: Mesh
    seed: int
    training: Flat
    frozen: Flat
    reference: Flat
    index: jax.Array | None
    masks: Flat | None
    numbers: Flat
    table: list[dict]

    def first_state(self) -> TrainState:
        """The state before the first step."""
        rank, alpha = self.config.lora_rank, self.config.alpha if self.config.row.dual else None
        first = first_trainable(self.training, self.index, self.model.config, self.mesh, rank=rank, seed=self.seed)
        return initial_state(first, self.settings, self.mesh, self.masks, alpha)

    @property
    def negated(self) -> float:
        """How often what was learnt is subtracted; 0 where it is kept."""
        return (self.config.task_scale or 0.0) if self.config.row.negates else 0.0

    def learnt(self, trainable: Flat) -> Model:
        """The model that trains, as it is in the step."""
        return self._whole(trainable, 0.0)

    def result(self, trainable: Flat) -> Model:
        """The model that a run gives which ends here: the same, but for objectives that subtract what they learn."""
        return self._whole(trainable, self.negated)

    def _whole(self, trainable: Flat, negated: float) -> Model:
        original: Any = {**self.frozen, **self.reference}
        scale = self.numbers.get("lora_scale")
        rest = self.index, self.model.config, self.mesh
        return self.model.replace(params=whole_params(trainable, original, *rest, scale=scale, negated=negated))


def take_apart(
    model: Model,
    config: UnlearningConfig,
    *,
    selected: np.ndarray | None,
    parallel: ParallelConfig,
    mesh: Mesh,
    seed: int,
) -> Parts:
    """The parts of `model` for a run. selected: bool [L, E], the experts that train where not all do.

    Raises:
      ConfigError: nothing would train, or adapters of a rank that a matrix doesn't have.
    """
    trainable, specs, rank = config.trainable or "all", param_specs(model.config, mesh), config.lora_rank
    training, frozen = (
        place(part, mesh, {path: specs[path] for path in part}) for part in partition(model.params, trainable)
    )
    masks = place(update_masks(training, model.config, layers=trained_layers(config), selected=selected), mesh)
    own = None if rank is None else factors(model.config, training, rank)
    index = None if selected is None else place(selected_index(selected), mesh)
    shared, reference = held_by_both(training, frozen, index, rank)
    return Parts(
        model.replace(params=unflatten({**frozen, **training})), config,
        unlearning_settings(config, model.config, parallel), mesh, seed, training, shared, reference, index, masks,
        place(coefficients(config), mesh), trainable_table(model.params, trainable, masks, selected, own),
    )  # fmt: skip


def trained_layers(config: UnlearningConfig) -> tuple[int, int] | None:
    """RMU trains the steered layer and the two below it, as its authors do."""
    if config.objective in STEERING and config.trainable == "down_projections" and config.layer is not None:
        return max(1, config.layer - 2), config.layer
    return None
