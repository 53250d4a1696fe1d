"""Arrays between the memory of processes and the devices of all of them, and the memory of CPU runs."""

import ctypes
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

REPLICATED = P()
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's <malloc.h>
_as_keys = jax.jit(jax.random.wrap_key_data, static_argnames="impl")


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


def keep_freed_memory() -> bool:
    """Makes malloc reuse large buffers; call once, before the first computation. True if it took effect.

    XLA on CPU allocates the temporaries of a step anew each time. glibc maps such buffers from the system and unmaps
    them when freed, so that every step pays a page fault per 4 KiB: a third of the time of a small training step
    (measured by benchmarks/train_step.py). Peak memory is the same; it only isn't returned between steps. Does nothing
    where the C library isn't glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
