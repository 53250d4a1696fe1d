"""The corpora are built once for all tests."""

import pytest

from trace_jax.data.config import DataConfig
from trace_jax.data.corpora import build_corpora


@pytest.fixture(scope="session")
def handbook():
    return build_corpora(DataConfig())


@pytest.fixture(scope="session")
def presidents():
    return build_corpora(DataConfig(benchmark="presidents"))
