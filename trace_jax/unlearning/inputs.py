"""What a run reads, and for how many steps. Rows depend on the step alone, so that a resumed run repeats itself."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch, IndexSampler, Rows, epoch_sampler, retain_sampler
from trace_jax.io.files import read_arrays, write_arrays
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.models.sharding import map_batches
from trace_jax.parallel.mesh import BATCH_AXES, place
from trace_jax.parallel.processes import barrier, broadcast_from_process_0
from trace_jax.routing.controls import losses
from trace_jax.routing.weights import RetainWeights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.objective import ForgetInputs
from trace_jax.unlearning.objectives import RMU, AdaptiveRMU


@struct.dataclass
class StepRows:
    """What one step reads; parts that the objective doesn't read are None. Every leaf has the rows first."""

    forget: Batch
    retain: Batch | None = None
    weights: Any = None  # f32 [B, S], of retain losses, or of the weights by which the step weighs tokens as routed now
    topic: Any = None  # i32 [B], which topic a forget row is of
    refusals: Batch | None = None  # for each forget row, its beginnings with a refusal after each
    reference_nll: Any = None  # f32 [B, S], of forget rows under the original model, where computed before
    refusal_reference_nll: Any = None


def pad_rows(rows: Any, multiple: int) -> Any:
    """Adds empty rows (no segment, nothing valid) to arrays [B, ...] until the devices share the rows evenly."""

    def pad(x):
        missing = -len(x) % multiple
        return np.concatenate([np.asarray(x), np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x

    return jax.tree.map(pad, rows)


class Inputs:
    """`at(step)` is the `StepRows` of a step, NumPy arrays padded to a multiple of rows.

    forget, refusals: row i of one belongs to row i of the other. `forget.domain` numbers the topics.
    reference: log-probabilities of both that were computed before (`cached_reference`).
    """

    def __init__(
        self, forget: Rows, retain: Rows | None, weights: RetainWeights | None, config: UnlearningConfig, *,
        seed: int, multiple: int, refusals: Rows | None = None, reference: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self._forget, self._refusals, self._reference = forget, refusals, reference or {}
        self._sampler, self._multiple = forget_sampler(forget.domain, config, seed=seed), multiple
        self._retain, self._size, self._seed = retain if config.retains else None, config.retain_batch_size, seed + 1
        self.weigh(weights)

    def weigh(self, weights: RetainWeights | None) -> None:
        """Draws and weighs retain rows with `weights` from now on; None: all the same."""
        if self._retain is not None:
            probability = None if weights is None else weights.row_probability
            self._drawn = retain_sampler(len(self._retain), self._size, seed=self._seed, probability=probability)
            self._weights = self._retain.valid.astype(np.float32) if weights is None else weights.step_weights

    def at(self, step: int) -> StepRows:
        chosen, retain, weights = self._sampler(step), None, None
        if self._retain is not None:
            drawn = self._drawn(step)
            retain, weights = self._retain.batch(drawn), self._weights[drawn]
        refusals = None if self._refusals is None else self._refusals.batch(chosen)
        reference = {name: array[chosen] for name, array in self._reference.items()}
        rows = StepRows(self._forget.batch(chosen), retain, weights, self._forget.domain[chosen], refusals, **reference)
        return pad_rows(rows, self._multiple)


def forget_sampler(topics: np.ndarray, config: UnlearningConfig, *, seed: int) -> IndexSampler:
    """Which forget rows a step reads, of `topics` i32 [N]: mixed, or alternating (as RMU trains on bio and cyber,
    2403.03218): step i is of topic i mod n, and each is gone through in epochs of its own.
    """
    of_turn = np.unique(topics) if config.topics == "alternating" else [topics]
    rows, size = [np.flatnonzero(topics == topic) for topic in of_turn], config.forget_batch_size
    samplers = [epoch_sampler(len(of_topic), size, seed=seed + i) for i, of_topic in enumerate(rows)]

    def sampler(step: int) -> np.ndarray:
        turn, topic = divmod(step, len(rows))
        return rows[topic][samplers[topic](turn)]

    return sampler


def feed(rows_at: Callable[[int], Any], rates: np.ndarray, mesh: Mesh) -> Callable[[int], tuple[Any, dict[str, float]]]:
    """A function of a step: (its rows, `StepRows` or a `Batch`, shared by the devices; {"tokens", "learning_rate"}, how
    many valid tokens it reads, and its learning rate: what the host knows without asking the devices).
    """

    def at(step: int) -> tuple[Any, dict[str, float]]:
        rows = rows_at(step)
        batches = jax.tree.leaves(rows, is_leaf=lambda part: isinstance(part, Batch))
        tokens = sum(int(part.valid.sum()) for part in batches if isinstance(part, Batch))
        return place(rows, mesh, P(BATCH_AXES)), {"tokens": tokens, "learning_rate": float(f"{rates[step]:.6g}")}

    return at


# --- what is asked of the original model before the first step


def cached_reference(
    directory: Path, identity: str, model: Model, forget: Rows, refusals: Rows | None, *, mesh: Mesh, batch_size: int
) -> dict[str, np.ndarray]:
    """-log p of every token of the rows under `model`, f32 [N, S] by name in `StepRows`; kept in `directory`."""
    file = directory / "reference.npz"
    sets = {"reference_nll": forget} | ({} if refusals is None else {"refusal_reference_nll": refusals})

    def stored() -> dict[str, np.ndarray]:
        with contextlib.suppress(ValueError):  # it is damaged
            arrays = read_arrays(file) if file.exists() else {}
            if str(arrays.pop("identity", "")) == identity and sets.keys() <= arrays.keys():
                return {name: arrays[name] for name in sets}
        return {}

    values = stored()
    if not broadcast_from_process_0(bool(values)):
        values = {name: losses(model, rows, mesh=mesh, batch_size=batch_size) for name, rows in sets.items()}
        write_arrays(file, {"identity": np.array(identity), **values}, compress=False)
        barrier("log-probabilities of the original model")
    return values or stored()


def steering_directions(key: jax.Array, topics: int, width: int) -> jax.Array:
    """RMU's u for each topic: uniform on [0, 1)^D, scaled to length one (f32 [topics, D])."""
    directions = jax.random.uniform(key, (topics, width), jnp.float32)
    return directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)


def steering_target(model: Model, forget: Rows, config: UnlearningConfig, *, seed: int, mesh: Mesh) -> jax.Array | None:
    """f32 [topics, D]: where RMU steers the rows of each topic, c u; None for other objectives. In adaptive RMU
    (2408.06223) c is a multiple of mean |h_layer| over the topic's tokens in its first batch that the loss counts.
    """
    objective, topics = config.objective, int(forget.domain.max()) + 1
    if not isinstance(objective, (RMU, AdaptiveRMU)):
        return None
    directions = steering_directions(jax.random.key(seed), topics, model.config.hidden_size)
    if isinstance(objective, RMU):
        return directions * objective.steering
    lengths, step, sampler = np.zeros(topics, np.float32), 0, forget_sampler(forget.domain, config, seed=seed)
    missing = set(forget.domain.tolist())
    while missing:
        rows, step = forget.take(sampler(step)), step + 1
        for topic in missing & set(rows.domain.tolist()):
            of_topic = rows.take(np.flatnonzero(rows.domain == topic))
            counts = np.asarray(objective.counts(ForgetInputs(of_topic.valid, of_topic.segments)))
            arrays = [(of_topic.tokens, of_topic.segments, counts)]
            [sums] = map_batches(_lengths, model.params, model.config, arrays, mesh=mesh, static=(config.layer,))
            lengths[topic] = float(sums[: len(of_topic)].sum() / max(1.0, counts.sum()))
            missing.remove(topic)
    return directions * (objective.steering_scale * jnp.asarray(lengths))[:, None]


def _lengths(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, counts: jax.Array, layer: int):
    """f32 [B], |h_layer| summed over the tokens of each row, each as often as it counts."""
    hidden: Any = forward(params, config, tokens, mask=segments, collect=("hidden",), num_layers=layer).hidden
    return (counts * jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)).sum(-1)


# --- how long a run is


def with_steps(config: UnlearningConfig, forget: Rows, retain: Rows | None) -> UnlearningConfig:
    """The settings with `steps` in place of `epochs`, now that the rows of an epoch are known."""
    if not config.epochs:
        return config
    rows: Any = retain if config.epoch_anchor == "retain" else forget
    batch = getattr(config, f"{config.epoch_anchor}_batch_size")
    steps = math.ceil(config.epochs * len(rows) / batch - 1e-9)  # 0.1 of 30 rows is 3, and a little in floating point
    return dataclasses.replace(config, steps=max(1, steps), epochs=0.0, epoch_anchor="forget")


def batch_text(
    config: UnlearningConfig, forget: Rows, retain: Rows | None, mesh: Mesh, microbatches: int,
    refusals: Rows | None = None,
) -> str:  # fmt: skip
    """What a step reads, and how many steps go through each side once, as a sentence."""
    named = ("forget", forget), ("refusal", refusals), ("retain", retain if config.retains else None)
    sizes = config.forget_batch_size, config.forget_batch_size, config.retain_batch_size
    sides = [(name, rows, batch) for (name, rows), batch in zip(named, sizes, strict=True) if rows is not None]
    rows = " + ".join(f"{batch} {name} rows x {rows.tokens.shape[1]}" for name, rows, batch in sides)
    tokens = sum(batch * rows.tokens.shape[1] for _, rows, batch in sides)
    epochs = " and ".join(f"{math.ceil(len(rows) / batch):,} of the {name} rows" for name, rows, batch in sides)
    parts = f"{microbatches} microbatches" if microbatches > 1 else "one batch"
    devices = f"{mesh.size} devices" if mesh.size > 1 else "one device"
    step = f"{config.steps:,} steps of {rows} = {tokens:,} tokens each, in {parts} on {devices}"
    return f"{step}; steps in an epoch: {epochs}"
