"""`grouped_matmul` on TPU ("mosaic"): XLA's own kernel for the products, a Pallas kernel for the gradient of w.

XLA's TPU kernel for `jax.lax.ragged_dot` serves the product and the gradient of x; the gradient of w it expands to
every group times every row with jax 0.10.2 (docs/scaling.md). The kernel here reads rows in aligned tiles, visits a
tile that several groups share once for each, and adds a group's visits up in one accumulator. JAX's own kernels
(`pallas.ops.tpu.megablox`) do the same, but can't be traced inside `jax.shard_map` with `check_vma=True`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def tiles(num_rows: int, num_groups: int, D: int, F: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, D, F) of a tile of `weight_gradient`, each within what the 16 MiB of VMEM of a v5e hold.

    Rows are a quarter of the mean group, 128 to 512, so that tiles that groups share add a quarter to the work on
    average. Widths are cut evenly into parts of at most 1024 lanes in bfloat16 and 512 in float32, whole where less.
    """
    quarter = max(1, num_rows // max(1, num_groups) // 4)
    return min(512, max(LANES, 1 << (quarter.bit_length() - 1))), _even(D, 2048 // itemsize), _even(F, 2048 // itemsize)


def _even(width: int, most: int) -> int:
    return width if width <= most else pl.cdiv(pl.cdiv(width, pl.cdiv(width, most)), LANES) * LANES


def visits(group_sizes: jax.Array, num_tiles: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """(group, tile of rows) of each visit, i32 [num_tiles + E - 1], by group; every group has one at least, and visits
    left over repeat the last one.
    """
    ends = jnp.cumsum(group_sizes)
    first = jnp.minimum((ends - group_sizes) // rows, num_tiles - 1)
    count = jnp.where(group_sizes > 0, (ends + rows - 1) // rows - first, 1)
    ends_of_visits = jnp.cumsum(count)
    visit = jnp.arange(num_tiles + group_sizes.shape[0] - 1, dtype=jnp.int32)
    visit = jnp.minimum(visit, ends_of_visits[-1] - 1)
    group = jnp.sum((visit[:, None] >= ends_of_visits[None, :]).astype(jnp.int32), axis=1)
    return group, first[group] + visit - (ends_of_visits - count)[group]


def _weight_gradient_kernel(group, tile, starts, ends, x, dy, dw, total, *, rows: int):
    visit = pl.program_id(2)
    last = pl.num_programs(2) - 1
    here = group[visit]
    previous = jnp.maximum(visit - 1, 0)
    following = jnp.minimum(visit + 1, last)

    @pl.when((visit == 0) | (group[previous] != here))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when((visit == 0) | (group[previous] != here) | (tile[previous] != tile[visit]))  # not one that is left over
    def _():
        def own(ref):  # in f32, because not every TPU selects in bf16; both, because what lies outside may be NaN
            row = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) + tile[visit] * rows
            return jnp.where((row >= starts[here]) & (row < ends[here]), ref[...].astype(jnp.float32), 0.0)

        left, right = own(x).T.astype(x.dtype), own(dy).astype(dy.dtype)
        total[...] += jax.lax.dot(left, right, preferred_element_type=jnp.float32)

    @pl.when((visit == last) | (group[following] != here))
    def _():
        dw[...] = total[...].astype(dw.dtype)


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x [N,D] and dy [N,F] to [E,D,F]: for each group, the sum over its rows of x times dy."""
    (N, D), F, E = x.shape, dy.shape[1], group_sizes.shape[0]
    rows, tile_D, tile_F = tiles(N, E, D, F, x.itemsize)
    num_tiles = pl.cdiv(N, rows)
    group, tile = visits(group_sizes, num_tiles, rows)
    ends = jnp.cumsum(group_sizes)
    moved = x.nbytes * pl.cdiv(F, tile_F) + dy.nbytes * pl.cdiv(D, tile_D) + E * D * F * x.itemsize
    return pl.pallas_call(
        partial(_weight_gradient_kernel, rows=rows),
        out_shape=jax.ShapeDtypeStruct((E, D, F), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(D, tile_D), pl.cdiv(F, tile_F), group.shape[0]),
            in_specs=[
                pl.BlockSpec((rows, tile_D), lambda d, f, v, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((rows, tile_F), lambda d, f, v, group, tile, *_: (tile[v], f)),
            ],
            out_specs=pl.BlockSpec((None, tile_D, tile_F), lambda d, f, v, group, *_: (group[v], d, f)),
            scratch_shapes=[pltpu.VMEM((tile_D, tile_F), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * N * D * F, bytes_accessed=moved, transcendentals=0),
        name="grouped_weight_gradient",
    )(group, tile, ends - group_sizes, ends, x, dy)


def product(x, w, group_sizes, *, transposed: bool = False) -> jax.Array:
    """x [N,D] times w [E,D,F] of its row's group, or times w [E,F,D] transposed: [N,F]. The tail is undefined."""
    return jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, group_sizes)
