"""Devices as a mesh, and functions run over it with the batch split.

One axis, "data", for now: parameters are replicated and every device holds a share of the batch's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

DATA = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the one axis "data" over `devices` (default: `jax.devices()`)."""
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,))


def data_parallel(fn: Callable, mesh: Mesh, *, replicated: int = 1, out_specs: Any = None) -> Callable:
    """`fn` run on every device of `mesh` with its share of the batch (`jax.shard_map`, replication checked).

    Args:
      fn: sees its first `replicated` arguments whole and the rest (pytrees of arrays) cut along their first axis,
        which must be a multiple of the device count. It sums over devices itself: `jax.lax.psum(value, "data")`.
        The gradient of an argument that is replicated comes out of `jax.grad` inside `fn` already summed.
      out_specs: `PartitionSpec()` for outputs that are equal on all devices (summed ones; the default),
        `PartitionSpec("data")` for per-row outputs, or a pytree of both.
    """

    out_specs = PartitionSpec() if out_specs is None else out_specs

    def call(*arguments):
        in_specs = tuple(PartitionSpec() if i < replicated else PartitionSpec(DATA) for i in range(len(arguments)))
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)(*arguments)

    return call


def varying_axes(*trees) -> frozenset:
    """Mesh axes over which any array of `trees` differs between devices; empty outside `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))


def as_varying(tree, axes: frozenset):
    """`tree` with every array typed as varying over `axes`; the gradient of the cast is a psum over them.

    Needed for initial values of loops, and before a `jax.custom_vjp` whose backward pass mixes replicated parameters
    with split tokens: the sum over devices then happens outside of it, by JAX's own rule.
    """

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
