"""Random routing, and a tiny model whose routing is real."""

import jax
import numpy as np
import pytest

from trace_jax.data.rows import Rows
from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model


@pytest.fixture(scope="session")
def random_routing():
    """make(seed, layers, tokens, experts, top_k, spread) -> integer [L, T, K]: top K of random scores.

    Every layer prefers some experts; tokens come in `domains` that prefer others, so that layers are correlated.
    """

    def make(seed=0, *, layers=2, tokens=3000, experts=8, top_k=2, spread=1.0, domains=5):
        generator = np.random.default_rng(seed)
        preference = spread * generator.normal(size=(layers, domains, experts))
        domain = generator.integers(0, domains, tokens)
        scores = preference[:, domain] + generator.gumbel(size=(layers, tokens, experts))
        return np.argsort(-scores, axis=-1)[..., :top_k].astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def tiny_model():
    config = ModelConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, num_experts=8,
        experts_per_token=2, expert_hidden_size=8,
    )  # fmt: skip
    return Model(config, init_params(config, jax.random.key(0)))


@pytest.fixture(scope="session")
def random_rows():
    """make(seed, rows, length, low, high) -> Rows of uneven lengths with two documents each; neighbours every third."""

    def make(seed, rows=12, length=24, low=0, high=50):
        generator = np.random.default_rng(seed)
        tokens = generator.integers(low, high, (rows, length), dtype=np.int32)
        end = generator.integers(length // 2, length + 1, (rows, 1))
        middle = generator.integers(2, length // 2, (rows, 1))
        position = np.arange(length)[None]
        segments = np.where(position < middle, 1, np.where(position < end, 2, 0)).astype(np.int32)
        following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
        valid = (segments > 0) & (segments == following)
        return Rows(np.where(segments > 0, tokens, 0), segments, valid, (np.arange(rows) % 3 == 0).astype(np.int32))

    return make
