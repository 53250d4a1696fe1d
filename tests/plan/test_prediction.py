"""Matmul work is exact, in loops, in shard_map, through gradients and in grouped matmuls; refusals are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.plan.programs import _needed, matmul_work

N, D, F, E, LAYERS = 32, 16, 24, 4, 3
MATMUL = 2 * N * D * F


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def flops(fn, *arguments):
    return matmul_work(jax.jit(fn).trace(*arguments).jaxpr)[0]


def test_layers_in_a_scan_and_their_gradients():
    def loss(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    x, w = shape(N, D), shape(LAYERS, D, D)
    assert flops(loss, x, w) == LAYERS * 2 * N * D * D
    # Backward: two more each.
    assert flops(jax.grad(loss, argnums=(0, 1)), x, w) == 3 * LAYERS * 2 * N * D * D


def test_a_checkpointed_layer_is_computed_twice():
    def loss(x, w, v):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ v))(x))

    x, w, v = shape(N, D), shape(D, F), shape(F, D)
    assert flops(jax.grad(loss, argnums=0), x, w, v) == 2 * MATMUL + 2 * MATMUL + 2 * MATMUL


def test_grouped_matmul_counts_each_row_once():
    def loss(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    arguments = shape(N, D), shape(E, D, F), shape(E, dtype="int32")
    assert flops(loss, *arguments) == MATMUL
    assert flops(jax.grad(loss, argnums=(0, 1)), *arguments) == 3 * MATMUL
    half_empty = matmul_work(jax.jit(loss).trace(*arguments).jaxpr, filled=0.5)
    assert half_empty[0] == MATMUL / 2


def test_a_device_counts_its_own_share():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(split, shape(N, D), shape(D, F)) == MATMUL / 4


def test_full_precision_takes_six_passes_on_a_bfloat16_unit():
    def fn(x, w):
        return jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)

    for dtype, passes in (("float32", 6), ("bfloat16", 1)):
        work = matmul_work(jax.jit(fn).trace(shape(N, D, dtype=dtype), shape(D, F, dtype=dtype)).jaxpr)
        assert work.tolist() == [MATMUL, passes * MATMUL]


def test_what_the_compiler_refuses_says_what_it_needs():
    refused = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.54G of 15.75G hbm."
    assert _needed(RuntimeError(refused)) == int(22.54 * 2**30)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        _needed(RuntimeError("INTERNAL: Used 1G of 2G"))
