"""token_nll and token_kl equal plain log_softmax, in value and in gradient, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.models.architecture import ModelConfig
from trace_jax.models.loss import token_kl, token_nll

B, S, D, V = 3, 7, 6, 19
CONFIG = ModelConfig(vocab_size=V, hidden_size=D)
TIED = ModelConfig(vocab_size=V, hidden_size=D, tie_embeddings=True)
CASES = [(CONFIG, None), (TIED, 1), (CONFIG, 4), (TIED, 100)]


def make(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    params = {"head": rng.normal(size=(D, V)) * scale, "embed": rng.normal(size=(V, D)) * scale}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    hidden = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    return (
        params,
        hidden,
        jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32),
        jnp.asarray(rng.normal(size=(B, S)), jnp.float32),
    )


def head_of(params, config):
    return params["embed"].T if config.tie_embeddings else params["head"]


def plain_nll(params, config, hidden, targets):
    log_p = jax.nn.log_softmax(hidden @ head_of(params, config), axis=-1)
    return -jnp.take_along_axis(log_p, targets[:, :, None], axis=-1)[:, :, 0]


def plain_kl(params_ref, hidden_ref, params, hidden, config):
    params_ref, hidden_ref = jax.lax.stop_gradient((params_ref, hidden_ref))
    log_ref = jax.nn.log_softmax(hidden_ref @ head_of(params_ref, config), axis=-1)
    log_p = jax.nn.log_softmax(hidden @ head_of(params, config), axis=-1)
    return jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)


@pytest.mark.parametrize(("config", "chunk_size"), CASES)
def test_losses_and_their_gradients(config, chunk_size):
    params, hidden, targets, cotangent = make()

    def gradients(nll, kl, **options):
        def total(params, hidden, reference):
            values = nll(params, config, hidden, targets, **options), kl(*reference, params, hidden, config, **options)
            return jnp.sum((values[0] + 2 * values[1]) * cotangent), values

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(params, hidden, make(seed=1)[:2])

    got, wanted = gradients(token_nll, token_kl, chunk_size=chunk_size), gradients(plain_nll, plain_kl)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, wanted)
    nll = token_nll(params, config, hidden, targets, chunk_size=chunk_size)
    np.testing.assert_allclose(nll, wanted[1][0], atol=1e-5)


def test_large_logits_stay_finite():
    params, hidden, targets, _ = make(scale=200.0)
    values, gradient = jax.value_and_grad(lambda h: jnp.sum(token_nll(params, CONFIG, h, targets)))(hidden)
    assert np.isfinite(values) and np.all(np.isfinite(gradient))
    log_p = np.asarray(hidden, np.float64) @ np.asarray(params["head"], np.float64)
    log_p = log_p - log_p.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, np.asarray(targets)[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(token_nll(params, CONFIG, hidden, targets), expected, rtol=1e-5, atol=1e-3)


def test_chunks_never_hold_all_logits():
    params, hidden, targets, _ = make()
    gradient = jax.grad(lambda p, h: jnp.sum(token_nll(p, CONFIG, h, targets, chunk_size=4)), argnums=(0, 1))
    text = str(jax.make_jaxpr(gradient)(params, hidden))
    assert f"f32[{B * S},{V}]" not in text and f"f32[4,{V}]" in text


def test_bfloat16_model_has_float32_losses():
    params, hidden, targets, _ = make()
    low_params, low_hidden = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, hidden))
    for chunk_size in (None, 4):
        nll = token_nll(low_params, CONFIG, low_hidden, targets, chunk_size=chunk_size)
        assert nll.dtype == jnp.float32
        np.testing.assert_allclose(nll, token_nll(params, CONFIG, hidden, targets), atol=0.1)

        def total(hidden, chunk_size=chunk_size):
            return jnp.sum(token_nll(low_params, CONFIG, hidden, targets, chunk_size=chunk_size))

        gradient = jax.grad(total)(low_hidden)
        assert gradient.dtype == jnp.bfloat16
