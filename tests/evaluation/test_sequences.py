"""Scores of tokens in sequences: right, in order, and the same however they are batched or shared."""

import jax
import numpy as np
import pytest

from trace_jax.evaluation.likelihood import NonFiniteScore, score_sequences
from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    vocab_size=43, hidden_size=16, num_layers=2, num_heads=2, num_experts=4, experts_per_token=2, expert_hidden_size=8
)


@pytest.fixture(scope="module")
def model():
    params = init_params(CONFIG, jax.random.key(0))
    return Model(CONFIG, jax.tree.map(lambda x: 3 * x, params))


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 43, n).tolist() for n in (5, 1, 21, 2, 17, 40, 9)]


def test_scores_are_those_of_the_logits(model, sequences):
    first = [1, 1, 20, 2, 3, 1, 4]
    for sequence, start, found in zip(
        sequences, first, score_sequences(model, sequences, first, moments=True, batch_size=3), strict=True
    ):
        logits = np.asarray(forward(model.params, CONFIG, np.array([sequence], np.int32)).logits[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(start - 1, len(sequence) - 1)
        targets = np.array(sequence[start:], int)
        assert len(found.log_prob) == len(places)
        np.testing.assert_allclose(found.log_prob, log_probs[places, targets], atol=2e-5)
        assert (found.greedy == (log_probs[places].argmax(-1) == targets)).all()
        p = np.exp(log_probs[places])
        mean = (p * log_probs[places]).sum(-1)
        np.testing.assert_allclose(found.mean, mean, atol=2e-5)
        np.testing.assert_allclose(found.variance, (p * log_probs[places] ** 2).sum(-1) - mean**2, atol=1e-4)


def test_the_likeliest_continuation_is_greedy(model):
    tokens = [5, 6, 7]
    for _ in range(4):
        tokens.append(int(forward(model.params, CONFIG, np.array([tokens], np.int32)).logits[0, -1].argmax()))
    assert score_sequences(model, [tokens], [3])[0].greedy.all()
    tokens[-1] = (tokens[-1] + 1) % 43
    assert score_sequences(model, [tokens], [3])[0].greedy.tolist() == [True, True, True, False]


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2), (8, 1, 1)])
def test_any_mesh_gives_the_same(model, sequences, shape):
    data, expert, tensor = shape
    mesh = make_mesh(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)
    alone = score_sequences(model, sequences, moments=True, batch_size=7)
    shared = score_sequences(model, sequences, moments=True, batch_size=2, mesh=mesh)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one.log_prob, other.log_prob, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(one.variance, other.variance, rtol=1e-3, atol=1e-3)
        assert (one.greedy == other.greedy).all()


def test_what_cannot_be_scored_is_refused(model, sequences):
    assert score_sequences(model, []) == []
    with pytest.raises(ValueError, match="empty sequence"):
        score_sequences(model, [[1, 2], []])
    with pytest.raises(ValueError, match="first below 1"):
        score_sequences(model, [[1, 2]], [0])
    broken = model.replace(params=jax.tree.map(lambda x: x * np.float32(np.nan), model.params))
    with pytest.raises(NonFiniteScore):
        score_sequences(broken, sequences)
