"""Greedy generation equals transformers' token for token, in every family, for prompts of unequal length."""

import numpy as np
import pytest
import torch
from tiny_checkpoints import MODEL_TYPES

from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.models.generate import generate

LENGTHS = np.array([11, 6, 1])
PROMPT = np.random.default_rng(1).integers(3, 97, (3, 11)).astype(np.int32)
NEW = 12  # beyond windows, and past the length at which long-context factors change


def their_tokens(model):
    """transformers' greedy tokens i32 [B, NEW], with padding on the left."""
    longest = PROMPT.shape[1]
    places = np.arange(longest) - (longest - LENGTHS)[:, None]
    ids = np.where(places >= 0, np.take_along_axis(PROMPT, np.maximum(places, 0), axis=1), 0)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    mask = torch.tensor((places >= 0).astype(np.int64))
    return model.generate(torch.tensor(ids), attention_mask=mask, **settings).numpy()[:, longest:]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_equal_those_of_transformers(model_type, tiny_model, tiny_checkpoint):
    model = load_pretrained(tiny_checkpoint(model_type))
    got = generate(model.params, model.config, PROMPT, lengths=LENGTHS, max_new_tokens=NEW)
    np.testing.assert_array_equal(got, their_tokens(tiny_model(model_type)))
