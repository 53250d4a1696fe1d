"""What trains, as flat arrays by path, and the models that are made of it and of what does not train."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.models.arrays import unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.sharding import Replaced, param_specs, rows_spec
from trace_jax.unlearning.selected import cut_rows, put_back

Flat = dict[str, jax.Array]


def trainable_specs(trainable: Flat, config: ModelConfig, mesh: Mesh, *, rows: bool = False) -> dict[str, P]:
    """How what trains is stored on `mesh`; `rows`: it is rows of arrays of experts."""
    if rows:
        return {path: rows_spec(config, path, leaf.shape[1], mesh) for path, leaf in trainable.items()}
    specs = param_specs(config, mesh)
    return {path: specs[path] for path in trainable}


def as_stored(trainable: Flat, like: Any) -> Flat:
    """Trainable parameters in the types of the model's own, `like` (arrays or their shapes by path)."""
    return {path: leaf.astype(like[path].dtype) for path, leaf in trainable.items()}


def first_trainable(training: Flat, index: jax.Array | None, config: ModelConfig, mesh: Mesh) -> Flat:
    """What trains, before the first step: the arrays `training` of the model, or the rows `index` of them."""
    return training if index is None else cut_rows(training, index, config, mesh)


def model_params(trainable: Flat, frozen: Flat, reference: Flat, index: jax.Array | None) -> tuple[Any, Any]:
    """(parameters of the model that trains, parameters of the original model), nested, on a device of the mesh.

    Args:
      frozen, reference, index: see `trace_jax.unlearning.losses.Constants`.
    """
    original = {**frozen, **reference}
    changed: dict[str, Any] = dict(as_stored(trainable, original))
    if index is not None:
        changed = {path: Replaced(frozen[path], rows, index) for path, rows in changed.items()}
    return unflatten({**frozen, **changed}), unflatten(original)


def whole_params(
    trainable: Flat, original: Flat, index: jax.Array | None, config: ModelConfig, mesh: Mesh, *, negated: float = 0.0
) -> Any:
    """Nested parameters of an ordinary model: `original` with what trained in its place.

    negated: with s > 0, original - s (trained - original) instead, in float32: a task vector is subtracted.
    """
    arrays = {path: original[path] for path in trainable}
    if negated:
        begin = first_trainable(arrays, index, config, mesh)
        trainable = jax.tree.map(
            lambda learnt, first: first.astype(jnp.float32) * (1.0 + negated) - negated * learnt, trainable, begin
        )
    changed = as_stored(trainable, original)
    if index is not None:
        changed = put_back(arrays, changed, index, config, mesh)
    return unflatten({**original, **changed})
