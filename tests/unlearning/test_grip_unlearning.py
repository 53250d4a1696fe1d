"""GRIP around whole runs of unlearning: what it promises of retain routing after 20 AdamW steps, whatever the loss."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import Model
from trace_jax.models.moe import route
from trace_jax.parallel.mesh import make_mesh, to_host
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import expert_assignments, expert_statistics, overlap
from trace_jax.routing.weights import retain_weights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.router_passes import read_routers, spread_tokens
from trace_jax.unlearning.unlearn import unlearn

WIDE = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, num_experts=6,
    experts_per_token=2, expert_hidden_size=8,
)  # fmt: skip
PROJECT = {"name": "project", "tokens": 24}
TOKENS = 24
ROUTERS = {  # only routers train, so that what they read stays and their scores can be compared
    "objective": "gradient_difference", "steps": 20, "learning_rate": 0.02, "forget_batch_size": 4, "alpha": 0.1,
    "retain_batch_size": 4, "checkpoint_every": 20, "trainable": ("layers/router*",), "weight_decay": 0.1,
}  # fmt: skip


@functools.cache
def target(config=WIDE):
    params = jax.tree.map(lambda x: x * 2.0, init_params(config, jax.random.key(0)))
    if config.router_bias:
        bias = 0.1 * jax.random.normal(jax.random.key(3), (2, 6))
        params = {**params, "layers": {**params["layers"], "router_bias": bias}}
    return Model(config, params)


def one_device():
    return make_mesh(jax.devices()[:1])


def run(forget, retain, model=None, mesh=None, weights=None, evaluate=None, **changes):
    config, mesh = UnlearningConfig(**ROUTERS | changes), mesh or one_device()
    return unlearn(model or target(), forget, retain, config=config, mesh=mesh, weights=weights, evaluate=evaluate)


def kept(before, after, rows):
    """(largest change of a chosen expert's score, share of inputs with other experts) on the inputs of the original."""
    inputs, scores, indices = read_routers(before, rows, mesh=one_device())
    layers, config = after.params["layers"], after.config
    new = [route({k: layers[k][i] for k in layers if k.startswith("router")}, config, x) for i, x in enumerate(inputs)]
    change = np.abs(np.stack([n.logits for n in new]) - scores)
    other = (np.sort([n.indices for n in new]) != np.sort(indices)).any(axis=-1).mean()
    return np.take_along_axis(change, indices, axis=-1).max(), other


def unchanged(after, retain, before=None):
    """[L], share of retain tokens that are routed as before."""
    both = (expert_assignments(m, sequential_batches(retain, 16)) for m in (before or target(), after))
    return overlap(*both).unchanged


def trace_weights(model, forget, retain):
    statistics = [expert_statistics(model, sequential_batches(rows, 8), min_activations=1) for rows in (forget, retain)]
    return retain_weights(
        CalibrationConfig({"name": "entropy", "rule": {"name": "difference", "top": 1}, "unit": "token"}),
        model=model, forget=forget, retain=retain, forget_statistics=statistics[0], retain_statistics=statistics[1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "weighted"),
    [
        ({}, False),
        ({"objective": "npo"}, True),
        ({"objective": {"name": "task_vector", "task_scale": 3.0}}, False),
    ],
)
def test_protected_retain_routing_is_the_same_after_twenty_steps(forget, retain, changes, weighted):
    weights = trace_weights(target(), forget, retain) if weighted else None
    result = run(forget, retain, grip=PROJECT, weights=weights, **changes)
    rows = spread_tokens(retain, TOKENS)
    change, other = kept(target(), result.model, rows)
    assert change < 1e-4 and other == 0
    moved = np.asarray(result.model.params["layers"]["router"] - target().params["layers"]["router"])
    assert np.abs(moved).max() > 0.02  # there was room to unlearn in
    free = run(forget, retain, weights=weights, **changes)
    change, other = kept(target(), free.model, rows)
    assert change > 0.1 and other > 0.1  # what it is protected from
    assert (unchanged(result.model, retain) > unchanged(free.model, retain)).all()  # of other retain tokens, too
    assert [row["tokens"] for row in result.grip] == [TOKENS, TOKENS] and free.grip is None
    assert all(0.3 < row["free"] < 1 for row in result.grip)


def test_a_bias_that_trains_is_held_with_the_router(forget, retain):
    model = target(dataclasses.replace(WIDE, router_bias=True, router_score="softmax_top_k"))
    rows = spread_tokens(retain, TOKENS)
    for trainable in (("layers/router*",), ("layers/router",)):
        result = run(forget, retain, model, grip=PROJECT, trainable=trainable)
        change, other = kept(model, result.model, rows)
        assert change < 1e-4 and other == 0
        bias = result.model.params["layers"]["router_bias"]
        assert (np.asarray(bias) != np.asarray(model.params["layers"]["router_bias"])).any() == ("*" in trainable[0])


def test_the_same_routers_on_four_devices(forget, retain):
    one, four = (
        run(forget, retain, mesh=mesh, grip=PROJECT, steps=5)
        for mesh in (one_device(), make_mesh(jax.devices()[:4], data=2, expert=2))
    )
    np.testing.assert_allclose(
        to_host(four.model.params["layers"]["router"]), one.model.params["layers"]["router"], atol=2e-5
    )


def test_realignment_follows_training_and_counts_as_trained(forget, retain):
    """Experts alone train; routers are corrected afterwards, and retain text is routed more as it was."""
    changes = {"trainable": "experts", "learning_rate": 0.003, "alpha": 0.0, "steps": 12}
    plain = run(forget, retain, **changes)
    seen = []
    result = run(forget, retain, grip="realign", evaluate=seen.append, evaluate_every=12, **changes)
    np.testing.assert_array_equal(seen[-1]["layers"]["router"], result.model.params["layers"]["router"])
    assert [row["kept"] for row in result.grip] == [True, True]
    before, after = (unchanged(r.model, retain) for r in (plain, result))
    assert before[1] < 0.9 and after[1] > before[1]
    trained = {row["path"]: row["trained"] for row in result.trained}
    assert trained["layers/router"] == target().params["layers"]["router"].size
    assert {row["path"]: row["trained"] for row in plain.trained}["layers/router"] == 0
    np.testing.assert_array_equal(
        result.model.params["layers"]["experts"]["down"], plain.model.params["layers"]["experts"]["down"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grip": "project", "trainable": "experts"}, "leaves the routers as they are"),
        ({"grip": {"null": 0.1}}, "null would have no effect: it belongs to project"),
        ({"grip": {"name": "project", "ridge": 0.1}}, "ridge would have no effect"),
        ({"grip": {"name": "realign", "tokens": 5}}, "5 retain tokens for routers of 32 inputs"),
    ],
)
def test_settings_that_could_do_nothing_are_refused(forget, retain, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(forget, retain, **changes)


def test_retain_text_is_needed(forget):
    with pytest.raises(ConfigError, match="give retain rows"):
        run(forget, None, objective="gradient_ascent", grip="project")
