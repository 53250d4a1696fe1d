"""`grouped_matmul` on NVIDIA GPUs ("triton"): two Pallas kernels, with sums in float32 and no atomic addition.

Every block of rows belongs to one group (`block_layout`), but nothing is copied: a block reads and writes where its
rows are. What a tile has beyond the rows of its group, or beyond a width, is masked.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from trace_jax.models.grouped_matmul import block_layout

WIDTH_TILE, SMALLEST = 128, 16  # of an output tile; what tensor cores need at least
SUM_BYTES = 128  # of a row of the tiles that are multiplied: 64 values in bfloat16, 32 in float32


def row_tile(num_rows: int, num_groups: int) -> int:
    """Rows of a block: about the mean group, 16 to 128, a power of two."""
    mean = max(1, num_rows // max(1, num_groups))
    return min(WIDTH_TILE, max(SMALLEST, 1 << (mean.bit_length() - 1)))


def _tile(width: int, largest: int) -> int:
    return min(largest, max(SMALLEST, pl.next_power_of_2(width)))


def _read(ref, first, second, size, *where):
    """The tile ref[*where, first, second], with zeros beyond `size`; `first` is [m,1] and `second` [1,n]."""
    at = jnp.broadcast_arrays(first, second)
    inside = (at[0] < size[0]) & (at[1] < size[1])
    return plgpu.load(ref.at[(*where, *at)], mask=inside, other=0)


def _write(ref, value, first, second, size, *where):
    at = jnp.broadcast_arrays(first, second)
    inside = (at[0] < size[0]) & (at[1] < size[1])
    plgpu.store(ref.at[(*where, *at)], value.astype(ref.dtype), mask=inside)


def _span(start, size: int, axis: int):
    """start, start + 1, ...: `size` of them along `axis` of two."""
    return start + jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _product_kernel(group, start, end, x, w, y, *, rows: int, columns: int, depth: int, transposed: bool):
    block = pl.program_id(0)
    width, total_depth = y.shape[1], x.shape[1]
    row, column = _span(start[block], rows, 0), _span(pl.program_id(1) * columns, columns, 1)

    @pl.when(start[block] < end[block])
    def _():
        def add(step, total):
            left = _read(x, row, _span(step * depth, depth, 1), (end[block], total_depth))
            if transposed:
                right = _read(w, column.reshape(columns, 1), _span(step * depth, depth, 1), w.shape[1:], group[block]).T
            else:
                right = _read(w, _span(step * depth, depth, 0), column, w.shape[1:], group[block])
            return total + jax.lax.dot(left, right, preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(0, pl.cdiv(total_depth, depth), add, jnp.zeros((rows, columns), jnp.float32))
        _write(y, total, row, column, (end[block], width))


def product(x, w, group_sizes, *, transposed: bool = False) -> jax.Array:
    """x [N,D] times w [E,D,F] of its row's group, or times w [E,F,D] transposed: [N,F]. The tail is undefined."""
    (N, D), (E, F) = x.shape, (w.shape[0], w.shape[1 if transposed else 2])
    rows, columns, depth = row_tile(N, E), _tile(F, WIDTH_TILE), _tile(D, SUM_BYTES // x.itemsize)
    first, group = block_layout(group_sizes, N, rows)
    ends = jnp.cumsum(group_sizes)
    start = (ends - group_sizes - first)[group] + jnp.arange(group.shape[0], dtype=jnp.int32) * rows
    return pl.pallas_call(
        partial(_product_kernel, rows=rows, columns=columns, depth=depth, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((N, F), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid=(group.shape[0], pl.cdiv(F, columns)),
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows == WIDTH_TILE else 4, num_stages=3),
        cost_estimate=_cost(x, w, N * F),
        name="grouped_product",
    )(group, start, ends[group], x, w)


def _weight_gradient_kernel(start, end, x, dy, dw, *, rows: int, tile_D: int, tile_F: int):
    group = pl.program_id(0)
    d, f = _span(pl.program_id(1) * tile_D, tile_D, 1), _span(pl.program_id(2) * tile_F, tile_F, 1)

    def add(step, total):
        row = _span(start[group] + step * rows, rows, 0)
        left = _read(x, row, d, (end[group], x.shape[1])).T
        right = _read(dy, row, f, (end[group], dy.shape[1]))
        return total + jax.lax.dot(left, right, preferred_element_type=jnp.float32)

    steps = (end[group] - start[group] + rows - 1) // rows
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((tile_D, tile_F), jnp.float32))
    _write(dw, total, d.reshape(tile_D, 1), f, dw.shape[1:], group)


def weight_gradient(x, dy, group_sizes) -> jax.Array:
    """x [N,D] and dy [N,F] to [E,D,F]: for each group, the sum over its rows of x times dy."""
    (N, D), F, E = x.shape, dy.shape[1], group_sizes.shape[0]
    rows = min(row_tile(N, E), SUM_BYTES // x.itemsize)
    tile_D, tile_F = _tile(D, WIDTH_TILE), _tile(F, WIDTH_TILE)
    ends = jnp.cumsum(group_sizes)
    return pl.pallas_call(
        partial(_weight_gradient_kernel, rows=rows, tile_D=tile_D, tile_F=tile_F),
        out_shape=jax.ShapeDtypeStruct((E, D, F), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid=(E, pl.cdiv(D, tile_D), pl.cdiv(F, tile_F)),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        cost_estimate=_cost(x, dy, E * D * F),
        name="grouped_weight_gradient",
    )(ends - group_sizes, ends, x, dy)


def _cost(x, other, outputs):
    moved = x.nbytes + other.nbytes + outputs * x.itemsize
    return pl.CostEstimate(flops=2 * x.size * other.shape[-1], bytes_accessed=moved, transcendentals=0)
