"""Relearning is next-token training on the rows that it says, measured as it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.attacks.relearning import BenignRelearning, Relearning
from trace_jax.config import ConfigError
from trace_jax.evaluation.likelihood import score_rows
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.unlearning.metrics import front_rows

RATIO = "forget_probability_ratio"


def forgetful(original):
    """The original with a weaker output head: it knows less of everything."""
    return {**original.params, "head": original.params["head"] * 0.3}


def mean_nll(params, config, rows):
    hidden = forward(params, config, jnp.asarray(rows.tokens), mask=jnp.asarray(rows.segments), collect=("hidden",))
    targets = np.concatenate([rows.tokens[:, 1:], rows.tokens[:, -1:]], axis=1)
    nll = token_nll(params, config, hidden.hidden, jnp.asarray(targets))
    return jnp.where(rows.valid, nll, 0).sum() / rows.valid.sum(dtype=np.float32)


def test_a_step_is_a_step_of_gradient_descent_on_the_forget_rows(original, make_case, value):
    attack = Relearning(share=1.0, steps=1, evaluate_every=1, batch_size=8, learning_rate=0.1, optimizer="sgd")
    case = make_case(attack, forgetful(original))
    (point,) = attack.points(case)
    gradient = jax.grad(mean_nll)(case.unlearned.params, original.config, case.context.corpora.forget)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    scale = 0.1 * jnp.minimum(1, 1 / norm)
    expected = jax.tree.map(lambda p, g: p - scale * g, case.unlearned.params, gradient)
    scores = score_rows(expected, original.config, case.context.corpora.forget)
    assert point.at == "1 steps"
    assert value(point.measurements, "forget_nll") == pytest.approx(scores.nll.sum() / scores.tokens.sum(), rel=1e-4)


def test_what_was_hidden_comes_back_with_training_and_the_worst_point_counts(original, make_case, value, measured):
    attack = Relearning(share=1.0, steps=6, evaluate_every=4, batch_size=4, learning_rate=2e-3)
    case = make_case(attack, forgetful(original))
    found = case.attack()
    assert [point["at"] for point in found["points"]] == ["4 steps", "6 steps"]
    points = attack.points(case)
    ratios = [value(point.measurements, RATIO) for point in points]
    assert value(measured(case), RATIO) < min(ratios)
    assert (found["measure"], found["strongest"]) == (RATIO, int(np.argmax(ratios)))
    assert not (case.directory / "checkpoints").exists()


def test_a_finished_attack_is_not_trained_again_and_another_one_is(original, make_case):
    attack = Relearning(share=0.2, steps=2, evaluate_every=2, batch_size=2)
    first = attack.points(case := make_case(attack, forgetful(original)))
    assert [row["step"] for row in front_rows(case.directory, case.identity)] == [2]
    assert attack.points(make_case(attack, None)) == first  # it would fail if it were trained
    assert attack.points(make_case(attack, forgetful(original), identity="another")) == first
    assert not front_rows(case.directory, case.identity)  # what another attack left is gone


def test_share_takes_that_many_rows(original, make_case):
    taken = [make_case(Relearning(share=share), original.params).context for share in (0.01, 0.5, 1.0)]
    forget = taken[0].corpora.forget.tokens
    assert [len(context.prepared) for context in taken] == [1, 4, 8]
    assert np.array_equal(taken[2].prepared.tokens, forget)
    assert all((forget == row).all(axis=1).any() for row in taken[1].prepared.tokens)


def test_benign_text_is_the_retain_corpus_without_neighbours(original, make_case, value):
    attack = BenignRelearning(steps=8, evaluate_every=8, learning_rate=1e-2)
    case = make_case(attack, forgetful(original))
    assert np.array_equal(case.context.prepared.tokens, case.context.corpora.retain.tokens[:6])
    (point,) = attack.points(case)
    assert value(point.measurements, RATIO) > 0


def test_a_model_that_diverges_keeps_what_was_measured_until_then_and_is_not_trained_again(original, make_case):
    attack = Relearning(share=1.0, steps=4, evaluate_every=1, batch_size=8, learning_rate=1e30, optimizer="sgd")
    found = attack.points(make_case(attack, forgetful(original)))
    assert len(found) < 4
    assert attack.points(make_case(attack, None)) == found


def test_a_share_is_above_zero():
    with pytest.raises(ConfigError, match="share is 0"):
        Relearning(share=0.0)


def test_what_the_training_teaches_a_model_that_never_knew_stands_beside_it(original, make_case, tmp_path):
    attack = Relearning(share=0.5, steps=2, evaluate_every=1, batch_size=2, learning_rate=1e-3)
    weak = original.replace(params=forgetful(original))
    first = attack.points(make_case(attack, weak.params, load_retrained=lambda: weak))
    assert all(point.retrained == point.measurements for point in first)  # the same model, trained in the same way
    assert all(set(point.to_json()) == {"at", "measurements", "retrained"} for point in first)
    # A second method of the run takes the control from before: it would fail if it were trained.
    other = {"load_retrained": lambda: original.replace(params=None), "directory": tmp_path / "b", "identity": "b"}
    second = attack.points(make_case(attack, original.params, **other))
    assert [point.retrained for point in second] == [point.retrained for point in first]
    assert second[0].measurements != first[0].measurements
