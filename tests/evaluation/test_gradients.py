"""Norms of gradients against those of a loss written out, on one device and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.evaluation.likelihood import gradient_norms
from trace_jax.models.arrays import abstract_params
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh

TEXTS = [[1, 4, 5, 6, 7, 8], [1, 9, 3, 4, 12, 20]]
FIRST = [1, 4]


@pytest.fixture(scope="module")
def norms(tiny):
    return gradient_norms(Model(tiny.config, tiny.params), TEXTS, FIRST)


def test_it_is_the_norm_of_the_gradient_of_the_mean_loss_of_the_text(tiny, norms):
    def loss(params, ids, weights):
        log_p = jax.nn.log_softmax(forward(params, tiny.config, ids[None]).logits[0])
        return -(weights * log_p[jnp.arange(5), ids[1:]]).sum()

    gradient = jax.jit(jax.grad(loss))
    for text, weights, norm in zip(TEXTS, ([0.2] * 5, [0, 0, 0, 0.5, 0.5]), norms, strict=True):
        leaves = jax.tree.leaves(gradient(tiny.params, np.array(text, np.int32), np.array(weights, np.float32)))
        assert norm == pytest.approx(np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in leaves])), rel=1e-4)


def test_a_mesh_gives_the_same_norms(tiny, norms):
    mesh = make_mesh(jax.devices()[:4], expert=2, tensor=2)
    found = gradient_norms(Model(tiny.config, tiny.params), TEXTS, FIRST, mesh=mesh)
    np.testing.assert_allclose(found, norms, rtol=1e-5)


def test_half_precision_parameters_give_a_finite_number_of_numpy(tiny, norms):
    config = dataclasses.replace(tiny.config, dtype="bfloat16")
    params = jax.tree.map(lambda x, stored: x.astype(stored.dtype), tiny.params, abstract_params(config))
    found = gradient_norms(Model(config, params), TEXTS, FIRST)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, norms, rtol=0.2)


def test_a_text_without_a_scored_token_has_no_gradient(tiny):
    with pytest.raises(ValueError, match="scored token"):
        gradient_norms(Model(tiny.config, tiny.params), [[1, 2]], [2])
