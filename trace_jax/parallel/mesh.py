"""Devices as a mesh of three axes: where arrays lie on it, and what code that runs on every device needs to know.

"data" and "expert" share the rows of a batch; "expert" also splits the experts, "tensor" heads, hidden units and the
vocabulary. Everything runs inside one `jax.shard_map` over all three axes with its check of replication, so that a sum
that is missing is an error.

A dimension of a parameter that `RULES` names is split over its mesh axis, in storage and in computation. One further
dimension is cut over what remains of "data" and "expert" in storage only (fully sharded data parallelism): devices
gather it when they compute, and its gradient is scattered back. The shape of a stored array is always the model's own:
a dimension that its mesh axis doesn't divide is stored whole, and each device cuts its share of it, padded with zeros,
when it computes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError, Section, option

DATA, EXPERT, TENSOR = AXES = "data", "expert", "tensor"
BATCH_AXES = (DATA, EXPERT)
REPLICATED = P()
RULES = {"experts": EXPERT} | dict.fromkeys(
    ("heads", "kv_heads", "vocab", "expert_hidden", "shared_hidden", "dense_hidden"), TENSOR
)
_NEVER_PADDED = ("kv_heads",)  # fewer of them than devices: every device needs those that its query heads read
_WHOLE = ("layers", "rank")  # scanned over, and too short: never cut
_as_keys = jax.jit(jax.random.wrap_key_data, static_argnames="impl")


def make_mesh(devices: Sequence[Any] | None = None, *, data: int = 0, expert: int = 1, tensor: int = 1) -> Mesh:
    """Mesh over `devices` (default: `jax.devices()`). `data` = 0: what `expert` and `tensor` leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.

    Example:
      >>> mesh = tj.make_mesh()  # of eight devices, make_mesh(expert=4) lets four share the experts
      >>> mesh.shape["data"] == len(jax.devices())
      True
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data or max(1, len(devices) // max(1, expert * tensor)), expert, tensor)
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ConfigError(
            f"a mesh of data {sizes[0]} x expert {expert} x tensor {tensor} needs {np.prod(sizes)} devices; there are "
            f"{len(devices)}. Change parallel.data, parallel.expert or parallel.tensor so that they multiply to it."
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split; a batch is padded to a multiple of it."""
    return mesh.shape[DATA] * mesh.shape[EXPERT]


def dividing_axes(number: int, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes over which `number` things can be split evenly."""
    axes, devices = (), 1
    for name in AXES:
        if number % (devices * mesh.shape[name]) == 0:
            axes, devices = (*axes, name), devices * mesh.shape[name]
    return axes


def axis_sizes() -> dict[str, int]:
    """Sizes of the mesh axes that the code being traced is split over; empty outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.manual_axes}


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


def sum_over(x, *axes: str):
    """`x` summed over those of `axes` that it differs over; over the others it is the whole sum already."""
    differing = tuple(axis for axis in axes if axis in varying_axes(x))
    return jax.lax.psum(x, differing) if differing else x


def storage_spec(shape: tuple[int, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> P:
    """How an array with logical `axes` is stored on a mesh with `sizes` (of axes "data", "expert", "tensor")."""
    rules = zip(shape, (RULES.get(name, "") for name in axes), strict=True)
    entries: list[Any] = [(axis,) if sizes.get(axis, 1) > 1 and n % sizes[axis] == 0 else () for n, axis in rules]
    free = [name for name in BATCH_AXES if sizes.get(name, 1) > 1 and (name,) not in entries]
    inner = [d for d, name in enumerate(axes) if name not in _WHOLE]
    if len(inner) > 1:  # vectors are too small to be worth gathering
        # "embed" first: nearly every matrix has it, and no rule splits it. Else the largest that divides.
        order = sorted(inner, key=lambda d: (axes[d] != "embed", bool(entries[d]), -shape[d]))
        for cut in (free, *([name] for name in free)):
            size = math.prod(sizes[name] for name in cut)
            divided = [d for d in order if not entries[d] and shape[d] % size == 0]
            if cut and divided:
                entries[divided[0]] = tuple(cut)
                break
    while entries and not entries[-1]:  # compiled functions return it so; a longer spelling would compile them again
        entries.pop()
    return P(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def spec_axes(spec: P, dimension: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension is split."""
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def split_spec(spec: P, axes: tuple[str, ...]) -> P:
    """How an array with logical `axes` that is stored by `spec` lies once it is gathered: split by `RULES` alone."""
    split = [RULES.get(name) if RULES.get(name) in spec_axes(spec, d) else None for d, name in enumerate(axes)]
    while split and split[-1] is None:
        split.pop()
    return P(*split)


def assemble(array: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """One stored array as this device computes with it: whole but for its share of the dimensions in `RULES`.

    `array` is its part of one that lies by `storage_spec`, or by `split_spec` of that, where nothing is left to gather;
    all are without layers, `shape` of the whole.
    """
    sizes = axis_sizes()
    spec = storage_spec(shape, axes, sizes)
    for dimension, name in enumerate(axes):
        split, own = spec_axes(spec, dimension), RULES.get(name)
        gathered = tuple(axis for axis in split if axis != own)
        if gathered and array.shape[dimension] < shape[dimension] // (sizes[own] if own in split else 1):
            inner = array.shape[dimension + 1 :]
            if len(inner) > 1:  # as products read it: TPUs arrange a part of it anew, not the whole
                array = array.reshape(*array.shape[: dimension + 1], -1)
            array = jax.lax.all_gather(array, gathered, axis=dimension, tiled=True)
            array = array.reshape(*array.shape[: dimension + 1], *inner)
    for dimension, name in enumerate(axes):
        axis = RULES.get(name, "")
        stored_whole = sizes.get(axis, 1) > 1 and axis not in spec_axes(spec, dimension)
        if stored_whole and name not in _NEVER_PADDED:  # its share, with zeros beyond the end
            length, padding = share(array.shape[dimension], name), [(0, 0)] * array.ndim
            padding[dimension] = (0, length * sizes[axis] - array.shape[dimension])
            start = jax.lax.axis_index(axis) * length
            array = jax.lax.dynamic_slice_in_dim(jnp.pad(array, padding), start, length, axis=dimension)
    return array


def share(length: int, name: str) -> int:
    """How many of `length` indices of a dimension called `name` a device computes with, padding included."""
    size = axis_sizes().get(RULES.get(name, ""), 1)
    return length if name in _NEVER_PADDED and length % size else -(-length // size)


def place(tree: Any, mesh: Mesh, specs: Any = REPLICATED) -> Any:
    """Host arrays, the same in every process, as arrays on the mesh; those that are placed so already are not copied.

    `specs` is one `PartitionSpec` for all arrays, or a pytree of them like `tree`.
    """

    def one(x, spec):
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # numpy has no keys
            data = one(np.asarray(jax.random.key_data(x)), spec)
            return _as_keys(data, impl=str(jax.random.key_impl(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(specs, P):
        return jax.tree.map(lambda x: one(x, specs), tree)
    return jax.tree.map(one, tree, specs)


def to_host(tree: Any) -> Any:
    """The arrays as numpy, whole, in every process; all processes must call it."""

    def one(x):
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        return np.asarray(multihost_utils.process_allgather(x, tiled=True) if elsewhere else x)

    return jax.tree.map(one, tree)


class ParallelConfig(Section):
    """The mesh, and what a step trades between memory and time (docs/scaling.md).

    Example:
      >>> parallel = tj.ParallelConfig(remat="layer", microbatches=4)  # in `tj.unlearn`: less memory, the same numbers
      >>> parallel.data, parallel.expert
      (0, 0)
    """

    data: int = option(0, help="devices that split rows and store a share of every parameter; 0 = all left", minimum=0)
    expert: int = option(
        0, help="devices that split rows and experts; 0 = as many as let devices send each other least", minimum=0
    )
    tensor: int = option(1, help="devices that split heads, hidden units and the vocabulary", minimum=1)
    remat: str = option(
        "none",
        help="what a step computes again instead of keeping: nothing, all but matrix products, or whole layers",
        choices=("none", "dots", "layer"),
    )
    microbatches: int = option(1, help="parts of a batch whose gradients are added up one after the other", minimum=1)
    expert_buffer: float = option(
        0.0,
        help="most room for tokens of a device's experts, as a multiple of the balanced load; 0 = the worst case. "
        "Too little is an error of the step, never a dropped token",
        minimum=0.0,
    )

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """`make_mesh` of these sizes; "expert" is 1 where it is open (`chosen_mesh` knows better)."""
        return make_mesh(devices, data=self.data, expert=self.expert or 1, tensor=self.tensor)


PLAIN = ParallelConfig()
