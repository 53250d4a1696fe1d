"""Every grouped_matmul is the same function: a plain loop over groups in numpy, in value and in both gradients."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.models import grouped_matmul as grouped
from trace_jax.models import grouped_matmul_gpu, grouped_matmul_tpu
from trace_jax.models.architecture import GROUPED_MATMULS

IMPLEMENTATIONS = [name for name in GROUPED_MATMULS if name not in ("auto", "blocked")]  # that: test_moe
NUM_ROWS, D, F = 45, 5, 3
GROUPS = {
    "even": [9, 9, 9, 9, 9],
    "uneven": [1, 17, 3, 20, 4],
    "empty group": [20, 0, 10, 15, 0],
    "one group takes all": [0, 0, 45, 0, 0],
    "padded tail": [4, 6, 0, 10, 5],
    "uneven tail": [11, 0, 13, 7, 1],
    "nothing": [0, 0, 0, 0, 0],
}


def arrays(num_groups):
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in ((NUM_ROWS, D), (num_groups, D, F), (NUM_ROWS, F))]


def loop_over_groups(x, w, cotangent, sizes):
    """(y, gradient of x, gradient of w) in float64."""
    x, w, cotangent = (a.astype(np.float64) for a in (x, w, cotangent))
    y, gradient_x, gradient_w = np.zeros((NUM_ROWS, F)), np.zeros_like(x), np.zeros_like(w)
    for group, rows in enumerate(np.split(np.arange(NUM_ROWS), np.cumsum(sizes))[:-1]):
        y[rows] = x[rows] @ w[group]
        gradient_x[rows] = cotangent[rows] @ w[group].T
        gradient_w[group] = x[rows].T @ cotangent[rows]
    return y, gradient_x, gradient_w


def value_and_gradients(x, w, cotangent, sizes, implementation):
    y, pullback = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *pullback(cotangent)


@pytest.fixture
def on_its_platform(implementation, monkeypatch):
    """As on the platform that a kernel is for, but step by step in XLA."""
    monkeypatch.setattr(grouped, "program_platform", lambda: grouped.KERNELS.get(implementation, "cpu"))
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


@cache
def compiled(implementation):
    return jax.jit(partial(value_and_gradients, implementation=implementation))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_its_platform")
def test_conformance(implementation, dtype):
    for name, sizes in GROUPS.items():
        arguments = [a.astype(dtype) for a in arrays(len(sizes))]
        for rows in arguments[::2]:
            rows[sum(sizes) :] = np.inf  # beyond the groups they are ignored whatever they hold
        got = compiled(implementation)(*arguments, jnp.asarray(sizes, jnp.int32))
        for part, actual, wanted in zip(("y", "dx", "dw"), got, loop_over_groups(*arguments, sizes), strict=True):
            actual, wanted = (a if part == "dw" else a[: sum(sizes)] for a in (actual, wanted))
            assert actual.dtype == dtype
            tolerance = 2e-5 if dtype == "float32" else 2**-6 * np.max(np.abs(wanted), initial=1)
            np.testing.assert_allclose(actual.astype(jnp.float32), wanted, atol=tolerance, err_msg=f"{name}: {part}")


def plain_weight_gradient(x, dy, group_sizes):
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x), dtype=jnp.int32), side="right")
    own = jax.nn.one_hot(group, group_sizes.shape[0], dtype=x.dtype)
    return jnp.einsum("ne,nd,nf->edf", own, x, dy)


def spread_over(mesh, implementation, of_sizes):
    """The compiled value and gradients with rows split over the axis "data" of a mesh."""
    step, rows = partial(value_and_gradients, implementation=implementation), P("data")
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(rows, P(), rows, of_sizes), out_specs=(rows, rows, P())))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_its_platform")
def test_gradient_of_replicated_weights_is_the_sum_over_devices(implementation, monkeypatch):
    for kernels in (grouped_matmul_gpu, grouped_matmul_tpu):
        # Pallas can't interpret a kernel inside shard_map with check_vma; all around the kernels is real.
        monkeypatch.setattr(kernels, "product", grouped_matmul_tpu.product)  # XLA's own
        monkeypatch.setattr(kernels, "weight_gradient", plain_weight_gradient)
    mesh = Mesh(jax.devices()[:2], ("data",), axis_types=(AxisType.Auto,))
    sizes = np.asarray([GROUPS["uneven tail"], GROUPS["empty group"]], np.int32)
    x, w, cotangent = arrays(5)
    first, second = (x, w, cotangent, sizes[0]), (x[::-1], w, cotangent[::-1], sizes[1])
    wanted = list(zip(loop_over_groups(*first), loop_over_groups(*second), strict=True))
    x, _, cotangent, sizes = map(np.concatenate, zip(first, second, strict=True))
    got = spread_over(mesh, implementation, P("data"))(x, w, cotangent, sizes)
    for actual, parts in zip(got[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(actual, np.concatenate(parts), atol=2e-5)
    np.testing.assert_allclose(got[2], sum(wanted[2]), atol=4e-5)


def test_blocks_grow_with_the_root_of_the_mean_group_and_tiles_follow_group_width_and_type():
    assert [grouped.block_size(*n) for n in ((8192, 16), (320, 16), (4, 64), (2**20, 8))] == [128, 32, 4, 256]
    assert grouped_matmul_tpu.tiles(32768, 64, 2048, 1408, 2) == (128, 1024, 768)
    assert grouped_matmul_tpu.tiles(8192, 8, 4096, 7168, 2) == (256, 1024, 1024)
    assert grouped_matmul_tpu.tiles(32768, 8, 2048, 704, 4) == (512, 512, 384)
    assert grouped_matmul_tpu.tiles(64, 16, 64, 300, 4) == (128, 64, 300)


def test_every_platform_has_a_default_that_it_can_run():
    for platform, others in (("cpu", {"mosaic", "triton"}), ("gpu", {"mosaic"}), ("tpu", {"triton"})):
        assert set(grouped.implementations(platform)) == set(GROUPED_MATMULS) - others
        assert grouped.resolve_implementation("auto", platform) == grouped.DEFAULTS[platform] not in others
    assert grouped.resolve_implementation("auto", "unheard-of") == "blocked"


def mesh_of(platform, kind="any"):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize("name, platform", [("cpu", "cpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("tpu", "tpu")])
def test_the_platform_is_that_of_the_mesh_where_there_is_one(name, platform):
    assert grouped.program_platform() == jax.devices()[0].platform == "cpu"
    with jax.sharding.use_abstract_mesh(mesh_of(name)):
        assert grouped.program_platform() == platform
        assert grouped.resolve_implementation("auto") == grouped.DEFAULTS[platform]


def on_devices_that_are_not_here(platform, kind, *shapes, dtype):
    """StableHLO of value and gradients with "auto", rows split over two devices of `platform`: text."""
    mesh, lowering = mesh_of(platform, kind), "cuda" if platform == "gpu" else platform
    types, specs = (dtype, dtype, dtype, jnp.int32), (P("data"), P(), P("data"), P())
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=p) for s, t, p in zip(shapes, types, shardings, strict=True)]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = spread_over(mesh, "auto", P()).trace(*arguments)
        return traced.lower(lowering_platforms=(lowering,)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # from jax 0.12 on
@pytest.mark.parametrize(
    ("N", "D", "F", "E", "dtype"),
    [(8192, 2048, 1408, 60, "bfloat16"), (2000, 300, 100, 7, "float32")],  # a real layer; no tile divides
)
def test_kernels_lower_inside_shard_map_for_devices_that_are_not_here(N, D, F, E, dtype):
    shapes = (N, D), (E, D, F), (N, F), (E,)
    gpu = on_devices_that_are_not_here("gpu", "NVIDIA H100 80GB HBM3", *shapes, dtype=dtype)
    assert gpu.count("custom_call @__gpu$xla.gpu.triton") == 3  # the product, both gradients
    tpu = on_devices_that_are_not_here("tpu", "TPU v5 lite", *shapes, dtype=dtype)
    assert tpu.count("custom_call @tpu_custom_call") == 1 and tpu.count('"chlo.ragged_dot"(') == 2


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_every_tile_is_visited_once_for_each_group_in_it(sizes):
    for rows in (4, 8, 64):
        num_tiles = -(-NUM_ROWS // rows)
        group, tile = grouped_matmul_tpu.visits(jnp.asarray(sizes, jnp.int32), num_tiles, rows)
        visited = list(zip(group.tolist(), tile.tolist(), strict=True))
        distinct = list(dict.fromkeys(visited))
        assert visited == distinct + distinct[-1:] * (len(visited) - len(distinct))
        ends = np.cumsum(sizes)
        wanted = {(e, n // rows) for e, end in enumerate(ends) for n in range(end - sizes[e], end)}
        assert wanted <= set(distinct) and {e for e, _ in distinct} == set(range(len(sizes)))
        assert len(distinct) == len(wanted) + sizes.count(0)
        assert [e for e, _ in distinct] == sorted(e for e, _ in distinct)
        assert all(0 <= t < num_tiles for t in tile.tolist())


RUNS = {"triton": ", which runs on gpu only, .* for cpu", "mosaic": ", which runs on tpu only", "fast": ""}


@pytest.mark.parametrize("implementation", RUNS)
def test_implementations_that_cannot_run_are_named(implementation):
    with pytest.raises(ValueError, match=f"'{implementation}'{RUNS[implementation]}.*; expected one of auto, blocked"):
        grouped.resolve_implementation(implementation)
