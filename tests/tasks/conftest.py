"""The corpora are built once for all tests."""

import pytest

from trace_jax.data.corpora import build_corpora
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.presidents import PresidentsConfig


@pytest.fixture(scope="session")
def handbook():
    return build_corpora(HandbookConfig())


@pytest.fixture(scope="session")
def presidents():
    return build_corpora(PresidentsConfig())
