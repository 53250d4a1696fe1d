"""What trains is chosen by path and by expert; everything else stays bit-identical."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trace_jax.config import ConfigError
from trace_jax.models.arrays import abstract_params, flatten, unflatten
from trace_jax.models.config import ModelConfig
from trace_jax.unlearning.optimizer import OptimizerConfig, learning_rate, make_optimizer
from trace_jax.unlearning.trainable import PRESETS, trainable_paths, trainable_table, update_masks

EXPERTS = {"layers/experts/gate_up", "layers/experts/down"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(model, preset):
    everything = set(flatten(model.params))
    expected = {
        "all": everything,
        "experts": EXPERTS,
        "selected_experts": EXPERTS,
        "seuf": EXPERTS | {"layers/router"},
        "routers_frozen": everything - {"layers/router"},
        "down_projections": {"layers/experts/down"},
        "lora": EXPERTS | {f"layers/{name}" for name in "qkvo"},
    }[preset]
    assert set(trainable_paths(model.config, preset)) == expected


def test_first_matching_pattern_wins(model):
    training = trainable_paths(model.config, ("!layers/experts/down", "layers/*"))
    assert "layers/experts/down" not in training
    assert "layers/experts/gate_up" in training and "embed" not in training


def test_flatten_is_undone_by_unflatten(model):
    assert jax.tree.structure(unflatten(flatten(model.params))) == jax.tree.structure(model.params)


@pytest.mark.parametrize(("trainable", "message"), [("expert", "neither a preset"), (("!*",), "freezes every")])
def test_unusable_patterns_are_refused(model, trainable, message):
    with pytest.raises(ConfigError, match=message):
        trainable_paths(model.config, trainable)


def run_adamw(params, masks_per_step):
    """AdamW with weight decay whose mask may change while its momentum goes on."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, clip_norm=1.0)
    state, key = None, jax.random.key(1)
    for masks in masks_per_step:
        optimizer = make_optimizer(config, 100, masks)
        state = optimizer.init(params) if state is None else state
        key, sub = jax.random.split(key)
        gradients = jax.tree.map(lambda p, k=sub: jax.random.normal(k, p.shape), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_frozen_layers_are_bit_identical_also_after_the_masks_change(model):
    training = {path: flatten(model.params)[path] for path in EXPERTS}
    first, second = (update_masks(training, model.config, layers=(n, n)) for n in (1, 2))
    halfway = run_adamw(training, [first] * 10)
    end = run_adamw(training, [first] * 10 + [second] * 10)
    for path, leaf in training.items():
        np.testing.assert_array_equal(np.asarray(halfway[path])[1], np.asarray(leaf)[1])
        np.testing.assert_array_equal(np.asarray(end[path])[0], np.asarray(halfway[path])[0])
        assert (np.asarray(end[path])[1] != np.asarray(leaf)[1]).any()


def test_layer_range(model):
    masks = update_masks(trainable_paths(model.config, "down_projections"), model.config, layers=(2, 2))
    assert masks["layers/experts/down"].reshape(-1).tolist() == [0.0, 1.0]


MIXED = ModelConfig(
    vocab_size=61, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_size=8, num_experts=4,
    expert_hidden_size=8, dense_layers=(0, 2), dense_hidden_size=8, router_bias=True, router_correction=True,
)  # fmt: skip


def test_a_layer_range_counts_the_layers_of_the_network_in_both_stacks():
    masks = update_masks(trainable_paths(MIXED, "down_projections"), MIXED, layers=(3, 4))
    found = {path: mask.reshape(-1).tolist() for path, mask in masks.items()}
    assert found == {"layers/experts/down": [0.0, 1.0], "dense/mlp/down": [0.0, 1.0]}  # layers 2, 4 and 1, 3
    with pytest.raises(ConfigError, match=r"nothing of layers/experts/down, .* no part of it is in layers \(1, 1\)"):
        update_masks(trainable_paths(MIXED, "experts"), MIXED, layers=(1, 1))


def test_routers_train_in_the_layers_of_selected_experts_and_whole_arrays_of_experts_need_no_mask():
    selected = np.zeros((2, 4), bool)
    selected[1, 3] = True
    masks = update_masks(trainable_paths(MIXED, "seuf"), MIXED, selected=selected)
    found = {path: mask.reshape(-1).tolist() for path, mask in masks.items()}
    of_router = {"layers/router": [0.0, 1.0], "layers/router_bias": [0.0, 1.0]}
    assert found == {f"{path}/rows": [1.0] for path in EXPERTS} | of_router
    assert update_masks(trainable_paths(MIXED, "selected_experts"), MIXED, selected=selected) is None


def test_the_correction_never_trains_and_frozen_routers_are_whole():
    for trainable in ("all", ("*",), ("layers/router*",)):
        training = trainable_paths(MIXED, trainable)
        assert "layers/router_correction" not in training and "layers/router_bias" in training
    frozen = set(flatten(abstract_params(MIXED))) - set(trainable_paths(MIXED, "routers_frozen"))
    assert frozen == {"layers/router", "layers/router_bias", "layers/router_correction"}
    with pytest.raises(ConfigError, match="freezes every parameter"):
        trainable_paths(MIXED, "layers/router_correction")


def test_table_counts_what_trains(model):
    selected = np.zeros((2, 4), bool)
    selected[0, 0] = True
    rows = trainable_table(model.config, "selected_experts", selected=selected)
    total = {row["path"]: row for row in rows}
    assert total["layers/experts/down"]["trained"] * 8 == total["layers/experts/down"]["parameters"]
    assert total["embed"]["trained"] == 0
    assert sum(row["parameters"] for row in rows) == sum(x.size for x in jax.tree.leaves(model.params))


def test_learning_rate_warms_up_then_follows_its_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer steps and floats
        rates = [float(learning_rate(config, 20)(jnp.int32(step))) for step in range(21)]
    assert rates[:5] == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1.0])
    assert rates[12] == pytest.approx(0.5, abs=1e-6) and rates[20] == pytest.approx(0.0, abs=1e-6)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
