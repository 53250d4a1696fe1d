"""Which rows a step reads and for how many steps: nothing but the step decides."""

import jax
import numpy as np
import pytest

from tests.unlearning.conftest import make_rows
from trace_jax.data.rows import Rows
from trace_jax.parallel.mesh import make_mesh
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import Inputs, batch_text, pad_rows, with_steps


def numbered(count, *, topics=(0,), length=4):
    """Rows whose first token is their number."""
    tokens = np.tile(np.arange(count, dtype=np.int32)[:, None], (1, length))
    domain = np.array([topics[i % len(topics)] for i in range(count)], np.int32)
    return Rows(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool), domain)


def test_topics_take_turns_and_each_goes_through_its_own_epochs():
    config = UnlearningConfig(forget_batch_size=2, retain_batch_size=3, topics="alternating")
    inputs = Inputs(numbered(10, topics=(0, 1)), numbered(9), None, config, seed=0, multiple=1)
    steps = [inputs.at(step) for step in range(10)]
    assert [set(step.topic.tolist()) for step in steps] == [{0}, {1}] * 5
    for topic in (0, 1):
        seen = np.concatenate([step.forget.tokens[:, 0] for step in steps[topic::2]])
        of_topic = [i for i in range(10) if i % 2 == topic]
        assert sorted(seen[:5]) == sorted(seen[5:]) == of_topic, "five batches of two rows are two epochs"


def test_mixed_topics_share_the_batches():
    config = UnlearningConfig(forget_batch_size=4)
    inputs = Inputs(numbered(40, topics=(0, 1)), numbered(9), None, config, seed=0, multiple=1)
    steps = [inputs.at(step) for step in range(10)]
    assert len(np.unique(np.concatenate([step.forget.tokens[:, 0] for step in steps]))) == 40
    assert any(len(set(step.topic.tolist())) == 2 for step in steps)
    for step in steps:
        np.testing.assert_array_equal(step.topic, step.forget.tokens[:, 0] % 2)


def test_what_belongs_to_a_forget_row_comes_with_it():
    forget = numbered(12)
    nll = np.arange(12, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    config = UnlearningConfig(objective="dpo", forget_batch_size=5)
    step = Inputs(
        forget, numbered(9), None, config, seed=0, multiple=4,
        refusals=numbered(12), reference={"reference_nll": nll, "refusal_reference_nll": nll + 100},
    ).at(3)  # fmt: skip
    assert len(step.forget.tokens) == len(step.refusals.tokens) == len(step.reference_nll) == 8
    np.testing.assert_array_equal(step.refusals.tokens[:5], step.forget.tokens[:5])
    np.testing.assert_array_equal(step.reference_nll[:5], step.forget.tokens[:5].astype(np.float32))
    np.testing.assert_array_equal(step.refusal_reference_nll[:5], step.reference_nll[:5] + 100)
    for batch in (step.forget, step.refusals, step.retain):
        real = 16 if batch is step.retain else 5
        assert batch.valid[:real].all() and not batch.valid[real:].any() and not batch.segments[real:].any()


@pytest.mark.parametrize("objective", ["gradient_ascent", "task_vector"])
def test_without_a_retain_term_no_retain_row_is_read(objective):
    step = Inputs(numbered(5), numbered(9), None, UnlearningConfig(objective=objective), seed=0, multiple=1).at(0)
    assert step.retain is None and step.weights is None


def test_padding_keeps_types_and_leaves_full_batches_alone():
    rows = {"a": np.ones((3, 2), np.int32), "b": np.ones(3, bool)}
    padded = pad_rows(rows, 4)
    assert padded["a"].dtype == np.int32 and padded["b"].tolist() == [True, True, True, False]
    assert pad_rows(rows, 3)["a"] is rows["a"]


# --- how long a run is


@pytest.mark.parametrize(
    ("epochs", "anchor", "batch", "steps"),
    [
        (1.0, "forget", 3, 3),
        (2.5, "forget", 3, 7),
        (0.1, "forget", 3, 1),
        (2.0, "retain", 9, 7),
        (0.6, "retain", 9, 2),
        (0.1, "retain", 1, 3),  # a tenth of thirty rows is three rows
    ],
)
def test_epochs_are_steps_over_the_rows_of_their_side(epochs, anchor, batch, steps):
    """8 forget rows, 30 retain rows."""
    config = UnlearningConfig(epochs=epochs, epoch_anchor=anchor, **{f"{anchor}_batch_size": batch})
    completed = with_steps(config, make_rows(8, seed=1), make_rows(30, seed=2))
    assert (completed.steps, completed.epochs) == (steps, 0.0) and config.steps == 0


def test_the_text_says_what_a_step_reads():
    config = UnlearningConfig(steps=1200, forget_batch_size=3, retain_batch_size=9)
    rows = make_rows(8, seed=1), make_rows(30, seed=2)
    assert batch_text(config, *rows, make_mesh(jax.devices()[:4]), 2) == (
        "1,200 steps of 3 forget rows x 12 + 9 retain rows x 12 = 144 tokens each, in 2 microbatches on 4 devices; "
        "steps in an epoch: 3 of the forget rows and 4 of the retain rows"
    )
