"""The program of docs/interop.md runs, and Tunix's loss on its batches is our weighted retain loss."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import tiny
from tests.unlearning.test_step import gradient_of_step
from trace_jax.models.architecture import flatten
from trace_jax.routing.statistics import expert_assignments, expert_statistics
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows

SIZE = 8
ONLY_RETAIN = UnlearningConfig(
    objective={"name": "gradient_difference", "gamma": 0.0}, retain_loss="nll", alpha=1.0, clip_norm=0.0
)


@pytest.fixture(scope="module")
def world():
    """What the program is given, and afterwards everything that it made."""
    text = (Path(__file__).parents[2] / "docs/interop.md").read_text()
    forget, retain = tiny.make_rows(16, seed=1, vocab_size=32), tiny.make_rows(24, seed=2)
    names = {"model": tiny.make_model(), "forget": forget, "retain": retain, "tokens": jnp.asarray(retain.tokens[:2])}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/interop.md", "exec"), names)
    return names


def tunix_loss(module, input_tokens, input_mask, positions, attention_mask):
    """The formula of Tunix's loss (docs/interop.md), by itself."""
    logits, _ = module(input_tokens, positions, None, attention_mask)
    scores, mask = logits[:, :-1], input_mask[:, 1:]
    at_target = jnp.take_along_axis(scores, input_tokens[:, 1:, None], axis=-1)[..., 0]
    nll = jnp.log(jnp.exp(scores).sum(axis=-1)) - at_target
    return (mask * nll).sum() / mask.sum()


@nnx.jit
def trained(module, batch):
    """(loss, one plain step of the module) on Tunix's loss."""
    optimizer = nnx.Optimizer(module, optax.sgd(1.0), wrt=nnx.Param)
    loss, gradient = nnx.value_and_grad(lambda m: tunix_loss(m, **batch))(module)
    optimizer.update(module, gradient)
    return loss


def ours(world, picked, weights, **changes):
    """(metrics, gradient) of an unlearning step that has a retain term only."""
    rows, config = world["retain"].batch(picked), dataclasses.replace(ONLY_RETAIN, **changes)
    forget = world["forget"].batch(np.arange(4))
    step = StepRows(forget, rows, weights, np.zeros(4, np.int32))
    return gradient_of_step(config, world["model"], step, away=0.0)


def test_what_the_program_measured_is_what_the_model_does(world):
    model, retain = world["model"], world["retain"]
    assert np.array_equal(world["counts"].counts, expert_statistics(model, retain).counts)
    assert np.array_equal(world["routed"].indices, expert_assignments(model, retain).indices)
    assert world["out"].logits.shape == (2, tiny.LENGTH, 64)


@pytest.mark.parametrize(("apply", "normalize"), [("both", "count"), ("weights", "batch")])
def test_a_step_on_the_weights_as_mask_is_a_step_on_our_retain_loss(world, apply, normalize):
    """A factor of the whole mask changes nothing, so other weights than those of mean one in a row are normalised."""
    made = world["weights"]
    drawn = made.row_probability > 0
    assert made.apply == "both" and drawn.sum() >= SIZE
    picked = np.flatnonzero(drawn)[:SIZE]
    weights = (made.step_weights if apply == "both" else made.weights)[picked]
    assert len(np.unique(weights)) > 4  # single tokens weigh differently
    inputs = world["loss_inputs"](world["retain"].take(picked), weights * np.float32(3))
    module = world["TunixDecoder"](world["tj"].as_nnx(world["model"]))
    loss = trained(module, inputs)
    metrics, gradient = ours(world, picked, weights, normalize=normalize)
    assert float(loss) == pytest.approx(metrics["retain_loss"], rel=1e-5)
    if apply == "weights":  # and what is divided by matters here
        assert ours(world, picked, weights)[0]["retain_loss"] != pytest.approx(float(loss), rel=1e-2)
    after = flatten(world["tj"].from_nnx(module.decoder).params)
    for path, before in flatten(world["model"].params).items():
        np.testing.assert_allclose(before - after[path], gradient[path], rtol=0, atol=2e-5, err_msg=path)


def test_rows_are_drawn_as_often_as_they_weigh(world):
    batch, rows = world["training_batch"](4096), world["retain"]
    row = [int(np.flatnonzero((rows.tokens == tokens).all(axis=1))[0]) for tokens in batch["input_tokens"]]
    share, weight = np.bincount(row, minlength=len(rows)) / 4096, world["weights"].weights.sum(axis=1)
    lengths = rows.valid.sum(axis=1)
    expected = weight / np.maximum(lengths, 1)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(batch["input_mask"].sum(axis=1), lengths[row], rtol=1e-5)
