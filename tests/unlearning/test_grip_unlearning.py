"""GRIP around runs of unlearning: what routers read of retain text, what it promises of retain routing after 20 AdamW
steps, whatever the loss, and routers realigned to what they read now."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from tests.unlearning.conftest import ONE, weights_of
from trace_jax.data.rows import sequential_batches
from trace_jax.models.architecture import init_params
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.models.moe import route
from trace_jax.parallel.mesh import make_mesh, to_host
from trace_jax.routing.differences import overlap
from trace_jax.routing.statistics import expert_assignments
from trace_jax.unlearning import grip
from trace_jax.unlearning.config import GripProject, GripRealign, UnlearningConfig
from trace_jax.unlearning.grip import read_routers, realign, retain_protection, spread_tokens
from trace_jax.unlearning.unlearn import unlearn

WIDE = dataclasses.replace(tiny.CONFIG, hidden_size=32, num_experts=6)
FOUR = make_mesh(jax.devices()[:4], data=2, expert=2)
TOKENS = 24
PROJECT, TASK_VECTOR = {"name": "project", "tokens": TOKENS}, {"name": "task_vector", "task_scale": 3.0}
ROUTERS = {  # only routers train, so that what they read stays and their scores can be compared
    "objective": "gradient_difference", "steps": 20, "learning_rate": 0.02, "forget_batch_size": 4, "alpha": 0.1,
    "retain_batch_size": 4, "checkpoint_every": 20, "trainable": ("layers/router*",), "weight_decay": 0.1,
}  # fmt: skip


def target(config=WIDE):
    model = tiny.make_model(config)
    if not config.router_bias:
        return model
    bias = 0.1 * jax.random.normal(jax.random.key(3), (2, config.num_experts))
    return model.replace(params={**model.params, "layers": {**model.params["layers"], "router_bias": bias}})


def run(forget, retain, model=None, mesh=ONE, weights=None, evaluate=None, **changes):
    config = UnlearningConfig(**ROUTERS | changes)
    return unlearn(model or target(), forget, retain, config=config, mesh=mesh, weights=weights, evaluate=evaluate)


def change_of(before, after, rows):
    """(largest change of a chosen expert's score, share of inputs with other experts) on the inputs of the original."""
    inputs, scores, indices = read_routers(before, rows, mesh=ONE)
    layers, config = after.params["layers"], after.config
    new = [route({k: layers[k][i] for k in layers if k.startswith("router")}, config, x) for i, x in enumerate(inputs)]
    change = np.abs(np.stack([n.logits for n in new]) - scores)
    other = (np.sort([n.indices for n in new]) != np.sort(indices)).any(axis=-1).mean()
    return np.take_along_axis(change, indices, axis=-1).max(), other


def unchanged(model, other, rows):
    """[L], share of tokens that are routed to the same experts."""
    routed = [expert_assignments(m, sequential_batches(rows, 16), mesh=ONE) for m in (model, other)]
    return overlap(*routed)["unchanged"]


# --- what routers read


def test_tokens_are_spread_over_all_valid_ones(retain):
    kept = spread_tokens(retain, 20)
    assert kept.valid.sum() == 20 and len(kept) > 12  # nearly every row
    assert (spread_tokens(retain, 10**6).valid == retain.valid).all()
    every = np.flatnonzero(retain.valid)[np.arange(20) * retain.valid.sum() // 20]
    assert sorted({place // retain.valid.shape[1] for place in every}) == [
        row for row in range(len(retain)) if any((retain.tokens[row] == tokens).all() for tokens in kept.tokens)
    ]


@pytest.mark.parametrize("mesh", [ONE, FOUR])
def test_routers_are_read_at_the_valid_tokens(model, retain, mesh):
    rows = spread_tokens(retain, 20)
    inputs, scores, indices = read_routers(model, rows, mesh=mesh)
    parts = ("router_inputs", "router_logits", "indices")
    out = forward(model.params, model.config, rows.tokens, mask=rows.segments, collect=parts).router
    for read, of_all in ((inputs, out.inputs), (scores, out.logits)):
        np.testing.assert_allclose(read, np.asarray(of_all)[:, rows.valid], atol=5e-5)
    np.testing.assert_array_equal(indices, np.asarray(out.indices)[:, rows.valid])


# --- A, the projection


@pytest.mark.parametrize(("objective", "weighted"), [("npo", True), (TASK_VECTOR, False)])
def test_protected_retain_routing_is_the_same_after_twenty_steps(forget, retain, objective, weighted):
    rule = {"name": "difference", "top": 1}
    weights = weights_of(target(), forget, retain, rule=rule) if weighted else None
    changes = {"objective": objective, "weights": weights}
    changes |= {} if weighted else {"alpha": 16.0, "retain_batch_size": 16}  # their defaults: there is no retain term
    result, free = run(forget, retain, grip=PROJECT, **changes), run(forget, retain, **changes)
    rows = spread_tokens(retain, TOKENS)
    change, other = change_of(target(), result.model, rows)
    assert change < 1e-4 and other == 0
    moved = np.asarray(result.model.params["layers"]["router"] - target().params["layers"]["router"])
    assert np.abs(moved).max() > 0.02  # there was room to unlearn in
    change, other = change_of(target(), free.model, rows)
    assert change > 0.1 and other > 0.1  # what it is protected from
    held, not_held = (unchanged(target(), r.model, retain) for r in (result, free))
    assert (held > not_held).all()  # of other retain tokens, too
    assert [row["tokens"] for row in result.grip] == [TOKENS, TOKENS] and free.grip is None
    assert all(0.3 < row["free"] < 1 for row in result.grip)


@pytest.mark.parametrize(("trainable", "mesh"), [("layers/router*", ONE), ("layers/router", FOUR)])
def test_a_bias_that_trains_is_held_with_the_router_on_any_mesh(forget, retain, trainable, mesh):
    model = target(dataclasses.replace(WIDE, router_bias=True, router_score="softmax_top_k"))
    result = run(forget, retain, model, mesh, grip=PROJECT, trainable=(trainable,))
    change, other = change_of(model, result.model, spread_tokens(retain, TOKENS))
    assert change < 1e-4 and other == 0
    bias = result.model.params["layers"]["router_bias"]
    assert (np.asarray(bias) != np.asarray(model.params["layers"]["router_bias"])).any() == ("*" in trainable)


def test_more_tokens_than_directions_freeze_the_routers_and_it_says_so(model, retain, capsys):
    """Two of four experts a token, about 121 tokens: each expert was chosen by more than the 16 inputs it reads."""
    for tokens, words in ((10**4, "leave the routers 0.0% of their directions; they are frozen"), (8, " of their dir")):
        protection, table = retain_protection(model, retain, GripProject(tokens=tokens), bias=False, seed=0, mesh=ONE)
        said = capsys.readouterr()
        assert words in said.out + said.err and ("frozen" in said.out + said.err) == (tokens > 100)
        assert [row["free"] == 0 for row in table] == [tokens > 100] * 2
        router = model.params["layers"]["router"]
        before, changed = ({grip.ROUTER: array} for array in (router, router + 0.1))
        held, _ = grip.keep_routers(changed, before, protection, jax.numpy.int32(1), mesh=ONE)
        assert np.allclose(held[grip.ROUTER], router, atol=1e-5) == (tokens > 100)


# --- B, the realignment


def test_realignment_follows_training_and_counts_as_trained(forget, retain):
    """Experts alone train; routers are corrected afterwards, and retain text is routed more as it was."""
    changes = {"trainable": "experts", "learning_rate": 0.003, "alpha": 0.0, "steps": 12}
    plain, seen = run(forget, retain, **changes), []
    result = run(forget, retain, grip="realign", evaluate=seen.append, evaluate_every=12, **changes)
    np.testing.assert_array_equal(seen[-1]["layers"]["router"], result.model.params["layers"]["router"])
    assert [row["kept"] for row in result.grip] == [True, True]
    before, after = (unchanged(target(), r.model, retain) for r in (plain, result))
    assert before[1] < 0.9 and after[1] > before[1]
    trained = {row["path"]: row["trained"] for row in result.trained}
    assert trained["layers/router"] == target().params["layers"]["router"].size
    assert {row["path"]: row["trained"] for row in plain.trained}["layers/router"] == 0
    down = (r.model.params["layers"]["experts"]["down"] for r in (result, plain))
    np.testing.assert_array_equal(*down)


def perturbed(model, size):
    """The model with other experts in its first layer and another norm in its second, so that what the second router
    reads has moved: in part by a linear map, which realignment can undo, in part not.
    """
    layers = model.params["layers"]
    other = init_params(model.config, jax.random.key(5))["layers"]["experts"]["down"]
    experts = {**layers["experts"], "down": layers["experts"]["down"] + size * other}
    norms = np.array(layers["mlp_norm"])
    norms[1] *= np.linspace(-1.0, 2.0, norms.shape[1], dtype=np.float32)
    return model.replace(params={**model.params, "layers": {**layers, "experts": experts, "mlp_norm": norms}})


def test_realignment_brings_retain_routing_back(model, retain):
    current = perturbed(model, 0.25)
    after, table = realign(model, current, retain, GripRealign(tokens=500, ridge=1e-6), mesh=ONE)
    before, now = (unchanged(model, m, retain) for m in (current, after))
    assert before[1] < 0.8 and now[1] > before[1] + 0.1
    assert now[0] == before[0] == 1
    assert [row["kept"] for row in table] == [True, True] and [row["layer"] for row in table] == [0, 1]
    assert table[1]["cosine"] > table[1]["cosine_before"]
    parts = jax.tree.map(lambda a, b: bool((to_host(a) == to_host(b)).all()), after.params, current.params)
    assert not parts["layers"].pop("router") and all(jax.tree.leaves(parts))  # nothing else has changed


def test_realignment_is_the_same_on_four_devices(model, retain):
    given = model, perturbed(model, 0.25), retain, GripRealign(tokens=60, ridge=1e-4)
    one, four = (realign(*given, mesh=mesh) for mesh in (ONE, FOUR))
    routers = (to_host(of[0].params["layers"]["router"]) for of in (one, four))
    np.testing.assert_allclose(*routers, atol=1e-3)
    assert [row["cosine"] for row in one[1]] == pytest.approx([row["cosine"] for row in four[1]], abs=1e-4)


def test_a_correction_that_does_not_bring_the_scores_back_is_dropped(model, retain, monkeypatch):
    monkeypatch.setattr("trace_jax.unlearning.grip.LEAST_COSINE", 0.9999)
    current = perturbed(model, 20.0)
    after, table = realign(model, current, retain, GripRealign(tokens=500, ridge=1e-6), mesh=ONE)
    assert [row["kept"] for row in table] == [True, False] and table[1]["cosine"] < 0.9999
    np.testing.assert_array_equal(after.params["layers"]["router"][1], current.params["layers"]["router"][1])


def test_a_routers_bias_is_realigned_with_it(model, retain):
    config = dataclasses.replace(model.config, router_bias=True)
    bias = np.array([[0.1, 0.2, -0.1, 0.0], [0.0, 0.3, 0.1, -0.2]], np.float32)
    biases = bias, bias + 1.5 * bias[::-1]
    layers = ({**model.params["layers"], "router_bias": b} for b in biases)
    original, current = (Model(config, {**model.params, "layers": of}) for of in layers)
    after, _ = realign(original, current, retain, GripRealign(tokens=500, ridge=1e-9), mesh=ONE)
    scores = [read_routers(m, retain, mesh=ONE)[1] for m in (original, current, after)]
    assert np.abs(scores[1] - scores[0]).max() > 0.1
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-2)
    np.testing.assert_allclose(after.params["layers"]["router_bias"][0], bias[0], atol=1e-2)
