"""Random routing, and the tiny model with its corpora."""

import numpy as np
import pytest

from tests import tiny
from trace_jax.data.rows import sequential_batches
from trace_jax.routing.statistics import expert_routing

ONE = tiny.mesh_of(1, 1, 1)


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
    return tiny.make_model()


@pytest.fixture(scope="session")
def corpora():
    """Forget text of half the words and retain text of all; a retain row has nothing to learn from."""
    forget, retain = tiny.make_rows(16, seed=1, vocab_size=32), tiny.make_rows(24, seed=2)
    retain.valid[5] = False
    return {"forget": forget, "retain": retain}


@pytest.fixture(scope="session")
def routed(corpora):
    """routed(model) -> keyword arguments of `retain_weights`."""

    def arguments(model):
        of = {name: expert_routing(model, sequential_batches(rows, 8), mesh=ONE) for name, rows in corpora.items()}
        statistics = {f"{name}_statistics": found for name, (found, _) in of.items()}
        passes = {"mesh": ONE, "batch_size": 8}
        return {"model": model, **corpora, **statistics, "assignments": of["retain"][1], **passes}

    return arguments


@pytest.fixture(scope="session")
def setting(routed, tiny_model):
    return routed(tiny_model)
