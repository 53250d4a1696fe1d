"""What is asked of the original model before the first step: log-probabilities that every epoch would compute again,
and the length of the vectors that adaptive RMU steers by."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.rows import Rows
from trace_jax.io.files import local_copy, replacing
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import BATCH_AXES
from trace_jax.parallel.processes import barrier, broadcast_from_process_0
from trace_jax.routing.controls import losses
from trace_jax.routing.statistics import run_batches
from trace_jax.unlearning.inputs import Reference


def cached_reference(
    directory: Path, identity: str, model: Model, forget: Rows, refusals: Rows | None, *, mesh: Mesh, batch_size: int
) -> Reference:
    """`Reference` of the rows under `model`, from `directory` if the run of this identity left it there."""
    file = directory / "reference.npz"
    known = _read(file, identity)
    if not broadcast_from_process_0(known is not None):
        sets = {"nll": forget} | ({} if refusals is None else {"refusal_nll": refusals})
        known = {name: losses(model, rows, mesh=mesh, batch_size=batch_size) for name, rows in sets.items()}
        with replacing(file) as temporary:
            np.savez(temporary, allow_pickle=False, identity=np.array(identity), **known)
        barrier("log-probabilities of the original model")
    known = known or _read(file, identity) or {}
    return Reference(known["nll"], known.get("refusal_nll"))


def _read(file: Path, identity: str) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    with local_copy(file) as local, np.load(local, allow_pickle=False) as arrays:
        if str(arrays["identity"]) != identity:
            return None
        return {name: arrays[name] for name in arrays.files if name != "identity"}


def mean_lengths(
    model: Model, forget: Rows, indices: Callable[[int], np.ndarray], *, layer: int, mesh: Mesh
) -> np.ndarray:
    """f32 [topics]: mean |h_layer| over the valid tokens of the first batch that holds rows of the topic.

    Args:
      indices: row numbers of a step. layer: counted from 1.
    Source: adaptive RMU, 2408.06223.
    """
    topics = int(forget.domain.max()) + 1
    found: dict[int, float] = {}
    step = 0
    while len(found) < len(np.unique(forget.domain)):
        rows = forget.take(indices(step))
        for topic in set(np.unique(rows.domain).tolist()) - set(found):
            found[topic] = _mean_length(model, rows.take(np.flatnonzero(rows.domain == topic)), layer, mesh)
        step += 1
    return np.array([found.get(topic, 0.0) for topic in range(topics)], np.float32)


def _mean_length(model: Model, rows: Rows, layer: int, mesh: Mesh) -> float:
    def length(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
        hidden = forward(params, config, tokens, mask=segments, collect=("hidden",), num_layers=layer).hidden
        assert hidden is not None
        norms = jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)
        return jnp.where(valid, norms, 0.0).sum(-1)

    batch = rows.batch(np.arange(len(rows)))
    [(_, sums)] = run_batches(model, [batch], length, out_specs=PartitionSpec(BATCH_AXES), mesh=mesh)
    return float(np.asarray(sums)[: len(rows)].sum() / max(1, rows.valid.sum()))
