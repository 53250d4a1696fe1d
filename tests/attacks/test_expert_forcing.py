"""Expert forcing on plants of which the answer is known.

One expert per token with weight 1: then routing is all that a router does, and a model that only routes around what it
knows must give everything back.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.attacks.attack import Case, Context
from trace_jax.attacks.routers import ExpertForcing
from trace_jax.data.corpora import Probes, Questions
from trace_jax.data.rows import Rows
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.measurement import find
from trace_jax.evaluation.probes import probe_tasks
from trace_jax.evaluation.task import Evaluator
from trace_jax.models.arrays import abstract_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.generate import generate
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh
from trace_jax.tasks.benchmarks import HandbookConfig, scoreboard

CONFIG = ModelConfig(
    vocab_size=37, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, num_experts=4,
    experts_per_token=1, expert_hidden_size=8,
)  # fmt: skip
ROWS, WRITTEN = 12, 9
FORCING = ExpertForcing()
NAMES = ("forget_accuracy", "forget_nll", "forget_probability_ratio")


def make_params():
    rng = np.random.default_rng(0)

    def draw(path, array):
        scale = 1.0 if path[-1].key in ("embed", "head") else 0.5
        return jnp.asarray(rng.normal(0, scale, array.shape) + ("norm" in path[-1].key), array.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))


def with_layers(params, **arrays):
    return {**params, "layers": {**params["layers"], **arrays}}


@pytest.fixture(scope="module")
def original():
    return Model(CONFIG, make_params())


@pytest.fixture(scope="module")
def known(original):
    """Texts that the original model would write itself, and questions about their next words: it knows them all."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(3, 37, (ROWS, 3)).astype(np.int32)
    tokens = np.concatenate([prompts, generate(original.params, CONFIG, prompts, max_new_tokens=WRITTEN)], axis=1)
    ones, valid = np.ones_like(tokens), np.zeros(tokens.shape, bool)
    valid[:, 2:-1] = True  # positions before a token that the model wrote
    rows = Rows(tokens, ones, valid, np.zeros(ROWS, np.int32))
    answer = np.arange(ROWS, dtype=np.int32) % 4
    options = np.repeat(tokens[:, None, :4], 4, axis=1)
    for row in range(ROWS):
        wrong = rng.choice(np.setdiff1d(np.arange(3, 37), tokens[row, 3]), 3, replace=False)
        options[row, :, 3] = np.insert(wrong, answer[row], tokens[row, 3])
    scored = np.zeros(options.shape, bool)
    scored[:, :, 2] = True
    questions = Questions(options, np.ones_like(options), scored, answer, np.arange(ROWS, dtype=np.int32))
    return rows, Probes({"forget": questions}, {"forget": rows}, {}, {})


@pytest.fixture(scope="module")
def case_of(original, known, tmp_path_factory):
    """case_of(params): the case of an unlearned model with these parameters, on four devices."""
    mesh, (rows, probes) = make_mesh(jax.devices()[:4], data=2, expert=2), known
    settings = EvaluationConfig(batch_size=16, max_rows=ROWS, bootstrap=200)
    evaluator = Evaluator(settings, probe_tasks({"test": probes}, settings, accuracies={}, identity=""), mesh)
    evaluator = dataclasses.replace(evaluator, original=evaluator.score(original))

    def case(params):
        corpora, directory = types.SimpleNamespace(forget=rows), tmp_path_factory.mktemp("attack")
        board = scoreboard("handbook")
        context = Context(FORCING, original, corpora, HandbookConfig(), board, evaluator, mesh, 0, directory, "shared")
        return Case(context, original.replace(params=params), directory, "identity")

    return case


def values(measurements):
    return {name: find(measurements, name, "test").value for name in NAMES}


def hidden(params, *layers):
    """Routers of these layers with their columns in turn: every token goes to the expert after its own."""
    router = params["layers"]["router"]
    for layer in layers:
        router = router.at[layer].set(jnp.roll(router[layer], 1, axis=1))
    return with_layers(params, router=router)


def test_what_was_only_routed_around_comes_back_whole(original, case_of, measured):
    case = case_of(hidden(original.params, 0, 1))
    before, after = values(measured(case_of(original.params))), values(measured(case))
    assert before["forget_accuracy"] == 1 and after["forget_accuracy"] < 0.75
    assert after["forget_nll"] > before["forget_nll"] + 1 and after["forget_probability_ratio"] < 0.4
    [point] = FORCING.points(case)
    assert point.at == "original's experts"
    forced = values(point.measurements)
    assert forced["forget_accuracy"] == 1
    assert forced["forget_nll"] == pytest.approx(before["forget_nll"], rel=1e-5)
    assert forced["forget_probability_ratio"] == pytest.approx(1, rel=1e-5)


def test_what_was_taken_out_of_the_experts_does_not_come_back(original, case_of, measured):
    """Without experts, it can't matter which are used: forcing changes nothing."""
    params = hidden(original.params, 0, 1)
    nothing = jax.tree.map(jnp.zeros_like, params["layers"]["experts"])
    case = case_of(with_layers(params, experts=nothing))
    after = values(measured(case))
    result = case.attack()
    assert after["forget_accuracy"] < 0.75 and result["measure"] == "forget_accuracy" and result["strongest"] == 0
    found = {m["name"]: m["value"] for m in result["points"][0]["measurements"]}
    for name in NAMES:
        assert found[name] == pytest.approx(after[name], rel=1e-5)
    assert found["forced_share"] > 0


def test_forced_share_counts_tokens_and_layers_that_were_sent_elsewhere(original, known, case_of):
    same = FORCING.forced_share(case_of(original.params))
    assert (same.value, same.low, same.high, same.n, same.split) == (0, 0, 0, ROWS, "train")
    one_of_two = FORCING.forced_share(case_of(hidden(original.params, 1)))  # what its layer reads is as before
    assert (one_of_two.value, one_of_two.low, one_of_two.high) == (0.5, 0.5, 0.5)
    case, rows = case_of(hidden(original.params, 0)), known[0]
    before, after = (
        np.asarray(forward(model.params, CONFIG, rows.tokens, collect=("indices",)).router.indices)[:, rows.valid]
        for model in (case.context.original, case.unlearned)
    )
    assert (before[0] != after[0]).all()
    share = FORCING.forced_share(case)
    assert share.value == pytest.approx((before != after).mean())
    assert share.low < share.value < share.high
