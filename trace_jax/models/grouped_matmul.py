"""Matrix multiplication of groups of rows, each with its own weights: the one seam to the hardware.

`y[n] = x[n] @ w[g(n)]`, where rows are sorted by group and `group_sizes` says how many each group has. Every
implementation passes the same conformance test.

| implementation | runs on | product | gradient of w |
|---|---|---|---|
| `ragged` | everywhere | `jax.lax.ragged_dot`: a kernel on TPU, E times the work elsewhere | E times the work |
| `mosaic` | TPU | the kernel of `ragged_dot` | a Pallas kernel |
| `triton` | GPU | a Pallas kernel | a Pallas kernel |

`blocked`, which runs everywhere, takes the two products of a layer's experts in one loop (`blocked_experts`).

`auto` is `DEFAULTS`. docs/scaling.md, "Grouped matmul", says what each choice rests on.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from trace_jax.models.architecture import GROUPED_MATMULS
from trace_jax.parallel.mesh import as_varying, varying_axes

# CPU: as measured by benchmarks/train_step.py; never `ragged` there, which XLA expands to every group times every row.
DEFAULTS = {"cpu": "blocked", "gpu": "triton", "tpu": "mosaic"}
KERNELS = {"mosaic": "tpu", "triton": "gpu"}  # the platform that each is written for


def program_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices where there is a mesh (present or not), else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def implementations(platform: str) -> tuple[str, ...]:
    """The names that `platform` can run, "auto" included."""
    return tuple(name for name in GROUPED_MATMULS if KERNELS.get(name, platform) == platform)


def resolve_implementation(implementation: str, platform: str | None = None) -> str:
    """A concrete name for `implementation`; ValueError if there is none of this name, or `platform` can't run it."""
    platform = platform or program_platform()
    if implementation not in GROUPED_MATMULS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {', '.join(GROUPED_MATMULS)}.")
    if implementation not in implementations(platform):
        raise ValueError(
            f"grouped_matmul is {implementation!r}, which runs on {KERNELS[implementation]} only, and the program is "
            f"for {platform}; expected one of {', '.join(implementations(platform))}."
        )
    return DEFAULTS.get(platform, "blocked") if implementation == "auto" else implementation


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto", interpret: bool = False
) -> jax.Array:
    """Rows times the weights of their group.

    Args:
      x: [N, D], rows of group 0 first, then group 1, and so on.
      w: [E, D, F], of the type of x. Products are added up in float32 by the kernels.
      group_sizes: i32 [E], sum at most N. Rows beyond the sum give zeros and take no gradient.
      implementation: "ragged", or the kernel of the platform, which "auto" is where there is one.
      interpret: run a kernel on a platform it isn't for, step by step in XLA; only for tests.

    Returns:
      [N, F].
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"expected x [N,D], w [E,D,F], group_sizes [E]; got {x.shape}, {w.shape}, {group_sizes.shape}."
        )
    name = resolve_implementation(implementation, KERNELS.get(implementation) if interpret else None)
    if name not in KERNELS:
        return _without_tail(jax.lax.ragged_dot(_without_tail(x, group_sizes), w, group_sizes), group_sizes)
    x, w, group_sizes = as_varying((x, w, group_sizes), varying_axes(x, w, group_sizes))
    if name == "triton":  # Pallas is imported where it is used only
        from trace_jax.models import grouped_matmul_gpu as kernels
    else:
        from trace_jax.models import grouped_matmul_tpu as kernels
    return _by_kernels(x, w, group_sizes, kernels, interpret)


def group_of_row(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """i32 [num_rows]: group of each sorted row; E for rows beyond the sum of the sizes."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.sum((rows[:, None] >= ends[None, :]).astype(jnp.int32), axis=1)


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows per block of the blocked layout, a power of two between 8 and 256.

    Half a block per group is padding, and every block has its weights arranged for the processor once more, which costs
    as much as about 14 rows: the sum is least near the root of 28 times the mean group.
    """
    mean = max(1, num_rows // max(1, num_groups))
    return min(256, max(8, 1 << round(math.log2(28 * mean) / 2)))


def block_layout(group_sizes: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Where groups go when each starts at a multiple of `size`.

    Returns:
      (first row of each group in the padded layout i32 [E], group of each block i32 [num_blocks]). `num_blocks` is
      the most that any sizes with sum `num_rows` can need; unused blocks at the end carry the last group.
    """
    num_groups = group_sizes.shape[0]
    num_blocks = (num_rows + num_groups * (size - 1)) // size
    blocks = (group_sizes + (size - 1)) // size
    ends = jnp.cumsum(blocks)
    return (ends - blocks) * size, jnp.minimum(group_of_row(blocks, num_blocks), num_groups - 1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_kernels(x, w, group_sizes, kernels, interpret):
    return _without_tail(kernels.product(x, w, group_sizes, interpret=interpret), group_sizes)


def _by_kernels_backward(kernels, interpret, residuals, dy):
    x, w, group_sizes = residuals
    dx = kernels.product(dy, w, group_sizes, transposed=True, interpret=interpret)
    return _without_tail(dx, group_sizes), kernels.weight_gradient(x, dy, group_sizes, interpret=interpret), None


_by_kernels.defvjp(lambda *operands: (_by_kernels(*operands), operands[:3]), _by_kernels_backward)


def _without_tail(y, group_sizes):
    """Zeros in the rows beyond the groups, which kernels and some lowerings of ragged_dot don't write."""
    return jnp.where((jnp.arange(y.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes))[:, None], y, 0)
