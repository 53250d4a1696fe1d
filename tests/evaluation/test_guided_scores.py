"""A model with a guide is scored through the experts that the guide chooses on the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.likelihood import gradient_norms, score_questions, score_rows, score_sequences
from trace_jax.evaluation.measurement import find
from trace_jax.evaluation.task import TaskScores
from trace_jax.models.decoder import forward
from trace_jax.models.generate_text import continue_tokens
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def other(tiny):
    """Another model whose routers disagree with the first."""
    return tiny.make_params(1)


def two_passes(tiny, guide, tokens, mask):
    """Log-probabilities f64 [B, S, V], from the logits of a pass whose experts come from a pass of its own."""
    indices = forward(guide, tiny.config, tokens, mask=mask, collect=("indices",)).router.indices
    logits = np.asarray(forward(tiny.params, tiny.config, tokens, mask=mask, experts=indices).logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def rows_and_nll(tiny, other):
    """Rows, and the NLL [N, S] that the guided model must have on them."""
    rows = tiny.make_rows(6)
    log_p = two_passes(tiny, other, rows.tokens, rows.segments)
    following = np.roll(rows.tokens, -1, axis=1)
    nll = -np.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
    return rows, np.where(rows.valid, nll, 0)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 4, 1)])
def test_rows_are_scored_through_the_guides_experts(tiny, other, rows_and_nll, sizes):
    rows, nll = rows_and_nll
    mesh = None
    if sizes is not None:
        data, expert, tensor = sizes
        mesh = make_mesh(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)
    found = score_rows(tiny.params, tiny.config, rows, guide=other, batch_size=4, mesh=mesh)
    np.testing.assert_allclose(found.token_nll, nll, rtol=1e-4, atol=1e-4)
    free = score_rows(tiny.params, tiny.config, rows, batch_size=4)
    assert np.abs(free.token_nll - nll).max() > 0.1

    sequences = [tokens[segments == 1].tolist() for tokens, segments in zip(rows.tokens, rows.segments, strict=True)]
    model = Model(tiny.config, tiny.params, guide=other)
    for row, scores in enumerate(score_sequences(model, sequences, batch_size=4, mesh=mesh)):
        np.testing.assert_allclose(scores.log_prob, -nll[row, : len(sequences[row]) - 1], rtol=1e-4, atol=1e-4)


def test_questions_are_scored_through_the_guides_experts(tiny, other):
    questions = tiny.make_questions(3)
    found = score_questions(tiny.params, tiny.config, questions, guide=other)
    for q in range(3):
        log_p = two_passes(tiny, other, questions.tokens[q], questions.segments[q])
        following = np.roll(questions.tokens[q], -1, axis=1)
        log_p = np.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
        expected = np.where(questions.scored[q], log_p, 0).sum(axis=1)
        np.testing.assert_allclose(found.log_likelihood[q], expected, rtol=1e-4)


class _MeanLogProb:
    """A task that a run scores often: one number by likelihood."""

    name, quick, identity = "mean_log_prob", True, "1"

    def score(self, model, *, batch_size, mesh):
        [scores] = score_sequences(model, [[3, 4, 5, 6, 7, 8, 9]], batch_size=batch_size, mesh=mesh)
        return TaskScores({"log_prob": scores.log_prob})

    def measure(self, scores, **_):
        return []


def test_the_evaluator_passes_the_guide_to_everything_quick(tiny, other):
    settings = EvaluationConfig(batch_size=8, bootstrap=100)
    probes, task = {"test": tiny.make_probes(text=("forget",), questions=("forget",), members=False)}, _MeanLogProb()
    evaluator, model = tiny.make_evaluator(settings, probes, benchmark="handbook", tasks=(task,)), tiny.make_model()
    free, own, guided = (evaluator.score(model.replace(guide=guide)) for guide in (None, tiny.params, other))
    rows = score_rows(tiny.params, tiny.config, probes["test"].text["forget"], guide=other)
    asked = score_questions(tiny.params, tiny.config, probes["test"].questions["forget"], guide=other)
    told = task.score(model.replace(guide=other), batch_size=8, mesh=None).arrays["log_prob"]
    unguided = free["text"].arrays["test/forget/nll"]
    for scores, nll in ((own, unguided), (guided, rows.nll)):
        np.testing.assert_allclose(scores["text"].arrays["test/forget/nll"], nll, rtol=1e-4)
    path = "test/forget/log_likelihood"
    found = guided["questions"].arrays[path]
    np.testing.assert_allclose(found, asked.log_likelihood, rtol=1e-4)
    assert np.abs(found - free["questions"].arrays[path]).max() > 0.1
    np.testing.assert_allclose(guided["mean_log_prob"].arrays["log_prob"], told, rtol=1e-5)
    assert np.abs(free["mean_log_prob"].arrays["log_prob"] - told).max() > 0.05
    nll = find(evaluator.measure(guided), "forget_nll", "test")
    assert nll.value == pytest.approx(rows.nll.sum() / rows.tokens.sum(), rel=1e-5)
    assert nll.value != pytest.approx(unguided.sum() / rows.tokens.sum(), rel=1e-3)
    with pytest.raises(ValueError, match="generation can't be"):
        evaluator.score(model.replace(guide=other), full=True)


def test_what_cannot_follow_a_guide_is_refused(tiny, other):
    model = Model(tiny.config, tiny.params, tiny.make_tokenizer(), guide=other)
    with pytest.raises(ValueError, match="generation can't be"):
        continue_tokens(model, [[3, 4]], max_new_tokens=2)
    with pytest.raises(ValueError, match="a gradient can't be"):
        gradient_norms(model, [[3, 4]], [1])
    wide = {**other, "head": jnp.zeros((16, 3))}
    with pytest.raises(ValueError, match=r"head has shape \(16, 3\) in the guide and \(16, 37\)"):
        score_rows(tiny.params, tiny.config, tiny.make_rows(2), guide=wide)
    with pytest.raises(ValueError, match="final_norm has shape None in the guide"):
        score_sequences(
            model.replace(guide={name: a for name, a in other.items() if name != "final_norm"}), [[3, 4, 5]]
        )
