"""Runs are on one device here (tests/multiprocess has one on several), and some start from a finished one."""

import pytest

from tests.run.toy import experiment, on_one_device
from trace_jax.run.methods import run


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    with on_one_device():
        yield


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """(directory of a finished run, the run)."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with on_one_device():
        return path, run(experiment(data), path)
