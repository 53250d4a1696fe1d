"""A small random model with text that it is measured on, as a case for attacks."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from trace_jax.attacks.attack import Case, Context
from trace_jax.data.corpora import Probes
from trace_jax.data.rows import Rows
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.task import Evaluator
from trace_jax.models.arrays import init_params, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh
from trace_jax.tasks.benchmarks import HandbookConfig, scoreboard
from trace_jax.unlearning.optimizer import OptimizerConfig
from trace_jax.unlearning.train import train_on

CONFIG = ModelConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    num_experts=4,
    experts_per_token=2,
    expert_hidden_size=8,
    router_bias=True,
)


def make_rows(count, *, seed, length=12):
    """One document a row, of unequal lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, CONFIG.vocab_size, (count, length)).astype(np.int32)
    segments = (np.arange(length) < rng.integers(length // 2, length + 1, (count, 1))).astype(np.int32)
    valid = np.pad(segments[:, 1:] > 0, ((0, 0), (0, 1)))
    return Rows(np.where(segments > 0, tokens, 0), segments, valid, np.zeros(count, np.int32))


@pytest.fixture(scope="session")
def text():
    return {"forget": make_rows(8, seed=1), "general": make_rows(8, seed=2)}


@pytest.fixture(scope="session")
def original(text, tmp_path_factory):
    """A model that has learned the forget rows."""
    params = jax.tree.map(lambda x: 2 * x, init_params(CONFIG, jax.random.key(0)))  # so that routing is decided
    result = train_on(
        Model(CONFIG, params),
        OptimizerConfig(learning_rate=1e-2),
        lambda step: text["forget"].batch(np.arange(8)),
        steps=30,
        evaluate=lambda params: None,
        evaluate_every=30,
        seed=0,
        mesh=make_mesh(jax.devices()[:1]),
        directory=tmp_path_factory.mktemp("original"),
        identity="original",
        title="learning the forget rows",
    )
    return Model(CONFIG, unflatten(jax.tree.map(np.asarray, result.trainable)))


@pytest.fixture(scope="session")
def evaluator(original, text):
    settings = EvaluationConfig(batch_size=8, bootstrap=100)
    probes = {"test": Probes({}, text, {}, {})}
    made = Evaluator(settings, probe_tasks(probes, settings, accuracies={}, identity=""), make_mesh(jax.devices()[:1]))
    return dataclasses.replace(made, original=made.score(original, full=True))


@pytest.fixture
def make_case(original, evaluator, tmp_path):
    """make_case(attack, params): a case in which a model with these parameters is attacked."""

    def make(attack, params, **changes):
        retain = dataclasses.replace(make_rows(12, seed=3), domain=np.repeat(np.int32([0, 1]), 6))
        corpora = types.SimpleNamespace(forget=evaluator.tasks[0].data["test", "forget"], retain=retain)
        context = Context(
            attack, original, corpora, HandbookConfig(), scoreboard("text"), evaluator, evaluator.mesh, 0,
            tmp_path / "shared", "shared",
        )  # fmt: skip
        for name in set(changes) & {"evaluator", "load_retrained"}:
            context = dataclasses.replace(context, **{name: changes.pop(name)})
        case = Case(context, original.replace(params=params), tmp_path / "attack", "made for a test")
        return dataclasses.replace(case, **changes)

    return make


@pytest.fixture(scope="session")
def measured():
    """measured(case): the quick measurements of the unlearned model."""
    return lambda case: case.context.evaluator.measure(case.context.evaluator.score(case.unlearned))


@pytest.fixture(scope="session")
def value():
    """value(measurements, name): of the test split."""
    return lambda measurements, name: next(m.value for m in measurements if (m.name, m.split) == (name, "test"))
