"""A Flax module of a model is that model: the same arrays, numbers and gradients, and a model again afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import tiny
from trace_jax.interop.flax import as_nnx, from_nnx
from trace_jax.models.decoder import forward
from trace_jax.models.model import Source, SpecialTokens
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import to_host

ROWS = tiny.make_rows(4, seed=1)
TOKENS, SEGMENTS = jnp.asarray(ROWS.tokens), jnp.asarray(ROWS.segments)
COLLECT = ("logits", "router")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    kept = {"tokenizer": tiny.make_tokenizer(), "special": SpecialTokens(bos=None)}
    return tiny.make_model().replace(source=Source(tmp_path_factory.mktemp("of"), "olmoe"), **kept)


def call(module, tokens, segments):
    return module(tokens, mask=segments)


def loss(logits):
    return jnp.square(logits).mean()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_state_and_numbers_are_the_models_own_on_any_mesh(model, sizes):
    placed = model.replace(params=placed_params(model.params, model.config, tiny.mesh_of(*sizes)))
    module, arrays = as_nnx(placed), jax.tree.leaves(placed.params)
    assert all(x is y for x, y in zip(jax.tree.leaves(nnx.state(module)), arrays, strict=True))
    again = from_nnx(nnx.merge(*nnx.split(module)))
    assert jax.tree.structure(again.params) == jax.tree.structure(placed.params)
    assert all(x is y for x, y in zip(jax.tree.leaves(again.params), arrays, strict=True))
    assert again.replace(params=None) == placed.replace(params=None)
    expected = jax.jit(lambda p: forward(p, model.config, TOKENS, mask=SEGMENTS, collect=COLLECT))(model.params)
    found, expected = to_host((nnx.jit(call)(module, TOKENS, SEGMENTS), expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    real = ROWS.segments > 0
    assert np.array_equal(found.router.indices[:, real], expected.router.indices[:, real])
    atol = 0.0 if sizes == (1, 1, 1) else 5e-4  # parameters that differ by 1e-7 of themselves move logits by 2e-4
    for x, y in ((found.logits, expected.logits), (found.router.weights, expected.router.weights)):
        np.testing.assert_allclose(x[..., real, :], y[..., real, :], rtol=0, atol=atol)


def test_a_step_of_nnx_and_optax_is_that_of_optax_on_the_plain_parameters(model):
    module, adam = as_nnx(model), optax.adam(1e-2)
    optimizer = nnx.Optimizer(module, adam, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, gradient = nnx.value_and_grad(lambda m: loss(m(TOKENS, collect=("logits",)).logits))(module)
        optimizer.update(module, gradient)
        return value

    @jax.jit
    def plain(params):
        value, gradient = jax.value_and_grad(lambda p: loss(forward(p, model.config, TOKENS).logits))(params)
        return value, optax.apply_updates(params, adam.update(gradient, adam.init(params))[0])

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam multiplies integers with floats
        value, expected = plain(model.params)
        np.testing.assert_allclose(step(module, optimizer), value, rtol=1e-6)
    trained = from_nnx(module)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), trained.params, expected)
    assert trained.tokenizer is model.tokenizer and not np.array_equal(trained.params["head"], model.params["head"])


def test_what_is_no_module_of_the_model_is_refused(model):
    with pytest.raises(ValueError, match="guide"):
        as_nnx(model.replace(guide=model.params))
    with pytest.raises(TypeError, match=r"is a Dict; expected a module that tj\.as_nnx"):
        from_nnx(nnx.Dict())
    module = as_nnx(model)
    module.params["head"] = nnx.Param(jnp.zeros((16, 65)))
    with pytest.raises(ValueError, match=r"head is float32\[16, 65\], expected float32\[16, 64\]"):
        from_nnx(module)
