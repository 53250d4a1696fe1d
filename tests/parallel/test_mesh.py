"""Splitting the batch over devices changes no loss, no gradient and no count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_kl, token_nll
from trace_jax.parallel.mesh import as_varying, data_parallel, make_mesh, varying_axes

CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    num_experts=5,
    experts_per_token=2,
    expert_hidden_size=6,
    shared_hidden_size=4,
)
LOAD_BALANCE = 0.1


def losses(params, config, batch, total):
    """Summed NLL and KL plus a load-balancing term, and the counts; `total` sums over devices."""
    tokens, mask = batch["tokens"], batch["mask"]
    output = forward(params, config, tokens, mask=mask, collect=("hidden", "counts", "load", "router"))
    nll = token_nll(params, config, output.hidden, jnp.roll(tokens, -1, axis=1), chunk_size=batch_chunk(config))
    other = jax.tree.map(lambda a: a * 0.9, params)
    hidden_ref = forward(other, config, tokens, mask=mask, collect=("hidden",)).hidden
    kl = token_kl(other, hidden_ref, params, output.hidden, config, chunk_size=batch_chunk(config))
    loss = total(jnp.sum(jnp.where(mask, nll + kl, 0.0))) + LOAD_BALANCE * jnp.sum(total(output.router.load) ** 2)
    return loss, (total(output.router.counts), nll)


def batch_chunk(config):
    return 7 if config.tie_embeddings else None


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(1), (4, 10), 0, CONFIG.vocab_size)
    mask = jnp.ones((4, 10), bool).at[0, 6:].set(False).at[3].set(False)
    return {"tokens": tokens, "mask": mask}


VARIANTS = {
    "blocked": dataclasses.replace(CONFIG, grouped_matmul="blocked"),
    "blocked, tied, chunked": dataclasses.replace(CONFIG, grouped_matmul="blocked", tie_embeddings=True),
    "scan": dataclasses.replace(CONFIG, grouped_matmul="scan"),
    "dense": dataclasses.replace(CONFIG, grouped_matmul="dense"),
    "ragged": dataclasses.replace(CONFIG, grouped_matmul="ragged"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_replicated_parameters_equal_those_of_one_device(name, batch):
    config = VARIANTS[name]
    params = init_params(config, jax.random.key(0))
    # a function of params, so that every grad is with respect to what is replicated
    single = jax.jit(jax.value_and_grad(lambda p: losses(p, config, batch, lambda x: x), has_aux=True))
    (loss, (counts, nll)), gradient = single(params)

    def on_each_device(params, batch):
        def total(x):
            return jax.lax.psum(x, "data")

        return jax.value_and_grad(lambda p: losses(p, config, batch, total), has_aux=True)(params)

    for num_devices in (1, 2, 4) if name == "blocked" else (2,):
        mesh = make_mesh(jax.devices()[:num_devices])
        specs = ((PartitionSpec(), (PartitionSpec(), PartitionSpec("data"))), PartitionSpec())
        spread = jax.jit(data_parallel(on_each_device, mesh, out_specs=specs))
        (got_loss, (got_counts, got_nll)), got_gradient = spread(params, batch)
        np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
        np.testing.assert_array_equal(got_counts, counts)
        np.testing.assert_allclose(got_nll, nll, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got_gradient, gradient)


def test_argsort_is_not_used_where_gradients_lose_a_sum():
    """jnp.argsort inside shard_map is typed as equal on all devices: gradients through it silently lose a psum."""
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jnp.zeros((2, 4), jnp.int32)
    text = str(jax.make_jaxpr(lambda p: forward(p, CONFIG, tokens).logits)(params))
    assert "argsort" not in text


def test_mesh_has_one_axis_over_the_given_devices():
    assert make_mesh().devices.size == len(jax.devices()) == 4
    mesh = make_mesh(jax.devices()[:2])
    assert mesh.axis_names == ("data",) and mesh.devices.size == 2


def test_several_arguments_can_be_replicated():
    mesh = make_mesh(jax.devices()[:2])

    def weighted(a, b, x):
        return jax.lax.psum(jnp.sum(x) * a + b, "data")

    got = data_parallel(weighted, mesh, replicated=2)(jnp.float32(3), jnp.float32(1), jnp.arange(4, dtype=jnp.float32))
    assert float(got) == 6 * 3 + 2 * 1


def test_as_varying_marks_what_differs_between_devices():
    mesh = make_mesh(jax.devices()[:2])

    def check(replicated, split):
        assert varying_axes(replicated) == frozenset() and varying_axes(split) == {"data"}
        assert varying_axes(as_varying(replicated, varying_axes(replicated, split))) == {"data"}
        return split

    data_parallel(check, mesh, out_specs=PartitionSpec("data"))(jnp.zeros(()), jnp.zeros((2,)))
    assert varying_axes(jnp.zeros(2)) == frozenset()
