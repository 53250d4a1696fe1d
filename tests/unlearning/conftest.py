"""The tiny world (`tests.tiny`) with one topic to forget, and settings whose runs share one compiled step."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.models.architecture import abstract_params, flatten
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import to_host
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import expert_statistics
from trace_jax.routing.weights import Recalibration, retain_weights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.unlearn import unlearn

ONE = tiny.mesh_of(1, 1, 1)
BATCHES = {"forget_batch_size": 4, "retain_batch_size": 4}
CONFIG = UnlearningConfig(**BATCHES, steps=6, learning_rate=0.05, alpha=1.0, checkpoint_every=6)


class Stop(Exception):
    """Stands for Ctrl-C or a kill between two steps."""


def make_rows(count: int, *, seed: int) -> Rows:
    """Rows of unequal length, every third with two documents, all of one topic."""
    return dataclasses.replace(tiny.make_rows(count, seed=seed), domain=np.zeros(count, np.int32))


def statistics_of(model, *corpora):
    return [expert_statistics(model, sequential_batches(r, 8), min_activations=1, mesh=ONE) for r in corpora]


def run(model, forget, retain, config=CONFIG, mesh=ONE, **options):
    return unlearn(model, forget, retain, config=config, mesh=mesh, **options)


def calibration(**settings) -> CalibrationConfig:
    """By default of all experts."""
    return CalibrationConfig({"name": "matching", "rule": "all", **settings})


def weights_of(model, forget, retain, **settings):
    forget_statistics, retain_statistics = statistics_of(model, forget, retain)
    return retain_weights(
        calibration(**settings), model=model, forget=forget, retain=retain,
        forget_statistics=forget_statistics, retain_statistics=retain_statistics,
    )  # fmt: skip


def solver_of(model, forget, retain, every, **settings) -> Recalibration:
    routing = {"name": "recalibrated", "every": every}
    return Recalibration(calibration(routing=routing, **settings), model, forget, retain, mesh=ONE)


def in_bfloat16(model: Model) -> Model:
    """With what is always float32, such as routers, left so."""
    config = dataclasses.replace(model.config, dtype="bfloat16")
    params = jax.tree.map(lambda x, spec: x.astype(spec.dtype), model.params, abstract_params(config))
    return dataclasses.replace(model, config=config, params=params)


def flat_of(model: Model) -> dict[str, np.ndarray]:
    return to_host(flatten(model.params))


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="session")
def model() -> Model:
    return tiny.make_model()


@pytest.fixture(scope="session")
def forget() -> Rows:
    return make_rows(8, seed=1)


@pytest.fixture(scope="session")
def retain() -> Rows:
    return make_rows(16, seed=2)
