"""Every grouped_matmul is the same function: a plain loop over groups in numpy, in value and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.models.config import GROUPED_MATMULS
from trace_jax.models.grouped_matmul import (
    block_layout,
    block_size,
    default_implementation,
    group_of_row,
    grouped_matmul,
    resolve_implementation,
)

IMPLEMENTATIONS = [name for name in GROUPED_MATMULS if name != "auto"]
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
    x, w = rng.normal(size=(NUM_ROWS, D)), rng.normal(size=(num_groups, D, F))
    return (x.astype(np.float32), w.astype(np.float32), rng.normal(size=(NUM_ROWS, F)).astype(np.float32))


def loop_over_groups(x, w, cotangent, sizes):
    """(y, gradient of x, gradient of w) in float64."""
    x, w, cotangent = (a.astype(np.float64) for a in (x, w, cotangent))
    y, gradient_x, gradient_w = np.zeros((NUM_ROWS, F)), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows] = x[rows] @ w[group]
        gradient_x[rows] = cotangent[rows] @ w[group].T
        gradient_w[group] = x[rows].T @ cotangent[rows]
        start += size
    return y, gradient_x, gradient_w


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_conformance(implementation):
    def value_and_gradients(x, w, cotangent, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *pullback(cotangent)

    compiled = jax.jit(value_and_gradients)
    for name, sizes in GROUPS.items():
        x, w, cotangent = arrays(len(sizes))
        got = compiled(x, w, cotangent, jnp.asarray(sizes, jnp.int32))
        for part, actual, wanted in zip(("y", "dx", "dw"), got, loop_over_groups(x, w, cotangent, sizes), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-5, err_msg=f"{implementation}, {name}: {part}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_beyond_the_groups_are_ignored_whatever_they_hold(implementation):
    x, w, _ = arrays(3)
    sizes = jnp.asarray([5, 0, 8], jnp.int32)
    x[13:] = np.inf

    def total(x, w):
        y = grouped_matmul(x, w, sizes, implementation=implementation)
        return jnp.sum(y), y

    (gradient_x, gradient_w), y = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.asarray(x), jnp.asarray(w))
    assert np.all(np.asarray(y[13:]) == 0)
    assert np.all(np.asarray(gradient_x[13:]) == 0)
    assert np.all(np.isfinite(gradient_w))


def test_group_of_row_counts_like_repeat():
    sizes = [3, 0, 2, 4]
    expected = np.concatenate([np.repeat(np.arange(4), sizes), [4, 4]])
    np.testing.assert_array_equal(group_of_row(jnp.asarray(sizes, jnp.int32), 11), expected)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_block_layout_gives_each_group_whole_blocks_of_its_own(size):
    for sizes in ([7, 0, 12, 1], [0, 0, 20, 0], [5, 5, 5, 5], [1, 1, 1, 17]):
        first, block_group = block_layout(jnp.asarray(sizes, jnp.int32), 20, size)
        owner = np.asarray(block_group)
        for group, count in enumerate(sizes):
            assert first[group] % size == 0
            rows = int(first[group]) + np.arange(count)
            assert np.all(owner[rows // size] == group)


def test_block_size_follows_the_mean_group():
    assert block_size(8192, 16) == 64
    assert block_size(320, 16) == 16
    assert block_size(4, 64) == 8


def test_auto_is_never_ragged_on_a_cpu():
    assert default_implementation("cpu") not in ("ragged", "auto")
    assert resolve_implementation("auto") == default_implementation(jax.default_backend())
    for platform in ("cpu", "gpu", "tpu", "unheard-of"):
        assert default_implementation(platform) in IMPLEMENTATIONS


def test_wrong_arguments_are_named():
    x, w, _ = arrays(3)
    with pytest.raises(ValueError, match="expected one of"):
        grouped_matmul(x, w, jnp.zeros(3, jnp.int32), implementation="fast")
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(x, w, jnp.zeros(2, jnp.int32), implementation="dense")
