"""The corpora are built once for all tests."""

import pytest

from trace_jax.tasks.benchmarks import HandbookConfig, PresidentsConfig, build_corpora


@pytest.fixture(scope="session")
def handbook():
    return build_corpora(HandbookConfig())


@pytest.fixture(scope="session")
def presidents():
    return build_corpora(PresidentsConfig())
