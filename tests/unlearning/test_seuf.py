"""SEUF trains its experts and their routers, nothing else, and its anchor is the loss of the paper or of the code."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.models.arrays import flatten
from trace_jax.models.decoder import forward
from trace_jax.parallel.mesh import make_mesh
from trace_jax.routing.statistics import expert_statistics
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.rivals import anchor_loss, target_experts
from trace_jax.unlearning.trainable import chosen_experts
from trace_jax.unlearning.unlearn import unlearn

CONFIG = UnlearningConfig(
    objective="gradient_difference", retain_loss="nll", alpha=1.0, trainable="seuf", steps=20, learning_rate=0.01,
    weight_decay=0.1, forget_batch_size=4, retain_batch_size=4, evaluate_every=20, checkpoint_every=20,
)  # fmt: skip
ONE = np.array([[0, 0, 0, 0], [0, 0, 1, 0]], bool)
OTHER = np.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool)


def by_hand(probabilities, indices, target, valid, form):
    """Mean over valid tokens, one token and one layer at a time."""
    total = 0.0
    for layer in range(len(target)):
        if not target[layer].any():
            continue
        for row, position in np.argwhere(valid):
            g = probabilities[layer, row, position].astype(np.float64)
            if form == "sum":
                g = np.where(np.isin(np.arange(len(g)), indices[layer, row, position]), g, 0.0)
            error = (g - target[layer]) ** 2
            total += error.sum() if form == "sum" else error.sum() / len(g)
    return total / valid.sum()


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_anchor_is_that_of_a_loop_over_tokens(form):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    indices = np.argsort(-logits, axis=-1)[..., :2].astype(np.int32)
    target = np.zeros((3, 6), bool)
    target[0, 2], target[2, 1], target[2, 5] = True, True, True
    valid = rng.random((4, 5)) < 0.6
    total, count = anchor_loss(*map(jnp.asarray, (probabilities, indices, target, valid)), form=form)
    assert float(total / count) == pytest.approx(by_hand(probabilities, indices, target, valid, form), rel=1e-5)


def test_targets_are_the_experts_of_the_index():
    index = jnp.asarray([[2, 4], [4, 4], [0, 3]], jnp.int32)
    assert target_experts(index, 4).astype(jnp.int32).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]


def run(model, forget, retain, selected, mesh=None, directory=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    mesh = mesh or make_mesh(jax.devices()[:1])
    return unlearn(model, forget, retain, config=config, selected=selected, mesh=mesh, directory=directory)


@pytest.fixture(scope="module")
def unlearned(model, forget, retain, tmp_path_factory):
    directory = tmp_path_factory.mktemp("seuf")
    return run(model, forget, retain, ONE, directory=directory), directory


def assert_only(before, after, selected):
    """Exactly the selected experts and the routers of their layers differ."""
    layers = selected.any(axis=1)
    for path, array in flatten(before.params).items():
        old, new = np.asarray(array), np.asarray(flatten(after.params)[path])
        trains = selected if path.startswith("layers/experts/") else layers if path == "layers/router" else None
        if trains is None:
            np.testing.assert_array_equal(new, old, err_msg=path)
            continue
        np.testing.assert_array_equal(new[~trains], old[~trains], err_msg=path)
        assert (new[trains] != old[trains]).mean() > 0.9, path


def test_exactly_its_parameters_train_also_after_the_selection_changes(model, forget, retain, unlearned):
    first, _ = unlearned
    assert_only(model, first.model, ONE)
    second = run(first.model, forget, retain, OTHER)
    assert_only(first.model, second.model, OTHER)


def test_the_anchor_is_logged_and_is_that_of_the_original_at_the_first_step(model, forget, unlearned):
    """The first of the logged losses is taken at the original parameters, on the four rows that the step drew."""
    _, directory = unlearned
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    anchors = [row["anchor_loss"] for row in logged if "anchor_loss" in row]
    out = forward(
        model.params, model.config, jnp.asarray(forget.tokens), mask=jnp.asarray(forget.segments), collect=("router",)
    )
    probabilities = np.asarray(jax.nn.softmax(out.router.logits, axis=-1))
    of_rows = [
        by_hand(
            probabilities[:, i : i + 1], np.asarray(out.router.indices)[:, i : i + 1], ONE, forget.valid[[i]], "sum"
        )
        for i in range(len(forget.tokens))
    ]
    assert min(of_rows) < anchors[0] < max(of_rows)


def test_a_strong_anchor_holds_forget_tokens_on_the_target(model, forget, retain):
    def share(anchor):
        after = run(model, forget, retain, ONE, trainable={"name": "seuf", "anchor": anchor}, steps=10).model
        batches = sequential_batches(forget, 8)
        return expert_statistics(after, batches, min_activations=1, mesh=make_mesh(jax.devices()[:1])).frequency[1, 2]

    assert share(100.0) > share(0.0)


def test_a_margin_moves_no_router_that_does_not_train(model, forget, retain):
    """GRIP beside SEUF: the margin is wider than the scores of the original are apart, in every layer."""
    after = run(model, forget, retain, ONE, steps=2, grip={"name": "project", "tokens": 4, "margin": 2.0}).model
    assert_only(model, after, ONE)


def test_a_mesh_trains_the_same(model, forget, retain):
    """Rows, experts and routers lie in pieces; forget rows are padded to a multiple of the devices."""
    meshes = make_mesh(jax.devices()[:1]), make_mesh(jax.devices(), data=2, expert=2, tensor=2)
    one, many = (run(model, forget, retain, ONE, mesh, steps=3, weight_decay=0.0).model for mesh in meshes)
    for path, array in flatten(one.params).items():
        np.testing.assert_allclose(np.asarray(flatten(many.params)[path]), array, atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def statistics(model, forget, retain):
    mesh = make_mesh(jax.devices()[:1])
    return [
        expert_statistics(model, sequential_batches(rows, 8), min_activations=1, mesh=mesh) for rows in (forget, retain)
    ]


def some(experts):
    return {"name": "selected_experts", "experts": experts}


def test_by_default_the_expert_of_highest_affinity_of_the_model_trains(statistics):
    chosen = chosen_experts(CONFIG, np.zeros((2, 4), bool), *statistics, seed=0)
    affinity = statistics[0].gate_mass
    assert chosen.sum() == 1 and affinity[chosen] == affinity.max()


def test_esft_covers_a_share_of_the_forget_activations_in_every_layer(statistics):
    config = UnlearningConfig(trainable=some({"name": "cumulative", "mass": 0.6}))
    chosen = chosen_experts(config, np.zeros((2, 4), bool), *statistics, seed=0)
    forget, retain = (s.frequency for s in statistics)
    for layer, experts in enumerate(chosen):
        order = np.argsort(-forget[layer])
        enough = int(np.searchsorted(np.cumsum(forget[layer][order]), 0.6 * 2)) + 1
        covering = np.isin(np.arange(4), order[:enough])
        assert experts.tolist() == (covering & (forget[layer] > retain[layer])).tolist()
    assert UnlearningConfig(trainable=some("cumulative")).trainable.experts.mass == 0.15


def test_random_experts_follow_the_seed_and_the_calibration_is_the_default(statistics):
    config = UnlearningConfig(trainable=some({"name": "random", "top": 2}))
    one, again, other = (chosen_experts(config, ONE, *statistics, seed=seed) for seed in (0, 0, 1))
    assert (one.sum(axis=1) == 2).all() and (one == again).all() and (one != other).any()
    default = UnlearningConfig(trainable="selected_experts")
    assert chosen_experts(default, ONE, *statistics, seed=0) is ONE
    assert chosen_experts(UnlearningConfig(), ONE, *statistics, seed=0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": {"name": "lora", "anchor": 1.0}}, "anchor would have no effect"),
        ({"trainable": {"name": "seuf", "experts": {"name": "calibration", "top": 2}}}, "top would have no effect"),
        ({"trainable": {"name": "seuf", "experts": "afinity"}}, "did you mean 'affinity'"),
        ({"trainable": {"name": "seuf", "anchor_form": "max"}}, "expected one of sum, mean"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        UnlearningConfig(**settings)


def test_unusable_choices_of_experts_are_refused(model, forget, retain, statistics):
    config = dataclasses.replace(CONFIG, trainable={"name": "seuf", "experts": {"top": 9}})
    with pytest.raises(ConfigError, match="experts is 'affinity': top is 9; expected 1 to 8"):
        chosen_experts(config, ONE, *statistics, seed=0)
    with pytest.raises(ConfigError, match="'seuf', but no expert is selected"):
        unlearn(model, forget, retain, config=CONFIG)
    with pytest.raises(ConfigError, match="but no expert is selected"):
        unlearn(model, forget, retain, config=CONFIG, selected=np.zeros((2, 4), bool))
    steered = UnlearningConfig(objective="rmu", trainable="seuf")
    with pytest.raises(
        ConfigError,
        match=r"layer 1, and the selected experts are in layers 2, above it.*unlearning.objective.layer to 2",
    ):
        unlearn(model, forget, retain, config=steered, selected=ONE)
    with pytest.raises(ValueError, match=r"selected is \(1, 4\); the model has \(2, 4\)"):
        unlearn(model, forget, retain, config=CONFIG, selected=ONE[1:])
