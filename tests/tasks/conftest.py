"""The corpora are built once for all tests, and no data set is kept on the machine."""

import datasets
import pytest

from trace_jax.data.corpora import build_corpora
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.presidents import PresidentsConfig


@pytest.fixture(autouse=True)
def _data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="session")
def handbook():
    return build_corpora(HandbookConfig())


@pytest.fixture(scope="session")
def presidents():
    return build_corpora(PresidentsConfig())
