"""A model's parameters on a mesh: how each is stored, how it is brought together, and functions run on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.models.arrays import flat_specs, flatten, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import ROWS, axis_sizes
from trace_jax.parallel.sharding import assemble, storage_spec

STACKS = ("layers", "dense")


def param_specs(config: ModelConfig, mesh: Mesh) -> dict[str, P]:
    """How every parameter is stored on `mesh`, by path."""
    return {path: storage_spec(spec.shape, spec.axes, mesh.shape) for path, spec in _declared(config).items()}


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """`param_specs` with the mesh."""
    return {path: NamedSharding(mesh, spec) for path, spec in param_specs(config, mesh).items()}


def placed_params(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Parameters stored on `mesh`; those that are there already are not copied."""
    flat = flatten(params)
    return unflatten(place(flat, mesh, param_specs(config, mesh)))


@functools.lru_cache(maxsize=32)
def _declared(config: ModelConfig) -> Mapping[str, Any]:
    return flat_specs(config)


def assembled(tree: Any, config: ModelConfig, prefix: str = "") -> Any:
    """Parameters as a device computes with them (`trace_jax.parallel.sharding.assemble`).

    Args:
      tree: nested parameters, or those of one layer, below the path `prefix` ("layers/").
    """
    sizes, declared = axis_sizes(), _declared(config)
    if not any(size > 1 for size in sizes.values()):
        return tree

    def one(path: str, array: jax.Array) -> jax.Array:
        spec = declared[path]
        first = 1 if path.partition("/")[0] in STACKS else 0
        return assemble(array, spec.shape[first:], spec.axes[first:], sizes)

    return unflatten({path: one(prefix + path, array) for path, array in flatten(tree).items()})


def on_mesh(fn: Callable, config: ModelConfig, mesh: Mesh, *, out_specs: Any) -> Callable:
    """`fn(params, *arrays)` run on every device with its part of the parameters and its rows of the arrays.

    Args:
      fn: sums over devices itself: `jax.lax.psum(value, ROWS)`.
      out_specs: `PartitionSpec()` for outputs that are equal on all devices, `PartitionSpec(ROWS)` for per-row ones, or
        a pytree of both.
    """

    def call(params, *arrays):
        in_specs = (unflatten(param_specs(config, mesh)), *(P(ROWS) for _ in arrays))
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, *arrays)

    return call
