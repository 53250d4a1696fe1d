"""The verbatim score: ROUGE-L of greedy continuations."""

import numpy as np
import pytest

from trace_jax.data.probes import Prompts
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
