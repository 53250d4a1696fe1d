"""Where the dimensions of a parameter lie on the mesh, and how a device brings together what it computes with.

A dimension that `RULES` names is split over its mesh axis, in storage and in computation. One further dimension is cut
over what remains of "data" and "expert" in storage only (fully sharded data parallelism): devices gather it when they
compute, and its gradient is scattered back. The shape of a stored array is always the model's own: a dimension that
its mesh axis doesn't divide is stored whole, and each device cuts its share of it, padded with zeros, when it computes.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from trace_jax.parallel.mesh import DATA, EXPERT, TENSOR

RULES: Mapping[str, str] = {
    "experts": EXPERT,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "vocab": TENSOR,
    "expert_hidden": TENSOR,
    "shared_hidden": TENSOR,
    "dense_hidden": TENSOR,
}
NEVER_PADDED = ("kv_heads",)  # fewer of them than devices: every device needs those that its query heads read
WHOLE = ("layers", "rank")  # scanned over, and too short: never cut


def storage_spec(shape: tuple[int, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an array with logical `axes` is stored on a mesh with `sizes` (of axes "data", "expert", "tensor")."""
    entries: list[tuple[str, ...]] = [()] * len(shape)
    free = [name for name in (DATA, EXPERT) if sizes.get(name, 1) > 1]
    for dimension, name in enumerate(axes):
        axis = RULES.get(name)
        if axis is not None and sizes.get(axis, 1) > 1 and shape[dimension] % sizes[axis] == 0:
            entries[dimension] = (axis,)
            free = [other for other in free if other != axis]
    inner = [d for d, name in enumerate(axes) if name not in WHOLE]
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
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def spec_axes(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension is split."""
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def assemble(array: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> jax.Array:
    """One stored array as this device computes with it: whole but for its share of the dimensions in `RULES`.

    Args:
      array: this device's part of an array that is stored by `storage_spec(shape, axes, sizes)`, its layers cut off.
      shape, axes: of the whole array, without layers.
      sizes: of the mesh axes (`axis_sizes`); what isn't on the mesh leaves the array as it is.
    """
    spec = storage_spec(shape, axes, sizes)
    for dimension, name in enumerate(axes):
        gathered = tuple(axis for axis in spec_axes(spec, dimension) if axis != RULES.get(name))
        if gathered:
            array = jax.lax.all_gather(array, gathered, axis=dimension, tiled=True)
    for dimension, name in enumerate(axes):
        axis = RULES.get(name, "")
        stored_whole = sizes.get(axis, 1) > 1 and axis not in spec_axes(spec, dimension)
        if stored_whole and name not in NEVER_PADDED:  # its share, with zeros beyond the end
            length, padding = -(-array.shape[dimension] // sizes[axis]), [(0, 0)] * array.ndim
            padding[dimension] = (0, length * sizes[axis] - array.shape[dimension])
            start = jax.lax.axis_index(axis) * length
            array = jax.lax.dynamic_slice_in_dim(jnp.pad(array, padding), start, length, axis=dimension)
    return array


def assembled_shape(shape: tuple[int, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of what `assemble` returns."""
    return tuple(share(n, name, sizes) if name in RULES else n for n, name in zip(shape, axes, strict=True))


def share(length: int, name: str, sizes: Mapping[str, int]) -> int:
    """How many indices of the dimension called `name` a device computes with, padding included."""
    size = sizes.get(RULES[name], 1)
    return length if name in NEVER_PADDED and length % size else -(-length // size)
