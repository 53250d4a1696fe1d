"""RepSelect: the collapse against its code's formula, and a run against a loop that is written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.unlearning.conftest import ONE, Stop, flat_of, in_bfloat16, run
from trace_jax.config import ConfigError
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.repselect import ADVERSARY_RANK, collapse
from trace_jax.unlearning.trainable import split

PATH = "layers/experts/gate_up"
CONFIG = UnlearningConfig(
    objective={"name": "repselect", "components": 16, "adversary_rate": 0.0}, steps=3, learning_rate=50.0,
    forget_batch_size=3, checkpoint_every=2,
)  # fmt: skip


def source(gradient, components):
    """`_collapse` with hard_soft "soft" on both sides, as repselect_simple.py calls it, with an exact SVD."""
    u, s, vt = np.linalg.svd(gradient, full_matrices=False)
    u, s, v = u[:, :components], s[:components], vt[:components].T
    ratio = s / s.min()
    projected = gradient @ v
    gradient = gradient - (projected - projected / ratio) @ v.T
    projected = gradient.T @ u
    return (gradient.T - (projected - projected / ratio) @ u.T).T


@pytest.mark.parametrize(("components", "decay"), [(5, 3.0), (12, 1.5), (99, 1.5)])
def test_what_stands_out_of_a_gradient_is_collapsed_as_in_the_source(components, decay):
    """A few components are found by iteration, in the source as well: as well as those beyond them are smaller."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 12)))[0] for n in (20, 12))
    gradient = left * decay ** -np.arange(12) @ right.T
    ours = np.asarray(collapse(jnp.asarray(gradient, jnp.float32), components, jax.random.key(1)))
    expected = source(gradient, min(components, 12))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    after = np.linalg.svd(ours, compute_uv=False)
    assert after[0] <= 1.001 * decay ** -(min(components, 12) - 1), "nothing is larger than the last that is collapsed"


def test_an_expert_that_few_or_no_forget_tokens_reach_still_has_a_finite_direction():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12))
    ours = collapse(jnp.asarray(few, jnp.float32), 8, jax.random.key(1))
    np.testing.assert_allclose(ours, source(few, 2), atol=1e-4)
    assert not np.asarray(collapse(jnp.zeros((20, 12)), 8, jax.random.key(1))).any()


def descent(model, rows, weights):
    """[L, E, D, 2, F], the gradient of mean -log p of the next token by the experts' gate and up projections."""

    def loss(weights):
        params = unflatten({**flatten(model.params), PATH: weights})
        logits = forward(params, model.config, rows.tokens, mask=rows.segments, collect=("logits",)).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(rows.tokens, -1, 1)[..., None], -1)[..., 0]
        return jnp.where(rows.valid, nll, 0.0).sum() / np.float32(rows.valid.sum())

    return np.asarray(jax.grad(loss)(weights))


def direction(ascent):
    return np.stack([[source(m.reshape(16, 16), 16).reshape(m.shape) for m in layer] for layer in ascent])


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_every_step_goes_along_the_collapsed_gradient_of_a_model_that_was_taught_the_forget_set(model, forget, rate):
    """One batch holds all rows, so that the adversary takes one step: b = -rate a' G, as b was 0."""
    before = flat_of(model)
    weights = before[PATH]
    if rate:
        a = np.asarray(split(flatten(model.params), (PATH,), model.config, ONE, rank=ADVERSARY_RANK)[f"{PATH}/lora_a"])
        taught = np.einsum("ledr,lecr,lecgf->ledgf", a, a, descent(model, forget, weights))
        weights = weights - rate * taught
    objective = dataclasses.replace(CONFIG.objective, adversary_rate=rate)
    config = dataclasses.replace(CONFIG, objective=objective, forget_batch_size=8)
    after = flat_of(run(model, forget, None, config).model)
    expected = -3 * 50.0 * direction(-descent(model, forget, weights))
    change, size = after[PATH] - before[PATH], np.abs(expected).max()
    np.testing.assert_allclose(change, expected, rtol=0, atol=0.02 * size)
    assert all((after[path] == before[path]).all() for path in before if path != PATH)


def test_the_same_on_a_mesh_in_other_batches_and_after_an_interruption(model, forget, tmp_path):
    whole = flat_of(run(model, forget, None, CONFIG).model)

    def interrupted(params):  # at step 0 and at the end
        if not np.array_equal(np.asarray(params["layers"]["experts"]["gate_up"]), np.asarray(flat_of(model)[PATH])):
            raise Stop

    with pytest.raises(Stop):
        run(model, forget, None, CONFIG, directory=tmp_path, evaluate=interrupted, identity="one")
    other = dataclasses.replace(CONFIG, forget_batch_size=8)
    again = run(model, forget, None, other, directory=tmp_path, identity="one", mesh=tiny.mesh_of(1, 2, 1))
    np.testing.assert_allclose(flat_of(again.model)[PATH], whole[PATH], atol=1e-3)


def test_selected_experts_of_a_bfloat16_model_move_and_no_others(model, forget):
    half = in_bfloat16(model)
    selected = np.array([[True, False, True, False], [False, True, False, False]])
    chosen = dataclasses.replace(CONFIG, trainable="selected_experts")
    after = flat_of(run(half, forget, None, chosen, selected=selected).model)
    for path in (PATH, "layers/experts/down"):
        moved = (after[path] != flat_of(half)[path]).reshape(2, 4, -1).any(axis=-1)
        assert np.array_equal(moved, selected) and after[path].dtype == jnp.bfloat16


def test_what_it_does_not_read_is_refused(model, forget):
    with pytest.raises(ConfigError, match="takes plain steps"):
        dataclasses.replace(CONFIG, weight_decay=0.1)
    with pytest.raises(ConfigError, match="layers/router would train as well"):
        run(model, forget, None, dataclasses.replace(CONFIG, trainable=["layers/router", PATH]))
