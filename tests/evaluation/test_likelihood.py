"""Scores by likelihood equal a slow reference that runs one text at a time and takes its full softmax.

Each with and without a guide, through whose experts every token goes; the reference finds them in a pass of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import handmade, tiny
from trace_jax.evaluation.likelihood import NonFiniteScore, score_questions, score_rows, score_sequences, spread_indices
from trace_jax.evaluation.membership import gradient_norms
from trace_jax.models.generate import continue_tokens
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh

PARAMS, ROWS, QUESTIONS = handmade.make_params(), tiny.make_rows(6), handmade.make_questions(3)
TEXTS = [np.random.default_rng(0).integers(3, handmade.V, n).tolist() for n in (5, 1, 13, 2, 15, 16, 9)]
FIRST = [1, 1, 12, 2, 3, 1, 4]


def check_rows(nll, guide):
    """NLL of `ROWS`, six in batches of four, against one document at a time."""
    expected = np.zeros(ROWS.tokens.shape)
    for row, document in np.ndindex(len(ROWS), 2):
        own = np.flatnonzero(ROWS.segments[row] == document + 1)
        if len(own):
            expected[row, own[:-1]] = -handmade.log_probability(PARAMS, ROWS.tokens[row][own], guide=guide)
    np.testing.assert_allclose(nll, np.where(ROWS.valid, expected, 0), rtol=1e-4, atol=1e-4)


def check_sequences(scores, guide):
    for text, first, result in zip(TEXTS, FIRST, scores, strict=True):
        log_p = handmade.log_probabilities(PARAMS, text, guide=guide)[first - 1 : -1]
        assert result.log_prob.shape == result.greedy.shape == (max(0, len(text) - first),)
        np.testing.assert_allclose(result.log_prob, log_p[np.arange(len(log_p)), text[first:]], rtol=1e-4, atol=2e-5)
        assert (result.greedy == (log_p.argmax(-1) == np.array(text[first:]))).all()
        if result.mean is not None:
            mean = (np.exp(log_p) * log_p).sum(-1)
            np.testing.assert_allclose(result.mean, mean, atol=5e-5)
            np.testing.assert_allclose(result.variance, (np.exp(log_p) * log_p**2).sum(-1) - mean**2, atol=5e-4)


@pytest.mark.parametrize("seed", [None, 1])
def test_scores_equal_one_text_at_a_time(seed):
    guide = None if seed is None else handmade.make_params(seed)  # its routers disagree with the model's
    model = Model(handmade.CONFIG, PARAMS, guide=guide)
    nll = score_rows(model, ROWS, batch_size=4)
    check_rows(nll, guide)
    if guide is not None:
        own, unguided = (score_rows(model.replace(guide=other), ROWS, batch_size=4) for other in (PARAMS, None))
        assert np.abs(nll - unguided).max() > 0.1
        np.testing.assert_allclose(own, unguided, rtol=1e-4, atol=1e-5)
    one_token = handmade.make_questions(3, longest=1)
    strangers = dataclasses.replace(one_token, tokens=one_token.tokens.copy())  # options without a common beginning
    strangers.tokens[:, 1, 1] += 1
    for questions in (QUESTIONS, one_token, strangers):
        result = score_questions(model, questions, batch_size=2)
        for q, o in np.ndindex(3, 4):
            length = int(questions.segments[q, o].sum())
            log_p = handmade.log_probability(PARAMS, questions.tokens[q, o, :length], guide=guide)
            assert result[q, o] == pytest.approx(log_p[questions.scored[q, o, : length - 1]].sum(), rel=1e-4)
    check_sequences(score_sequences(model, TEXTS, FIRST, moments=guide is None, batch_size=4), guide)


def test_a_guide_is_followed_on_several_devices():
    """`test_whole_evaluation.py` has everything else on a mesh."""
    guide, mesh = handmade.make_params(1), make_mesh(jax.devices()[:4], data=2, tensor=2)
    model = Model(handmade.CONFIG, PARAMS, guide=guide)
    check_rows(score_rows(model, ROWS, batch_size=3, mesh=mesh), guide)
    check_sequences(score_sequences(model, TEXTS, FIRST, batch_size=3, mesh=mesh), guide)


def test_what_cannot_follow_a_guide_is_refused():
    model = handmade.make_model().replace(guide=handmade.make_params(1))
    with pytest.raises(ValueError, match="generation can't be"):
        continue_tokens(model, [[3, 4]], max_new_tokens=2)
    with pytest.raises(ValueError, match="a gradient can't be"):
        gradient_norms(model, [[3, 4]], [1])


def test_a_diverged_model_is_refused_instead_of_scored():
    model = Model(handmade.CONFIG, PARAMS)
    assert score_sequences(model, []) == []
    broken = model.replace(params={**PARAMS, "final_norm": PARAMS["final_norm"] * jnp.float32(np.nan)})
    sequences = functools.partial(score_sequences, first=FIRST, moments=True)
    for score, texts in ((score_questions, QUESTIONS), (score_rows, ROWS), (sequences, TEXTS)):
        with pytest.raises(NonFiniteScore, match="diverged"):
            score(broken, texts, batch_size=4)


def test_thinning_keeps_the_order_and_touches_all_parts():
    assert [spread_indices(*n).tolist() for n in ((5, 10), (10, 5))] == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]]
    chosen = spread_indices(1000, 96)
    assert len(chosen) == len(set(chosen.tolist())) == 96
    assert np.diff(chosen).min() >= 10 and np.diff(chosen).max() <= 11
