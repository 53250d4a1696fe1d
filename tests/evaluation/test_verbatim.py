"""The verbatim score: ROUGE-L of greedy continuations."""

import numpy as np
import pytest

from trace_jax.data.probes import Prompts, prompts_of
from trace_jax.evaluation.rouge import rouge_l
from trace_jax.evaluation.verbatim import verbatim_scores
from trace_jax.models.generate import generate


def test_a_continuation_that_the_model_would_write_scores_one(tiny):
    prompts = tiny.make_prompts(5)
    greedy = np.asarray(generate(tiny.params, tiny.config, prompts.prompt, max_new_tokens=4))
    truth = greedy.copy()
    truth[1:] = (greedy[1:] + 1) % 37
    found = verbatim_scores(
        tiny.params, tiny.config, tiny.make_tokenizer(), Prompts(prompts.prompt, truth), batch_size=2
    )
    words = [[" ".join(f"w{i}" for i in row) for row in rows] for rows in (greedy, truth)]
    assert found.score[0] == 1.0
    assert found.score == pytest.approx(rouge_l(*words))
    np.testing.assert_array_equal(found.generated, greedy)
    assert (found.score[1:] < 1).all()


def test_prompts_of_any_length_score_as_they_do_alone(tiny):
    rng = np.random.default_rng(0)
    shapes = ((5, 4), (9, 2), (3, 6), (5, 1), (7, 6))
    pairs = [tuple(rng.integers(3, 37, n).tolist() for n in shape) for shape in shapes]
    together, tokenizer = prompts_of(pairs), tiny.make_tokenizer()
    assert (together.prompt.shape, together.continuation.shape) == ((5, 9), (5, 6))
    assert together.lengths.tolist() == [list(shape) for shape in shapes]
    for row, (prompt, truth) in enumerate(pairs):
        greedy = generate(tiny.params, tiny.config, np.array([prompt]), max_new_tokens=len(truth))[0].tolist()
        together.continuation[row, : len(truth)] = [greedy[0], *truth[1:]]  # one token right, whatever follows
    found = verbatim_scores(tiny.params, tiny.config, tokenizer, together, batch_size=2)
    for row, (prompt, truth) in enumerate(zip(together.prompt, together.continuation, strict=True)):
        P, C = shapes[row]
        alone = Prompts(prompt[None, :P], truth[None, :C])
        expected = verbatim_scores(tiny.params, tiny.config, tokenizer, alone)
        assert found.score[row] == pytest.approx(expected.score[0]) and found.score[row] > 0
        np.testing.assert_array_equal(found.generated[row, :C], expected.generated[0])
    assert found.score[3] == 1.0
    part = together.take(np.array([2, 0]))
    assert part.unpadded(part.continuation) == [
        together.continuation[2, :6].tolist(),
        together.continuation[0, :4].tolist(),
    ]
