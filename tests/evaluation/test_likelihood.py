"""Scores by likelihood equal a slow reference that runs one text at a time and takes its full softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.evaluation.likelihood import (
    NonFiniteScore,
    QuestionScores,
    score_questions,
    score_rows,
    spread_indices,
)
from trace_jax.models.decoder import forward
from trace_jax.parallel.mesh import make_mesh

LONGEST = 16  # one compile serves all texts: what follows a text can't reach back to it
run_forward = jax.jit(forward, static_argnums=1)


def log_probabilities(params, config, tokens):
    """log p of every token but the first of one text, f32 [len - 1]."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(run_forward(params, config, padded).logits[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return log_p[np.arange(len(tokens) - 1), tokens[1:]]


def test_row_nll_equals_one_document_at_a_time(tiny):
    rows = tiny.make_rows(3)
    found = score_rows(tiny.params, tiny.config, rows, batch_size=3)
    for row in range(3):
        expected = 0.0
        for document in (1, 2):
            tokens = rows.tokens[row][rows.segments[row] == document]
            expected -= log_probabilities(tiny.params, tiny.config, tokens).sum()
        assert found.nll[row] == pytest.approx(expected, rel=1e-4)
    assert found.tokens.tolist() == rows.valid.sum(axis=1).tolist()
    assert (found.token_nll[~rows.valid] == 0).all()


def test_question_scores_equal_one_option_at_a_time(tiny):
    questions = tiny.make_questions(3)
    found = score_questions(tiny.params, tiny.config, questions, batch_size=3)
    expected = np.zeros((3, 4))
    for q, o in np.ndindex(3, 4):
        length = int(questions.segments[q, o].sum())
        log_p = log_probabilities(tiny.params, tiny.config, questions.tokens[q, o, :length])
        expected[q, o] = log_p[questions.scored[q, o, : length - 1]].sum()
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-4)
    assert (found.correct == (expected.argmax(axis=1) == questions.answer)).all()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_no_score(tiny, batch_size):
    rows, questions = tiny.make_rows(7), tiny.make_questions(7)
    one = score_rows(tiny.params, tiny.config, rows, batch_size=7)
    other = score_rows(tiny.params, tiny.config, rows, batch_size=batch_size)
    np.testing.assert_allclose(other.token_nll, one.token_nll, rtol=1e-4, atol=1e-5)
    one = score_questions(tiny.params, tiny.config, questions, batch_size=7)
    other = score_questions(tiny.params, tiny.config, questions, batch_size=batch_size)
    np.testing.assert_allclose(other.log_likelihood, one.log_likelihood, rtol=1e-4)


def test_the_device_count_changes_no_score(tiny):
    rows = tiny.make_rows(7)
    one = score_rows(tiny.params, tiny.config, rows, batch_size=3)
    four = score_rows(tiny.params, tiny.config, rows, batch_size=3, mesh=make_mesh(jax.devices()[:4]))
    np.testing.assert_allclose(four.token_nll, one.token_nll, rtol=1e-4, atol=1e-5)


def test_of_equally_likely_options_the_first_is_taken():
    scores = QuestionScores(np.array([[-1.0, -1.0], [-1.0, -1.0]]), np.array([0, 1]), np.array([0, 1]))
    assert scores.correct.tolist() == [True, False]


def test_a_diverged_model_is_refused_instead_of_scored(tiny):
    params = {**tiny.params, "final_norm": tiny.params["final_norm"] * jnp.float32(np.nan)}
    with pytest.raises(NonFiniteScore, match="diverged"):
        score_questions(params, tiny.config, tiny.make_questions(3))
    with pytest.raises(NonFiniteScore, match="diverged"):
        score_rows(params, tiny.config, tiny.make_rows(3))


def test_thinning_keeps_the_order_and_touches_all_parts():
    assert spread_indices(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread_indices(10, 5).tolist() == [0, 2, 4, 6, 8]
    kept = spread_indices(1000, 96)
    assert len(kept) == len(set(kept.tolist())) == 96
    assert np.diff(kept).min() >= 10 and np.diff(kept).max() <= 11
