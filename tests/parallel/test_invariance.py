"""The same numbers on any mesh: counts exactly, losses, gradients, steps and decoding to float tolerance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.arrays import flatten, init_params, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import generate
from trace_jax.models.loss import token_kl, token_nll
from trace_jax.models.sharding import on_mesh, param_specs, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, make_mesh, place, to_host
from trace_jax.unlearning import optimizer as optimizer_module
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants, coefficients
from trace_jax.unlearning.step import initial_state, row_multiple, unlearning_settings, unlearning_step

EVEN = {
    "vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 8,
    "num_experts": 8, "experts_per_token": 2, "expert_hidden_size": 12, "shared_hidden_size": 8,
}  # fmt: skip
ODD = EVEN | {"vocab_size": 61, "num_experts": 7, "expert_hidden_size": 9, "num_heads": 3, "num_kv_heads": 1}
MODELS = {
    "even": ModelConfig(**EVEN),
    "odd": ModelConfig(**ODD),
    "biases": ModelConfig(
        **ODD | {"num_heads": 6, "num_kv_heads": 3}, qk_norm="full", attention_bias="all", expert_bias=True,
        mlp_bias=True, sinks=True, head_bias=True, tie_embeddings=True, attention_gate=True, shared_gate=True,
    ),
    "latent": ModelConfig(
        **EVEN | {"num_layers": 3}, attention="latent", latent_size=8, rotary_size=4, query_latent_size=8, value_size=6,
        dense_layers=(0,), dense_hidden_size=10, router_score="sigmoid", router_correction=True,
    ),
    "ragged": ModelConfig(**EVEN, grouped_matmul="ragged"),
}  # fmt: skip
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]  # the gradients below are on others


def mesh_of(sizes):
    data, expert, tensor = sizes
    return make_mesh(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)


def parameters(config):
    """First values, with something added so that no bias is zero and no norm is one."""
    params = init_params(config, jax.random.key(0))
    keys = unflatten({path: jax.random.fold_in(jax.random.key(1), i) for i, path in enumerate(flatten(params))})
    return jax.tree.map(lambda x, key: x + 0.05 * jax.random.normal(key, x.shape, x.dtype), params, keys)


def rows(config, count, seed, length=12):
    """Rows with padding and with two documents in one."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (count, length)).astype(np.int32)
    segments = np.ones(tokens.shape, np.int32)
    segments[0, -3:], segments[1, 5:] = 0, 2
    return Batch(tokens, segments, segments > 0)


def losses(params, config, other, batch, chunk, total):
    out = forward(params, config, batch.tokens, mask=batch.segments, collect=("hidden", "counts", "load"))
    targets = jnp.roll(batch.tokens, -1, axis=1)
    nll = token_nll(params, config, out.hidden, targets, chunk_size=chunk)
    hidden_other = forward(other, config, batch.tokens, mask=batch.segments, collect=("hidden",)).hidden
    kl = token_kl(other, hidden_other, params, out.hidden, config, chunk_size=chunk)
    value = total(jnp.where(batch.valid, nll + kl, 0.0).sum()) + 0.1 * (total(out.router.load) ** 2).sum()
    return value, total(out.router.counts)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("even", (2, 2, 2)), ("odd", (1, 4, 2)), ("biases", (2, 2, 2)), ("latent", (1, 2, 4)), ("ragged", (1, 4, 1))],
)
def test_every_gradient_is_that_of_one_device(name, sizes):
    config, mesh, chunk = MODELS[name], mesh_of(sizes), 7 if name == "biases" else None
    params, batch = parameters(config), rows(config, 8, 0)

    def gradient(params, batch, total):
        other = jax.tree.map(lambda x: 0.9 * x, params)
        return jax.value_and_grad(lambda p: losses(p, config, other, batch, chunk, total), has_aux=True)(params)

    (value, counts), expected = jax.jit(lambda p: gradient(p, batch, lambda x: x))(params)
    out_specs = ((P(), P()), unflatten(param_specs(config, mesh)))
    spread = on_mesh(
        lambda p, b: gradient(p, b, lambda x: jax.lax.psum(x, BATCH_AXES)), config, mesh, out_specs=out_specs
    )
    (got_value, got_counts), got = jax.jit(spread)(placed_params(params, config, mesh), batch)
    np.testing.assert_array_equal(got_counts, counts)
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    for path, wanted in flatten(expected).items():
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(flatten(got)[path], wanted, atol=2e-5 * scale, err_msg=path)


def trajectory(config, sizes, steps, parallel=PLAIN, **optimizer):
    """(losses and gradient norms [steps, 2], parameters after the last step) of unlearning on a mesh."""
    mesh, start = mesh_of(sizes), flatten(parameters(config))
    unlearning = UnlearningConfig(
        objective="npo", retain_loss="kl", alpha=3.0, learning_rate=3e-3, clip_norm=1.0, **optimizer
    )
    settings = unlearning_settings(unlearning, config, parallel)
    placed = place(start, mesh, param_specs(config, mesh))
    constants = Constants(placed, None, None, place(coefficients(unlearning), mesh))
    multiple = row_multiple(settings, mesh)
    state = initial_state({path: leaf * 1.05 for path, leaf in placed.items()}, settings, mesh)
    forget, retain = (pad_rows(rows(config, count, count), multiple) for count in (6, 8))
    weights = np.random.default_rng(0).exponential(size=(8, 12)).astype(np.float32)
    weights = np.pad(weights, ((0, len(retain.tokens) - 8), (0, 0)))
    inputs, metrics = place(StepRows(forget, retain, weights), mesh, P(BATCH_AXES)), []
    compiled = unlearning_step._cache_size()
    for _ in range(steps):
        state, now = unlearning_step(state, constants, inputs, settings=settings, mesh=mesh)
        metrics.append([float(now["loss"]), float(now["gradient_norm"])])
    assert unlearning_step._cache_size() == compiled + 1
    return np.array(metrics), to_host(state.trainable), now


@pytest.fixture(scope="module")
def ragged_on_one_device():
    """The oracle: every expert on every token, one device, 10 steps."""
    return trajectory(ModelConfig(**EVEN, grouped_matmul="ragged"), (1, 1, 1), 10)


@pytest.mark.parametrize("sizes", MESHES)
def test_ten_steps_are_those_of_the_ragged_product_on_one_device(sizes, ragged_on_one_device):
    metrics, params, _ = trajectory(MODELS["even"], sizes, 10)
    np.testing.assert_allclose(metrics, ragged_on_one_device[0], rtol=1e-4)
    for path, wanted in ragged_on_one_device[1].items():
        np.testing.assert_allclose(params[path], wanted, atol=2e-3, err_msg=path)


@pytest.mark.parametrize(
    ("sizes", "parallel"),
    [
        ((2, 2, 2), ParallelConfig(remat="layer", microbatches=2)),
        ((1, 4, 2), ParallelConfig(remat="dots", expert_buffer=4.0)),
    ],
)
def test_memory_saved_changes_no_number(sizes, parallel, ragged_on_one_device):
    metrics, _, last = trajectory(MODELS["even"], sizes, 6, parallel)
    np.testing.assert_allclose(metrics, ragged_on_one_device[0][:6], rtol=1e-4)
    assert not parallel.expert_buffer or float(last["dropped"]) == 0


@pytest.mark.parametrize("name", ["adafactor", "sgd", "muon"])
def test_every_optimizer_takes_the_same_steps_on_four_devices(name, monkeypatch):
    """Factored means and orthogonal updates are of whole matrices, wherever their parts lie."""
    monkeypatch.setattr(optimizer_module, "_FACTORED_FROM", 8)
    one, many = (
        trajectory(MODELS["even"], sizes, 4, optimizer=name, weight_decay=0.1) for sizes in ((1, 1, 1), (2, 1, 2))
    )
    np.testing.assert_allclose(many[0], one[0], rtol=1e-3)
    for path, wanted in one[1].items():
        np.testing.assert_allclose(many[1][path], wanted, atol=3e-4, err_msg=path)


def test_choices_without_room_are_counted():
    _, _, last = trajectory(MODELS["even"], (1, 8, 1), 1, ParallelConfig(expert_buffer=0.25))
    assert float(last["dropped"]) > 0


@pytest.mark.parametrize(("name", "sizes"), [("odd", (2, 2, 2)), ("latent", (1, 2, 4)), ("even", (1, 4, 2))])
def test_decoding_is_that_of_one_device(name, sizes):
    config = MODELS[name]
    params, prompt = parameters(config), rows(config, 5, 3).tokens
    lengths = np.array([12, 3, 7, 1, 12])
    one, many = (
        generate(params, config, prompt, lengths=lengths, max_new_tokens=9, mesh=mesh)
        for mesh in (None, mesh_of(sizes))
    )
    np.testing.assert_array_equal(many, one)
