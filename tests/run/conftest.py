"""A finished run, made once for all files that start from one or copy it."""

import pytest

from tests.run.toy import experiment
from trace_jax.run.methods import run


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """(its directory, what it said)."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, run(experiment(data), path)
