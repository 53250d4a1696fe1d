"""Arrays between the memory of processes and the devices of all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

REPLICATED = P()
_as_keys = jax.jit(jax.random.wrap_key_data, static_argnames="impl")


def is_main() -> bool:
    """Whether this process writes files and speaks: process 0, or the only one. Starts no device when it is alone."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def place(tree: Any, mesh: Mesh, specs: Any = REPLICATED) -> Any:
    """Host arrays, the same in every process, as arrays on the mesh.

    Args:
      specs: one `PartitionSpec` for all arrays, or a pytree of them like `tree`. Arrays that are placed so already
        are not copied.
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
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)
