"""Relearning is next-token training on the rows that it says, measured as it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.attacks.attack import BenignRelearning, Relearning
from trace_jax.config import ConfigError
from trace_jax.evaluation.likelihood import score_rows
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.unlearning.metrics import front_rows

RATIO = "forget_probability_ratio"
TRAINING = {"steps": 6, "evaluate_every": 4, "batch_size": 4, "learning_rate": 2e-3}  # one program for all tests


@pytest.fixture(scope="module")
def forgetful(original):
    """The original with a weaker output head: it knows less of everything."""
    return {**original.params, "head": original.params["head"] * 0.3}


def test_a_step_is_a_step_of_gradient_descent_on_the_forget_rows(forgetful, make_case, value):
    attack = Relearning(share=1.0, steps=1, evaluate_every=1, batch_size=8, learning_rate=0.1, optimizer="sgd")
    case = make_case(attack, forgetful)
    (point,) = attack.points(case)
    rows, model = case.context.corpora.forget, case.unlearned

    @jax.jit
    @jax.grad
    def gradient(params):
        out = forward(params, model.config, rows.tokens, mask=rows.segments, collect=("hidden",))
        nll = token_nll(params, model.config, out.hidden, jnp.roll(rows.tokens, -1, axis=1))
        return jnp.where(rows.valid, nll, 0).sum() / rows.valid.sum(dtype=np.float32)

    slope = gradient(model.params)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(slope)))
    scale = 0.1 * jnp.minimum(1, 1 / norm)
    expected = model.replace(params=jax.tree.map(lambda p, g: p - scale * g, model.params, slope))
    nll = score_rows(expected, rows, batch_size=8)
    assert point.at == "1 steps"
    assert value(point.measurements, "forget_nll") == pytest.approx(nll.sum() / rows.valid.sum(), rel=1e-4)


def test_what_was_hidden_comes_back_with_training_and_the_worst_point_counts(forgetful, make_case, value, measured):
    attack = Relearning(share=1.0, **TRAINING)
    case = make_case(attack, forgetful)
    result = case.attack()
    assert [point["at"] for point in result["points"]] == ["4 steps", "6 steps"]
    points = attack.points(case)
    ratios = [value(point.measurements, RATIO) for point in points]
    assert value(measured(case), RATIO) < min(ratios)
    assert (result["measure"], result["strongest"]) == (RATIO, int(np.argmax(ratios)))
    assert not (case.directory / "checkpoints").exists()
    # A finished attack is not trained again: it would fail. Another one is.
    assert attack.points(make_case(attack, None)) == points
    assert attack.points(make_case(attack, forgetful, identity="another")) == points
    assert not front_rows(case.directory, case.identity)  # what another attack left is gone


def test_share_takes_that_many_rows(original, make_case):
    taken = [make_case(Relearning(share=share), original.params).context for share in (0.01, 0.5, 1.0)]
    forget = taken[0].corpora.forget.tokens
    assert [len(context.prepared) for context in taken] == [1, 4, 8]
    assert np.array_equal(taken[2].prepared.tokens, forget)
    assert all((forget == row).all(axis=1).any() for row in taken[1].prepared.tokens)
    with pytest.raises(ConfigError, match="share is 0"):
        Relearning(share=0.0)


def test_benign_text_is_the_retain_corpus_without_neighbours(forgetful, make_case, value):
    attack = BenignRelearning(**TRAINING)
    case = make_case(attack, forgetful)
    retain = case.context.corpora.retain
    assert np.array_equal(case.context.prepared.tokens, retain.tokens[retain.domain == 0])
    assert value(attack.points(case)[-1].measurements, RATIO) > 0


def test_a_model_that_diverges_keeps_what_was_measured_until_then_and_is_not_trained_again(forgetful, make_case):
    attack = Relearning(share=1.0, steps=4, evaluate_every=1, batch_size=8, learning_rate=1e30, optimizer="sgd")
    result = attack.points(make_case(attack, forgetful))
    assert len(result) < 4
    assert attack.points(make_case(attack, None)) == result


def test_what_the_training_teaches_a_model_that_never_knew_stands_beside_it(original, forgetful, make_case, tmp_path):
    attack = Relearning(share=0.5, **TRAINING)
    weak = original.replace(params=forgetful)
    first = attack.points(make_case(attack, weak.params, load_retrained=lambda: weak))
    assert all(point.retrained == point.measurements for point in first)  # the same model, trained in the same way
    assert all(set(point.to_json()) == {"at", "measurements", "retrained"} for point in first)
    # A second method of the run takes the control from before: it would fail if it were trained.
    other = {"load_retrained": lambda: original.replace(params=None), "directory": tmp_path / "b", "identity": "b"}
    second = attack.points(make_case(attack, original.params, **other))
    assert [point.retrained for point in second] == [point.retrained for point in first]
    assert second[0].measurements != first[0].measurements
