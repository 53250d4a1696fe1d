"""How long a run is, what a step reads, and that a batch in parts is the batch."""

import jax
import numpy as np
import pytest

from tests.unlearning.conftest import make_rows
from trace_jax.config import ConfigError
from trace_jax.models.arrays import flatten
from trace_jax.parallel.mesh import ParallelConfig, make_mesh
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import batch_text, with_steps
from trace_jax.unlearning.unlearn import unlearn


@pytest.mark.parametrize(
    ("epochs", "anchor", "steps"),
    [
        (1.0, "forget", 3),
        (2.5, "forget", 7),
        (0.1, "forget", 1),
        (2.0, "retain", 7),
        (0.1, "retain", 1),
        (0.6, "retain", 2),
    ],
)
def test_epochs_are_steps_over_the_rows_of_their_side(epochs, anchor, steps):
    """8 forget rows in batches of 3, 30 retain rows in batches of 9."""
    config = UnlearningConfig(epochs=epochs, epoch_anchor=anchor, forget_batch_size=3, retain_batch_size=9)
    found = with_steps(config, make_rows(8, seed=1), make_rows(30, seed=2))
    assert (found.steps, found.epochs) == (steps, 0.0) and config.steps == 0


def test_a_tenth_of_thirty_rows_is_three_rows():
    config = UnlearningConfig(epochs=0.1, forget_batch_size=1)
    assert with_steps(config, make_rows(30, seed=1), None).steps == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": -1}, "epochs is -1.0; expected a value at least"),
        ({"epochs": 2, "steps": 60}, "steps is 60 and epochs is 2; a run has one length"),
        ({"epoch_anchor": "retain"}, "epoch_anchor = 'retain' would have no effect"),
        ({"steps": 0}, "steps is 0 and epochs is 0"),
        ({"epochs": 1, "epoch_anchor": "both"}, "epoch_anchor is 'both'; expected one of forget, retain"),
        ({"epochs": 1, "epoch_anchor": "retain", "retain_loss": "none"}, "there is no retain term"),
    ],
)
def test_a_length_that_says_nothing_or_two_things_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        UnlearningConfig(**given)


def test_epochs_decide_the_schedule_and_the_length(model, forget, retain, capsys):
    """Two epochs of 8 forget rows in batches of 4: four steps, of which the last ends a linear decay."""
    length = {"epochs": 2.0}, {"steps": 4}
    settings = {"forget_batch_size": 4, "retain_batch_size": 4, "learning_rate": 0.01, "schedule": "linear"}
    found = [unlearn(model, forget, retain, config=UnlearningConfig(**settings, **one)) for one in length]
    assert [(one.step, one.steps) for one in found] == [(4, 4), (4, 4)]
    for one, other in zip(*(jax.tree.leaves(result.model.params) for result in found), strict=True):
        np.testing.assert_array_equal(one, other)
    said = "4 steps of 4 forget rows x 12 + 4 retain rows x 12 = 96 tokens each, in one batch on 8 devices"
    assert said in capsys.readouterr().err


def test_the_text_says_what_a_step_reads():
    config = UnlearningConfig(steps=1200, forget_batch_size=3, retain_batch_size=9)
    rows = make_rows(8, seed=1), make_rows(30, seed=2)
    assert batch_text(config, *rows, make_mesh(jax.devices()[:4]), 2) == (
        "1,200 steps of 3 forget rows x 12 + 9 retain rows x 12 = 144 tokens each, in 2 microbatches on 4 devices; "
        "steps in an epoch: 3 of the forget rows and 4 of the retain rows"
    )
    alone = UnlearningConfig(objective="gradient_ascent", steps=5, forget_batch_size=8)
    assert batch_text(alone, *rows, make_mesh(jax.devices()[:1]), 1) == (
        "5 steps of 8 forget rows x 12 = 96 tokens each, in one batch on one device; "
        "steps in an epoch: 1 of the forget rows"
    )


@pytest.mark.parametrize(("objective", "size"), [("npo", 8), ("gradient_ascent", 8), ("npo", 6)])
def test_microbatches_give_the_numbers_of_the_large_batch(model, forget, retain, objective, size):
    """NPO's loss is a mean over rows, gradient ascent's over tokens, of rows of unequal length; six rows do not divide
    by four. Plain steps along the gradient: Adam's would make noise of numbers that are nearly zero as large as any."""
    config = UnlearningConfig(
        objective=objective,
        steps=3,
        forget_batch_size=size,
        optimizer={"name": "sgd", "momentum": 0.0},
        learning_rate=0.03,
    )
    mesh, found = make_mesh(jax.devices()[:1]), {}
    for number in (1, 2, 4):
        parallel = ParallelConfig(microbatches=number)
        found[number] = unlearn(model, forget, retain, config=config, mesh=mesh, parallel=parallel).model.params
    for number in (2, 4):
        for path, wanted in flatten(found[1]).items():
            np.testing.assert_allclose(flatten(found[number])[path], wanted, atol=5e-6, err_msg=f"{number} {path}")
    moved = {path: np.abs(leaf - flatten(model.params)[path]).max() for path, leaf in flatten(found[1]).items()}
    assert min(moved.values()) > 5e-4
