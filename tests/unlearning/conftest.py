"""A model small enough that every test compiles in a moment, and rows with padding and several documents."""

import jax
import numpy as np
import pytest

from trace_jax.data.rows import Rows
from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    num_experts=4,
    experts_per_token=2,
    expert_hidden_size=8,
)


def make_rows(count: int, *, seed: int, length: int = 12) -> Rows:
    """Rows of unequal length; every third row holds two documents."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, TINY.vocab_size, (count, length)).astype(np.int32)
    segments = np.ones((count, length), np.int32)
    for row in range(count):
        segments[row, rng.integers(length // 2, length + 1) :] = 0
        if row % 3 == 0:
            segments[row, length // 3 :] *= 2
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    valid = np.pad(same, ((0, 0), (0, 1)))
    return Rows(tokens, segments, valid, np.zeros(count, np.int32))


@pytest.fixture(scope="session")
def model() -> Model:
    params = init_params(TINY, jax.random.key(0))
    scaled = jax.tree.map(lambda x: x * 2.0, params)  # larger than at initialisation, so that routing is decided
    return Model(TINY, scaled)


@pytest.fixture(scope="session")
def forget() -> Rows:
    return make_rows(8, seed=1)


@pytest.fixture(scope="session")
def retain() -> Rows:
    return make_rows(16, seed=2)
