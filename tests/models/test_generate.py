"""Greedy decoding equals taking the argmax of a whole new forward pass for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import generate

CONFIG = ModelConfig(
    vocab_size=23,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    num_experts=6,
    experts_per_token=2,
    expert_hidden_size=8,
)
NEW = 6


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(3))


@pytest.fixture(scope="module")
def prompt():
    return np.asarray(jax.random.randint(jax.random.key(4), (4, 7), 0, CONFIG.vocab_size))


def argmax_of_repeated_forward(params, prompt, lengths):
    length = prompt.shape[1] + NEW
    logits = jax.jit(lambda tokens, mask: forward(params, CONFIG, tokens, mask=mask).logits)
    produced = []
    for row, used in zip(prompt, lengths, strict=True):
        tokens = list(row[:used])
        for _ in range(NEW):
            padded = np.zeros((1, length), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(logits(padded, np.arange(length)[None] < len(tokens))[0, len(tokens) - 1])))
        produced.append(tokens[used:])
    return np.array(produced)


def test_equals_repeated_forward_passes(params, prompt):
    lengths = [7] * 4
    np.testing.assert_array_equal(
        generate(params, CONFIG, prompt, max_new_tokens=NEW), argmax_of_repeated_forward(params, prompt, lengths)
    )


def test_prompts_of_unequal_length(params, prompt):
    lengths = np.array([3, 7, 1, 5])
    expected = argmax_of_repeated_forward(params, prompt, lengths)
    got = generate(params, CONFIG, prompt, lengths=lengths, max_new_tokens=NEW)
    np.testing.assert_array_equal(got, expected)
    # What stands behind a prompt in its row is never read.
    other = np.where(np.arange(7)[None] < lengths[:, None], prompt, 9)
    np.testing.assert_array_equal(generate(params, CONFIG, other, lengths=lengths, max_new_tokens=NEW), expected)


def test_a_finished_row_is_filled_with_the_end_token(params, prompt):
    free = np.asarray(generate(params, CONFIG, prompt, max_new_tokens=NEW))
    eos = int(free[0, 2])
    got = np.asarray(generate(params, CONFIG, prompt, max_new_tokens=NEW, eos_id=eos))
    for row, expected in zip(got, free, strict=True):
        ends = np.flatnonzero(expected == eos)
        stop = ends[0] if len(ends) else NEW
        np.testing.assert_array_equal(row[:stop], expected[:stop])
        assert np.all(row[stop:] == eos)


def test_wrong_arguments_are_named(params, prompt):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(params, CONFIG, prompt, max_new_tokens=0)
    with pytest.raises(ValueError, match="one per prompt"):
        generate(params, CONFIG, prompt, lengths=jnp.ones(3, jnp.int32), max_new_tokens=1)
    with pytest.raises(ValueError, match="P >= 1"):
        generate(params, CONFIG, prompt[:, :0], max_new_tokens=1)
