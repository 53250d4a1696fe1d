"""Losses of the whole vocabulary equal plain formulas, in any chunks and on any mesh, and are finite in bfloat16."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny import mesh_of, random_params
from trace_jax.models.architecture import ModelConfig, unflatten
from trace_jax.models.loss import vocabulary_loss
from trace_jax.models.sharding import on_mesh, param_specs, placed_params
from trace_jax.parallel.mesh import BATCH_AXES
from trace_jax.unlearning.objectives import PAPER, Objective

MODEL = ModelConfig(
    vocab_size=37, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4, num_experts=4,
    experts_per_token=2, expert_hidden_size=8,
)  # fmt: skip
CASES = [(name, PAPER) for name in ("undial", "ceu", "pdu")] + [(name, "muse_logits") for name in ("npo", "simnpo")]
NUMBERS = {"beta": np.float32(1.5), "delta": np.float32(0.3)}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    ours, original = random_params(MODEL, 0, noise=0.0), random_params(MODEL, 1, noise=0.0)
    hidden, before = (rng.normal(size=(4, 6, 8)).astype(np.float32) * 2 for _ in range(2))
    return ours, original, hidden, before, rng.integers(0, 37, (4, 6)).astype(np.int32)


def plain(name, form, logits, reference, targets):
    """The formulas, with all logits [..., V]."""
    onehot, log_p, (beta, delta) = jax.nn.one_hot(targets, 37), jax.nn.log_softmax(logits), NUMBERS.values()

    def cross_entropy(scores):
        return -(jax.lax.stop_gradient(jax.nn.softmax(scores)) * log_p).sum(-1)

    if form == "muse_logits":
        margin = reference - logits if name == "npo" else -logits - delta
        return (2 / beta * jnp.log1p(jnp.exp(-beta * margin))).mean(-1)
    if name == "undial":
        return cross_entropy(reference - beta * onehot)
    if name == "ceu":
        return cross_entropy(jnp.where(onehot > 0, -jnp.inf, logits))
    assert name == "pdu"
    return (logits.max(-1) - logits.mean(-1)) ** 2


def loss(params, hidden, targets, original, before, *, name, form, config=MODEL, chunk_size=None):
    compared = {"params_ref": original, "hidden_ref": before} if name in ("npo", "undial") else {}
    numbers = {name: jnp.asarray(value) for name, value in NUMBERS.items()}
    objective = Objective.kinds[name](**({} if form == PAPER else {"form": form}))

    def function(own, reference, numbers):
        return objective.with_numbers(objective.numbers() | numbers).vocabulary(own, reference)

    return vocabulary_loss(function, numbers, params, config, hidden, targets, chunk_size=chunk_size, **compared)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_equals_the_plain_formula_in_value_and_gradient(inputs, name, form):
    ours, original, hidden, before, targets = inputs

    def own(head, hidden, chunk_size):
        params = {**ours, "head": head}
        return loss(params, hidden, targets, original, before, name=name, form=form, chunk_size=chunk_size)

    def formula(head, hidden):
        return plain(name, form, hidden @ head, before @ original["head"], targets)

    def values_and_gradients(fn):
        gradients = jax.grad(lambda *operands: fn(*operands).sum(), argnums=(0, 1))
        return jax.jit(lambda *operands: (fn(*operands), gradients(*operands)))(ours["head"], hidden)

    wanted = values_and_gradients(formula)
    for chunk_size in (None, 7):
        mine = values_and_gradients(partial(own, chunk_size=chunk_size))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), mine, wanted)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_split_vocabulary_gives_the_same(inputs, name, form):
    """37 tokens over 2 devices: the second one's last column is padding."""
    ours, _, hidden, before, targets = inputs
    mesh = mesh_of(2, 1, 2)

    def on_device(params, hidden, targets, before):
        def total(params):
            values = loss(params, hidden, targets, older, before, name=name, form=form)
            return jax.lax.psum(values.sum(), BATCH_AXES)

        older = jax.tree.map(lambda x: x * 0.7, params)
        return jax.value_and_grad(total)(params)

    def alone(params):
        older = jax.tree.map(lambda x: jax.lax.stop_gradient(x) * 0.7, params)
        return loss(params, hidden, targets, older, before, name=name, form=form).sum()

    specs = unflatten(param_specs(MODEL, mesh))
    spread = on_mesh(on_device, MODEL, mesh, out_specs=(P(), specs))
    value, gradient = jax.jit(spread)(placed_params(ours, MODEL, mesh), hidden, targets, before)
    expected, wanted = jax.jit(jax.value_and_grad(alone))(ours)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient["head"], wanted["head"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_finite_in_bfloat16(inputs, name, form):
    ours, original, hidden, before, targets = inputs
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    halved = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), x) for x in (ours, original, hidden * 30, before)]
    ours, original, hidden, before = halved

    def total(params):
        return loss(params, hidden, targets, original, before, name=name, form=form, config=config).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(ours)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradient))
