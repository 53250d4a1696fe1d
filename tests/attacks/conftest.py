"""A small model, text that it would write itself, and cases in which it is attacked.

One expert per token with weight 1: then routing is all that a router does, and a model that only routes around what it
knows must give everything back.
"""

import dataclasses
import types

import numpy as np
import pytest

from tests import handmade, tiny
from trace_jax.attacks.attack import Case, Context
from trace_jax.data.corpora import Probes, Questions
from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.evaluation.intervals import find
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.task import EvaluationConfig, Evaluator
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.generate import generate
from trace_jax.models.model import Model
from trace_jax.routing.statistics import expert_assignments
from trace_jax.tasks.benchmarks import TextConfig

CONFIG = dataclasses.replace(tiny.CONFIG, experts_per_token=1, router_bias=True)
ROWS, WRITTEN = 8, 9


@pytest.fixture(scope="session")
def original():
    return Model(CONFIG, handmade.make_params(0, CONFIG))


@pytest.fixture(scope="session")
def probes(original):
    """Rows that the original would write itself, and questions about their next words; general text beside."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(3, handmade.V, (ROWS, 3)).astype(np.int32)
    tokens = np.concatenate([prompts, generate(original.params, CONFIG, prompts, max_new_tokens=WRITTEN)], axis=1)
    valid = np.zeros(tokens.shape, bool)
    valid[:, 2:-1] = True  # positions before a token that the model wrote
    rows = Rows(tokens, np.ones_like(tokens), valid, np.zeros(ROWS, np.int32))
    answer = np.arange(ROWS, dtype=np.int32) % 4
    options = np.repeat(tokens[:, None, :4], 4, axis=1)
    for row in range(ROWS):
        wrong = rng.choice(np.setdiff1d(np.arange(3, handmade.V), tokens[row, 3]), 3, replace=False)
        options[row, :, 3] = np.insert(wrong, answer[row], tokens[row, 3])
    scored = np.zeros(options.shape, bool)
    scored[:, :, 2] = True
    questions = Questions(options, np.ones_like(options), scored, answer, np.arange(ROWS, dtype=np.int32))
    return Probes({"forget": questions}, {"forget": rows, "general": tiny.make_rows(ROWS, seed=2)}, {}, {})


@pytest.fixture(scope="session")
def evaluator(original, probes):
    settings = EvaluationConfig(batch_size=8, bootstrap=100)
    tasks = probe_tasks({"test": probes}, settings, accuracies={}, identity="")
    made = Evaluator(settings, tasks, tiny.mesh_of(1, 1, 1))
    return dataclasses.replace(made, original=made.score(original, full=True))


@pytest.fixture
def make_case(original, probes, evaluator, tmp_path):
    """make_case(attack, params): a case in which a model with these parameters is attacked."""

    def make(attack, params, **changes):
        forget, retain = probes.text["forget"], tiny.make_rows(12, seed=3)
        context = Context(
            attack, original, types.SimpleNamespace(forget=forget, retain=retain),
            types.SimpleNamespace(board=TextConfig.board), TextConfig.board, evaluator, evaluator.mesh, 0,
            tmp_path / "shared", "shared",
            lambda: expert_assignments(original, sequential_batches(forget, 8), mesh=evaluator.mesh),
        )  # fmt: skip
        for name in set(changes) & {"evaluator", "load_retrained"}:
            context = dataclasses.replace(context, **{name: changes.pop(name)})
        case = Case(context, original.replace(params=params), tmp_path / "attack", "made for a test")
        return dataclasses.replace(case, **changes)

    return make


def emptied(params):
    """The parameters with experts that give nothing."""
    return unflatten({path: 0 * a if "layers/experts/" in path else a for path, a in flatten(params).items()})


def measured(case):
    """The quick measurements of the unlearned model."""
    return case.context.evaluator.measure(case.context.evaluator.score(case.unlearned))


def value(measurements, name, split="test"):
    return find(measurements, name, split).value
