"""Training a few experts of each layer: their rows are cut out of the arrays of all experts, and put back at the end.

Gradient and optimizer state exist for these rows alone. Every layer has as many as the layer with the most of them; a
layer with fewer is filled up with rows that belong nowhere.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.models.config import ModelConfig
from trace_jax.models.sharding import param_specs, put_rows
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import EXPERT, sum_over
from trace_jax.parallel.sharding import spec_axes
from trace_jax.routing.selection import select_experts
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.unlearning.config import UnlearningConfig

Flat = dict[str, jax.Array]


def selected_index(selected: np.ndarray) -> np.ndarray:
    """i32 [L, N]: the selected experts of each layer of bool [L, E], filled up with E."""
    number = int(selected.sum(axis=1).max())
    order = np.argsort(~selected, axis=1, kind="stable")[:, :number].astype(np.int32)
    return np.where(np.take_along_axis(selected, order, axis=1), order, np.int32(selected.shape[1]))


def chosen_experts(
    config: UnlearningConfig, calibrated: np.ndarray, forget: ExpertStatistics, retain: ExpertStatistics, *, seed: int
) -> np.ndarray | None:
    """bool [L, E], the experts that train as `config.experts` says; None where not only some experts train.

    Args:
      calibrated: bool [L, E], the experts that the calibration of the retain weights selected.
      seed: of the rule "random".
    """
    if config.experts in (None, "calibration"):
        return None if config.experts is None else calibrated
    given = {"top": config.experts_top, "scope": config.experts_scope, "mass": config.experts_mass}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return select_experts(forget, retain, rule=config.experts, seed=seed, **settings)
    except ConfigError as error:
        raise ConfigError(f"unlearning.experts is {config.experts!r}: {error}") from None


def cut_rows(arrays: Flat, index: jax.Array, config: ModelConfig, mesh: Mesh) -> Flat:
    """The experts `index` of each array [L,E,...] on the mesh: [L,N,...]."""

    def cut(array, index):
        here = array.shape[1]
        own = index - _first(array, config)
        inside = (own >= 0) & (own < here)
        rows = jax.vmap(lambda experts, places: experts[places])(array, jnp.where(inside, own, 0))
        rows = jnp.where(inside.reshape(*index.shape, *(1,) * (array.ndim - 2)), rows, 0)
        return sum_over(rows, EXPERT) if here < config.num_experts else rows

    specs = {path: param_specs(config, mesh)[path] for path in arrays}
    cuts = {path: _on(cut, mesh, (spec, P()), _shared(spec)) for path, spec in specs.items()}
    return {path: cuts[path](array, index) for path, array in arrays.items()}


def put_back(arrays: Flat, rows: Flat, index: jax.Array, config: ModelConfig, mesh: Mesh) -> Flat:
    """The arrays [L,E,...] with the rows [L,N,...] of the experts `index` in them."""
    specs = {path: param_specs(config, mesh)[path] for path in arrays}

    def put(array, rows, index):
        put_layer = functools.partial(put_rows, first=_first(array, config))
        return jax.vmap(put_layer)(array, rows.astype(array.dtype), index)

    result = {}
    for path, array in arrays.items():
        inputs = (specs[path], _shared(specs[path]), P())
        result[path] = _on(put, mesh, inputs, specs[path])(array, place(rows[path], mesh, inputs[1]), index)
    return result


def _first(array: jax.Array, config: ModelConfig) -> jax.Array | int:
    """The first expert of a device's part of an array."""
    return jax.lax.axis_index(EXPERT) * array.shape[1] if array.shape[1] < config.num_experts else 0


def _shared(spec: P) -> P:
    """The spec of rows that lie as their array does, but on every device of "expert"."""
    kept = [entry if EXPERT not in spec_axes(spec, d) or d != 1 else None for d, entry in enumerate(spec)]
    return P(*kept)


def _on(fn, mesh: Mesh, in_specs, out_specs):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
