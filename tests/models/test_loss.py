"""Losses over the vocabulary equal plain formulas, in value and gradient, in any chunks and on any mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny import CONFIG, mesh_of, random_params
from trace_jax.models import loss
from trace_jax.models.architecture import unflatten
from trace_jax.models.loss import document_sums, token_kl, token_nll, vocabulary_loss
from trace_jax.models.sharding import on_mesh, param_specs, placed_params
from trace_jax.parallel.mesh import BATCH_AXES
from trace_jax.unlearning.objectives import PAPER, Objective

B, S, D, V = 4, 6, CONFIG.hidden_size, 37
MODEL = dataclasses.replace(CONFIG, vocab_size=V, num_layers=1)
TIED = dataclasses.replace(MODEL, tie_embeddings=True)
CASES = [(name, PAPER) for name in ("undial", "ceu", "pdu")] + [(name, "muse_logits") for name in ("npo", "simnpo")]
NUMBERS = {"beta": np.float32(1.5), "delta": np.float32(0.3)}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    ours, original = random_params(MODEL, 0, noise=0.0), random_params(MODEL, 1, noise=0.0)
    hidden, before = (rng.normal(size=(B, S, D)).astype(np.float32) * 2 for _ in range(2))
    return ours, original, hidden, before, rng.integers(0, V, (B, S)).astype(np.int32)


@pytest.fixture
def tokens_of_chunk(monkeypatch):
    """tokens_of_chunk(n): the logits of n tokens exist at a time, however large the head is."""
    monkeypatch.setattr(loss, "HEAD_PER_CHUNK", 2**30)
    return lambda n: monkeypatch.setattr(loss, "CHUNK_ELEMENTS", n * V)


def close(got, wanted):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got, wanted)


def logits_of(params, config, hidden):
    return hidden @ (params["embed"].T if config.tie_embeddings else params["head"])


def plain_nll(params, config, hidden, targets):
    log_p = jax.nn.log_softmax(logits_of(params, config, hidden), axis=-1)
    return -jnp.take_along_axis(log_p, targets[:, :, None], axis=-1)[:, :, 0]


def plain_kl(params_ref, hidden_ref, params, hidden, config):
    logits = jax.lax.stop_gradient(logits_of(params_ref, config, hidden_ref)), logits_of(params, config, hidden)
    log_ref, log_p = (jax.nn.log_softmax(x, axis=-1) for x in logits)
    return jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)


@pytest.mark.parametrize(("config", "chunk"), [(MODEL, 100), (TIED, 1), (MODEL, 5), (TIED, 24)])
def test_nll_and_kl_and_their_gradients(inputs, config, chunk, tokens_of_chunk):
    ours, original, hidden, before, targets = inputs
    ours, original = ({name: params.get(name, 0.0) for name in ("head", "embed")} for params in (ours, original))
    tokens_of_chunk(chunk)
    cotangent = np.random.default_rng(1).normal(size=(B, S)).astype(np.float32)

    def gradients(nll, kl):
        def total(params, hidden, reference):
            values = nll(params, config, hidden, targets), kl(*reference, params, hidden, config)
            return jnp.sum((values[0] + 2 * values[1]) * cotangent), values

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(ours, hidden, (original, before))

    wanted = gradients(plain_nll, plain_kl)
    close(gradients(token_nll, token_kl), wanted)
    close(token_nll(ours, config, hidden, targets), wanted[1][0])


def test_large_logits_stay_finite(inputs):
    ours, _, hidden, _, targets = inputs
    params = {"head": ours["head"] * 200.0}
    values, gradient = jax.value_and_grad(lambda h: jnp.sum(token_nll(params, MODEL, h, targets)))(hidden)
    assert np.isfinite(values) and np.all(np.isfinite(gradient))
    close(token_nll(params, MODEL, hidden, targets), plain_nll(params, MODEL, hidden, targets))


def test_chunks_never_hold_all_logits(inputs, tokens_of_chunk, monkeypatch):
    ours, _, hidden, _, targets = inputs

    def program():
        gradient = jax.grad(lambda p, h: jnp.sum(token_nll(p, MODEL, h, targets)), argnums=(0, 1))
        return str(jax.make_jaxpr(gradient)(ours, hidden))

    tokens_of_chunk(5)
    assert f"f32[{B * S},{V}]" not in program() and f"f32[5,{V}]" in program()
    monkeypatch.setattr(loss, "HEAD_PER_CHUNK", 2)  # a large head isn't read for fewer tokens
    assert f"f32[{B * S},{V}]" not in program() and f"f32[{D // 2},{V}]" in program()


def test_bfloat16_model_has_float32_losses(inputs, tokens_of_chunk):
    ours, _, hidden, _, targets = inputs
    low_params, low_hidden = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (ours, hidden))
    exact = token_nll(ours, MODEL, hidden, targets)
    for chunk in (24, 5):
        tokens_of_chunk(chunk)
        nll, pull_back = jax.vjp(lambda h: token_nll(low_params, MODEL, h, targets), low_hidden)
        assert nll.dtype == jnp.float32 and pull_back(nll)[0].dtype == jnp.bfloat16
        np.testing.assert_allclose(nll, exact, atol=0.1)


def plain(name, form, logits, reference, targets):
    """The formulas, with all logits [..., V]."""
    onehot, log_p, (beta, delta) = jax.nn.one_hot(targets, V), jax.nn.log_softmax(logits), NUMBERS.values()

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


def objective_loss(params, hidden, targets, original, before, *, name, form, config=MODEL):
    reference = (original, before) if name in ("npo", "undial") else None
    numbers = {name: jnp.asarray(value) for name, value in NUMBERS.items()}
    objective = Objective.kinds[name](**({} if form == PAPER else {"form": form}))

    def function(own, reference, numbers):
        return objective.with_numbers(objective.numbers() | numbers).vocabulary(own, reference)

    return vocabulary_loss(function, numbers, params, config, hidden, targets, reference)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_objectives_equal_the_plain_formula_in_value_and_gradient(inputs, name, form, tokens_of_chunk):
    ours, original, hidden, before, targets = inputs

    def own(head, hidden):
        return objective_loss({**ours, "head": head}, hidden, targets, original, before, name=name, form=form)

    def formula(head, hidden):
        return plain(name, form, hidden @ head, before @ original["head"], targets)

    def values_and_gradients(fn):
        gradients = jax.grad(lambda *operands: fn(*operands).sum(), argnums=(0, 1))
        return jax.jit(lambda *operands: (fn(*operands), gradients(*operands)))(ours["head"], hidden)

    wanted = values_and_gradients(formula)
    for chunk in (24, 7):
        tokens_of_chunk(chunk)
        close(values_and_gradients(own), wanted)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_split_vocabulary_gives_the_same(inputs, name, form):
    """37 tokens over 2 devices: the second one's last column is padding."""
    ours, _, hidden, before, targets = inputs
    mesh = mesh_of(2, 1, 2)

    def total(params, hidden, targets, before):
        older = jax.tree.map(lambda x: jax.lax.stop_gradient(x) * 0.7, params)
        return objective_loss(params, hidden, targets, older, before, name=name, form=form).sum()

    def on_device(params, *rows):
        return jax.value_and_grad(lambda params: jax.lax.psum(total(params, *rows), BATCH_AXES))(params)

    spread = on_mesh(on_device, MODEL, mesh, out_specs=(P(), unflatten(param_specs(MODEL, mesh))))
    value, gradient = jax.jit(spread)(placed_params(ours, MODEL, mesh), hidden, targets, before)
    expected, wanted = jax.jit(jax.value_and_grad(total))(ours, hidden, targets, before)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient["head"], wanted["head"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_objectives_are_finite_in_bfloat16(inputs, name, form):
    ours, original, hidden, before, targets = inputs
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    halved = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), x) for x in (ours, original, hidden * 30, before)]
    ours, original, hidden, before = halved

    def total(params):
        return objective_loss(params, hidden, targets, original, before, name=name, form=form, config=config).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(ours)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradient))


def test_sums_of_documents_stay_within_their_row():
    """Also on a mesh, and the gradient of a document's sum reaches its own positions alone."""
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 4, 5, 6], [0] * 6, [1] * 6], np.int32)
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    wanted = np.array([[values[b, segments[b] == i].sum() for i in range(7)] for b in range(4)])

    def on_device(_, values, segments):
        return document_sums(values, segments), jax.grad(lambda v: document_sums(v, segments)[:, 2].sum())(values)

    spread = on_mesh(on_device, MODEL, mesh_of(2, 1, 1), out_specs=(P(BATCH_AXES), P(BATCH_AXES)))
    sums, gradient = jax.jit(spread)(placed_params(random_params(MODEL, 0), MODEL, mesh_of(2, 1, 1)), values, segments)
    np.testing.assert_array_equal(sums, wanted)
    np.testing.assert_array_equal(gradient, segments == 2)
