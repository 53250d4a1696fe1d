"""A model's parameters on a mesh: how each is stored, how it is brought together, and functions run on every device.

Where a part of an array trains without a gradient or optimizer state for the rest, it is given as a `Delta`: with some
of its experts in an array of their own, or with the product of two small factors to be added to it. It becomes a plain
array layer by layer, where it is used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.models.arrays import ArraySpec, flat_specs, flatten, low_rank, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.parallel.hosts import place
from trace_jax.parallel.mesh import BATCH_AXES, EXPERT, axis_sizes
from trace_jax.parallel.sharding import assemble, assembled_shape, storage_spec

STACKS = ("layers", "dense")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array", "rows", "index", "a", "b"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Delta:
    """`array` and what changes it, of all layers or of one.

    Either `rows` [L,N,...] in the places of the experts `index` i32 [L,N] (E: in none) of `array` [L,E,...]; or the
    product of `a` [..., inputs, R] and `b` [..., R, outputs], added to `array` [..., inputs, outputs].
    """

    array: jax.Array
    rows: Any = None
    index: Any = None
    a: Any = None
    b: Any = None


def merged(array: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`array` + `a` `b` in the type of `array`: [..., inputs, outputs] and factors, without layers. The sum is float32.

    Which axes are inputs follows from the shapes: those that `a` has before its last. Where there are experts, both
    factors have them in front.
    """
    stacked = a.ndim + b.ndim - 2 - array.ndim  # 1 where there are experts: counted in both factors
    left, right = (*a.shape[:stacked], -1, a.shape[-1]), (*b.shape[: stacked + 1], -1)
    batch = tuple(range(stacked))
    product = jax.lax.dot_general(
        a.reshape(left), b.reshape(right), (((stacked + 1,), (stacked,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return (array.astype(jnp.float32) + product.reshape(array.shape)).astype(array.dtype)


def merging_shapes(tree: Any, config: ModelConfig, prefix: str = "") -> frozenset[tuple[tuple[int, ...], ...]]:
    """The shapes of what is multiplied, and of what is added, where parameters are merged on a device (one layer).

    tree, prefix: as for `assembled`; a backward pass need not keep results of these operations.
    """
    sizes, declared, shapes = axis_sizes(), _declared(config), set()
    for path, leaf in flatten(tree).items():
        if isinstance(leaf, Delta) and leaf.index is None:
            spec = declared[prefix + path]
            pair = (*low_rank(spec, leaf.a.shape[-1]), spec)
            a, b, array = (assembled_shape(s.shape[1:], s.axes[1:], sizes) for s in pair)
            stacked = spec.sides[0] - 1
            left = (*a[:stacked], math.prod(a[stacked:-1]), a[-1])
            right = (*b[: stacked + 1], math.prod(b[stacked + 1 :]))
            shapes |= {(left, right), (array, array)}
    return frozenset(shapes)


def expert_rows(spec: ArraySpec, number: int) -> ArraySpec:
    """Declaration of `number` experts a layer apart from the others. No "experts": every device gets those of all."""
    return dataclasses.replace(
        spec, shape=(spec.shape[0], number, *spec.shape[2:]), axes=(spec.axes[0], "rows", *spec.axes[2:])
    )


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

    Beside experts of which some are the rows of a `Delta`, "trained" bool [E] says which: the others need no gradient.

    Args:
      tree: nested parameters, or those of one layer, below the path `prefix` ("layers/").
    """
    sizes, declared, result = axis_sizes(), _declared(config), {}
    for path, leaf in flatten(tree).items():
        spec, first = declared[prefix + path], 1 if (prefix + path).partition("/")[0] in STACKS else 0

        def whole(array, spec, first=first):
            return assemble(array, spec.shape[first:], spec.axes[first:], sizes)

        if not isinstance(leaf, Delta):
            result[path] = whole(leaf, spec)
        elif leaf.index is None:
            a, b = low_rank(spec, leaf.a.shape[-1])
            result[path] = merged(whole(leaf.array, spec), whole(leaf.a, a), whole(leaf.b, b))
        else:
            rows, array = whole(leaf.rows, expert_rows(spec, leaf.index.shape[-1])), whole(leaf.array, spec)
            here = array.shape[0]
            start = jax.lax.axis_index(EXPERT) * here if sizes.get(EXPERT, 1) > 1 else 0
            result[path] = put_rows(array, rows, leaf.index, first=start)
            expert = start + jnp.arange(here, dtype=jnp.int32)
            mask = jnp.any(leaf.index[:, None] == expert[None], axis=0)
            result[f"{path.rpartition('/')[0]}/trained"] = mask
    return unflatten(result)


def put_rows(array: jax.Array, rows: jax.Array, index: jax.Array, *, first: jax.Array | int = 0) -> jax.Array:
    """Experts from `first` on [E,...] with `rows` [N,...] in the places of those of `index` i32 [N] that are here."""
    here = array.shape[0]
    own = (index >= first) & (index < first + here)
    return array.at[jnp.where(own, index - first, here)].set(rows, mode="drop")


def on_mesh(fn: Callable, config: ModelConfig, mesh: Mesh, *, out_specs: Any) -> Callable:
    """`fn(params, *arrays)` run on every device with its part of the parameters and its rows of the arrays.

    `params` may also be a tuple: the parameters of several models of this configuration.

    Args:
      fn: sums over devices itself: `jax.lax.psum(value, BATCH_AXES)`.
      out_specs: `PartitionSpec()` for outputs that are equal on all devices, `PartitionSpec(BATCH_AXES)` for per-row
        ones, or a pytree of both.
    """

    def call(params, *arrays):
        specs = unflatten(param_specs(config, mesh))
        specs = tuple(specs for _ in params) if isinstance(params, tuple) else specs
        in_specs = (specs, *(P(BATCH_AXES) for _ in arrays))
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, *arrays)

    return call
