"""What the routers read: the very vectors that their scores are made of, on every device those of its rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh, place, to_host

CONFIG = ModelConfig(
    vocab_size=31, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_size=4, num_experts=8,
    experts_per_token=2, expert_hidden_size=5,
)  # fmt: skip
VARIANTS = {
    "plain": CONFIG,
    "norm after": dataclasses.replace(CONFIG, norm_placement="post"),
    "dense layer, bias": dataclasses.replace(CONFIG, dense_layers=(1,), dense_hidden_size=6, router_bias=True),
    "bfloat16": dataclasses.replace(CONFIG, dtype="bfloat16"),
}
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, 31)


@pytest.mark.parametrize("name", VARIANTS)
def test_they_times_the_router_are_its_scores(name):
    config = VARIANTS[name]
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape, x.dtype), params)
    run = jax.jit(forward, static_argnames=("config", "collect"))
    router = run(params, config, TOKENS, collect=("router_inputs", "router_logits")).router
    assert router.inputs.shape == (len(config.moe_layers), 4, 9, 16) and router.inputs.dtype == config.dtype
    for layer, inputs in enumerate(router.inputs):
        scores = np.asarray(inputs.astype(jnp.float32)) @ np.asarray(params["layers"]["router"][layer])
        scores = scores + (np.asarray(params["layers"]["router_bias"][layer]) if config.router_bias else 0)
        np.testing.assert_allclose(scores, router.logits[layer], atol=2e-5)
    assert run(params, config, TOKENS).router.inputs is None


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_on_a_mesh_they_are_those_of_each_devices_rows(sizes):
    data, expert, tensor = sizes
    mesh = make_mesh(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)
    params = init_params(CONFIG, jax.random.key(0))

    def collect(params, tokens):
        return forward(params, CONFIG, tokens, collect=("router_inputs",)).router.inputs

    run = jax.jit(on_mesh(collect, CONFIG, mesh, out_specs=P(None, BATCH_AXES)))
    inputs = run(placed_params(params, CONFIG, mesh), place(TOKENS, mesh, P(BATCH_AXES)))
    np.testing.assert_allclose(to_host(inputs), jax.jit(collect)(params, TOKENS), atol=1e-5)
