"""Relearning is next-token training on the rows that it says, measured as it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.attacks.attack import Control, strongest
from trace_jax.attacks.config import BenignRelearningConfig, RelearningConfig
from trace_jax.attacks.relearning import benign_relearning, benign_rows, relearning
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
    case = make_case(forgetful(original))
    settings = RelearningConfig(share=1.0, steps=1, evaluate_every=1, batch_size=8, learning_rate=0.1, optimizer="sgd")
    (point,) = relearning(settings, case)
    gradient = jax.grad(mean_nll)(case.unlearned.params, original.config, case.corpora.forget)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    scale = 0.1 * jnp.minimum(1, 1 / norm)
    expected = jax.tree.map(lambda p, g: p - scale * g, case.unlearned.params, gradient)
    scores = score_rows(expected, original.config, case.corpora.forget)
    assert point.at == "1 steps"
    assert value(point.measurements, "forget_nll") == pytest.approx(scores.nll.sum() / scores.tokens.sum(), rel=1e-4)


def test_what_was_hidden_comes_back_with_training_and_the_worst_point_counts(original, make_case, value, measured):
    case = make_case(forgetful(original))
    settings = RelearningConfig(share=1.0, steps=6, evaluate_every=4, batch_size=4, learning_rate=2e-3)
    points = relearning(settings, case)
    assert [point.at for point in points] == ["4 steps", "6 steps"]
    ratios = [value(point.measurements, RATIO) for point in points]
    assert value(measured(case, case.unlearned.params), RATIO) < min(ratios)
    assert strongest(points, RATIO) == int(np.argmax(ratios))
    assert strongest(points, "verbatim") is None
    assert not (case.directory / "checkpoints").exists()


def test_a_finished_attack_is_not_trained_again_and_another_one_is(original, make_case):
    case = make_case(forgetful(original))
    settings = RelearningConfig(share=0.2, steps=2, evaluate_every=2, batch_size=2)
    first = relearning(settings, case)
    assert [row["step"] for row in front_rows(case.directory, case.identity)] == [2]
    assert relearning(settings, make_case(forgetful(original), identity="another")) == first
    assert not front_rows(case.directory, case.identity)  # what another attack left is gone


def test_share_takes_that_many_rows(original, make_case, monkeypatch):
    from trace_jax.attacks import relearning as module

    seen = []
    monkeypatch.setattr(module, "_trained", lambda settings, case, rows, title: seen.append(rows.tokens) or [])
    case = make_case(original.params)
    for share in (0.01, 0.5, 1.0):
        relearning(RelearningConfig(share=share), case)
    forget = case.corpora.forget.tokens
    assert [len(rows) for rows in seen] == [1, 4, 8]
    assert np.array_equal(seen[2], forget)
    assert all((forget == row).all(axis=1).any() for row in seen[1])


def test_benign_text_is_the_retain_corpus_without_neighbours(original, make_case, value):
    case = make_case(forgetful(original))
    rows = benign_rows(BenignRelearningConfig(), case)
    assert np.array_equal(rows.tokens, case.corpora.retain.tokens[:6])
    before = score_rows(case.unlearned.params, original.config, rows)
    points = benign_relearning(BenignRelearningConfig(steps=8, evaluate_every=8, learning_rate=1e-2), case)
    assert len(points) == 1 and value(points[0].measurements, RATIO) > 0
    assert before.nll.sum() > 0


def test_a_model_that_diverges_keeps_what_was_measured_until_then(original, make_case):
    case = make_case(forgetful(original))
    settings = RelearningConfig(share=1.0, steps=4, evaluate_every=1, batch_size=8, learning_rate=1e30, optimizer="sgd")
    assert len(relearning(settings, case)) < 4


def test_a_share_is_above_zero():
    with pytest.raises(ConfigError, match="share is 0"):
        RelearningConfig(share=0.0)


def test_what_the_training_teaches_a_model_that_never_knew_stands_beside_it(original, make_case, tmp_path):
    control = Control(lambda: original.replace(params=forgetful(original)), tmp_path / "shared", "shared")
    case = make_case(forgetful(original), control=control)
    settings = RelearningConfig(share=0.5, steps=2, evaluate_every=1, batch_size=2, learning_rate=1e-3)
    first = relearning(settings, case)
    assert all(point.retrained == point.measurements for point in first)  # the same model, trained in the same way
    assert all(set(point.to_json()) == {"at", "measurements", "retrained"} for point in first)
    # A second method of the run takes the control from before: it would fail if it were trained.
    control = Control(lambda: original.replace(params=None), tmp_path / "shared", "shared")
    other = make_case(original.params, control=control, directory=tmp_path / "other", identity="other")
    second = relearning(settings, other)
    assert [point.retrained for point in second] == [point.retrained for point in first]
    assert second[0].measurements != first[0].measurements
