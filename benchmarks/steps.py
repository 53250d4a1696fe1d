"""An unlearning step with random weights and tokens, ready to be compiled and run: what several benchmarks measure."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import ModelConfig, flatten, init_params
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, place
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.loop import TrainState
from trace_jax.unlearning.losses import Constants, StepSettings
from trace_jax.unlearning.step import set_up, unlearning_step


class Step(NamedTuple):
    """A step's arguments. `state` is donated when it runs."""

    state: TrainState
    arguments: tuple
    settings: StepSettings
    mesh: Mesh

    def lower(self) -> Any:
        return unlearning_step.lower(self.state, *self.arguments, settings=self.settings, mesh=self.mesh)

    def run(self) -> "Step":
        """The step taken; its metrics are read, so that it has ended."""
        state, metrics = unlearning_step(self.state, *self.arguments, settings=self.settings, mesh=self.mesh)
        jax.block_until_ready(metrics)
        return self._replace(state=state)


def prepared_step(
    config: UnlearningConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    parallel: ParallelConfig = PLAIN,
    selected: np.ndarray | None = None,
) -> Step:
    """`rows` forget and as many retain rows of `length` tokens on the mesh.

    selected: bool [L, E], for trainable="selected_experts".
    """
    original = flatten(placed_params(init_params(model, jax.random.key(0)), model, mesh))
    settings, constants, start = set_up(original, config, model, selected=selected, parallel=parallel, mesh=mesh)
    constants = Constants(original, *place(constants[1:], mesh))
    rng = np.random.default_rng(0)
    forget, retain = (random_batch(rows, length, model.vocab_size, rng) for _ in range(2))
    placed = place(StepRows(forget, retain, retain.valid.astype(np.float32)), mesh, P(BATCH_AXES))
    return Step(start(constants), (constants, placed), settings, mesh)


def random_batch(rows: int, length: int, vocab_size: int, rng: np.random.Generator) -> Batch:
    """Rows of one document each."""
    tokens = rng.integers(3, vocab_size, (rows, length)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    valid[:, -1] = False
    return Batch(tokens, np.ones_like(tokens), valid)
