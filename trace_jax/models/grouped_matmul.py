"""Matrix multiplication of groups of rows, each with its own weights: the one seam to the hardware.

`y[n] = x[n] @ w[g(n)]`, where rows are sorted by group and `group_sizes` says how many each group has. Every
implementation passes the same conformance test. `auto` is `DEFAULTS`; docs/scaling.md, "Grouped matmul", says what each
choice rests on.

| implementation | runs on | product | gradient of w |
|---|---|---|---|
| `ragged` | everywhere | `jax.lax.ragged_dot`: a kernel on TPU, E times the work elsewhere | E times the work |
| `mosaic` | TPU | the kernel of `ragged_dot` | a Pallas kernel |
| `triton` | GPU | a Pallas kernel | a Pallas kernel |
| `blocked` | everywhere | both products of a layer's experts in one loop (`blocked_experts`) | another loop |
"""

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
    """A concrete name for `implementation`; ValueError if `platform` can't run one of this name."""
    platform = platform or program_platform()
    if implementation not in implementations(platform):
        only = f", which runs on {KERNELS[implementation]} only," if implementation in KERNELS else ""
        expected = f"expected one of {', '.join(implementations(platform))}"
        raise ValueError(f"grouped_matmul is {implementation!r}{only} and the program is for {platform}; {expected}.")
    return DEFAULTS.get(platform, "blocked") if implementation == "auto" else implementation


def grouped_matmul(x, w, group_sizes, *, implementation: str = "auto", interpret: bool = False) -> jax.Array:
    """[N, F]: rows x [N, D] times the weights w [E, D, F] of their group, in one type; kernels add up in float32.

    Args:
      group_sizes: i32 [E], sum at most N. Rows beyond the sum give zeros and take no gradient.
      implementation: "ragged", or the kernel of the platform, which "auto" is where there is one.
      interpret: run a kernel on a platform it isn't for, step by step in XLA; only for tests.
    """
    name = resolve_implementation(implementation, KERNELS.get(implementation) if interpret else None)
    if name not in KERNELS:
        return _without_tail(jax.lax.ragged_dot(_without_tail(x, group_sizes), w, group_sizes), group_sizes)
    x, w, group_sizes = as_varying((x, w, group_sizes), varying_axes(x, w, group_sizes))
    if name == "triton":  # Pallas is imported where it is used only
        from trace_jax.models import grouped_matmul_gpu as kernels
    else:
        from trace_jax.models import grouped_matmul_tpu as kernels
    return _by_kernels(x, w, group_sizes, kernels, interpret)


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
