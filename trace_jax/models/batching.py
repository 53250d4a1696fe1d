"""Ragged lists as arrays, and one function run over many batches, rows split over the devices."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.models.config import ModelConfig
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.hosts import place, to_host
from trace_jax.parallel.mesh import BATCH_AXES, row_shards

_PER_ROW = PartitionSpec(BATCH_AXES)


def pad(
    rows: Sequence[Any], *, fill: float = 0, width: int | None = None, count: int | None = None, dtype: Any = np.int32
) -> np.ndarray:
    """Rows of any length as one array [N, W], filled up at the end; W and N are `width` and `count` where given."""
    width = max(map(len, rows), default=0) if width is None else width
    padded = np.full((len(rows) if count is None else count, width), fill, dtype)
    for row, values in zip(padded, rows, strict=False):
        row[: len(values)] = values
    return padded


def map_batches(
    fn: Callable,
    params: Any,
    config: ModelConfig,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    mesh: Mesh | None = None,
    out_specs: Any = _PER_ROW,
    static: tuple = (),
) -> Iterator[Any]:
    """`fn(params, config, *arrays, *static)` on the host for every batch of arrays [B, ...], in order.

    The next batch is already running when one is handed out. Smaller batches, and those that the devices can't share
    evenly, are filled up with rows of zeros to the largest size before: outputs per row may be longer than the batch.

    Args:
      fn: a function of a module (it is compiled once for it). On a mesh each device runs it on its rows, and it sums
        over devices itself (`jax.lax.psum(value, BATCH_AXES)`).
      params: parameters, or a tuple of those of several models of one configuration.
      mesh: devices that share each batch; None: the default device.
      out_specs: as in `on_mesh`.
      static: hashable arguments that `fn` is compiled for.
    """
    run = compiled(fn, config, mesh, out_specs, static)
    if mesh is not None:
        several = params if isinstance(params, tuple) else (params,)
        several = tuple(placed_params(model, config, mesh) for model in several)
        params = several if isinstance(params, tuple) else several[0]
    shards, size, waiting = 1 if mesh is None else row_shards(mesh), 0, []
    for arrays in batches:
        size = max(size, -(-len(arrays[0]) // shards) * shards)
        arrays = tuple(np.pad(x, ((0, size - len(x)), *[(0, 0)] * (np.ndim(x) - 1))) for x in map(np.asarray, arrays))
        waiting.append(run(params, *(arrays if mesh is None else place(arrays, mesh, _PER_ROW))))
        if len(waiting) > 1:
            yield to_host(waiting.pop(0))
    if waiting:
        yield to_host(waiting.pop())


@functools.lru_cache(maxsize=32)
def compiled(fn: Callable, config: ModelConfig, mesh: Mesh | None, out_specs: Any, static: tuple = ()) -> Any:
    """The compiled `fn` of `map_batches`: (parameters, *arrays) -> outputs."""

    def run(params, *arrays):
        return fn(params, config, *arrays, *static)

    return jax.jit(run if mesh is None else on_mesh(run, config, mesh, out_specs=out_specs))
