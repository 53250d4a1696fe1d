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
from trace_jax.unlearning.lora import adapted, factor_storage, initial_factors, merge
from trace_jax.unlearning.selected import cut_rows, put_back

Flat = dict[str, jax.Array]


def is_of_experts(path: str) -> bool:
    """Whether an array [L, E, ...] holds all experts, of which some rows may train alone."""
    return path.startswith("layers/experts/")


def trainable_specs(trainable: Flat, config: ModelConfig, mesh: Mesh, *, rows: bool = False) -> dict[str, P]:
    """How what trains is stored on `mesh`; `rows`: of arrays of experts it is rows."""
    specs = param_specs(config, mesh) | factor_storage(config, trainable, mesh)

    def one(path, leaf):
        return rows_spec(config, path, leaf.shape[1], mesh) if rows and is_of_experts(path) else specs[path]

    return {path: one(path, leaf) for path, leaf in trainable.items()}


def as_stored(trainable: Flat, like: Any) -> Flat:
    """Trainable parameters in the types of the model's own, `like` (arrays or their shapes by path)."""
    return {path: leaf.astype(like[path].dtype) for path, leaf in trainable.items()}


def held_by_both(training: Flat, frozen: Flat, index: Any, rank: int | None) -> tuple[Flat, Flat]:
    """(arrays that the model that trains reads too, original values of arrays that it has its own of).

    training, frozen: all parameters, by whether anything of them trains.
    """
    own = {path: leaf for path, leaf in training.items() if rank is None and (index is None or not is_of_experts(path))}
    return {path: leaf for path, leaf in {**frozen, **training}.items() if path not in own}, own


def first_trainable(
    training: Flat, index: jax.Array | None, config: ModelConfig, mesh: Mesh, *, rank: int | None = None, seed: int = 0
) -> Flat:
    """What trains, before the first step: the arrays `training` of the model, or what stands for a part of them.

    Args:
      index: of arrays of experts, the rows `index` i32 [L, N].
      rank: low-rank factors of every array, drawn with `seed`.
    """
    if rank is not None:
        return initial_factors(config, training, rank, seed=seed, mesh=mesh)
    if index is None:
        return training
    return training | cut_rows({p: a for p, a in training.items() if is_of_experts(p)}, index, config, mesh)


def model_params(
    trainable: Flat, frozen: Flat, reference: Flat, index: jax.Array | None, scale: jax.Array | None = None
) -> tuple[Any, Any]:
    """(parameters of the model that trains, parameters of the original model), nested, on a device of the mesh.

    Args:
      frozen, reference, index: see `trace_jax.unlearning.losses.Constants`.
      scale: of low-rank factors, if those are what trains.
    """
    original = {**frozen, **reference}
    if scale is not None:
        return unflatten({**frozen, **adapted(original, trainable, scale)}), unflatten(original)
    changed: dict[str, Any] = dict(as_stored(trainable, original))
    if index is not None:
        changed |= {p: Replaced(frozen[p], rows, index) for p, rows in changed.items() if is_of_experts(p)}
    return unflatten({**frozen, **changed}), unflatten(original)


def whole_params(
    trainable: Flat, original: Flat, index: jax.Array | None, config: ModelConfig, mesh: Mesh,
    *, scale: jax.Array | None = None, negated: float = 0.0,
) -> Any:  # fmt: skip
    """Nested parameters of an ordinary model: `original` with what trained in its place, or merged into it.

    negated: with s > 0, original - s (trained - original) instead, in float32: a task vector is subtracted.
    """
    if scale is not None:
        return unflatten(
            {**original, **merge(original, trainable, -negated * scale if negated else scale, config, mesh)}
        )
    arrays = {path: original[path] for path in trainable}
    if negated:
        begin = first_trainable(arrays, index, config, mesh)
        trainable = jax.tree.map(
            lambda learnt, first: first.astype(jnp.float32) * (1.0 + negated) - negated * learnt, trainable, begin
        )
    changed = as_stored(trainable, original)
    if index is not None:
        rows = {path: leaf for path, leaf in changed.items() if is_of_experts(path)}
        changed |= put_back({path: arrays[path] for path in rows}, rows, index, config, mesh)
    return unflatten({**original, **changed})
