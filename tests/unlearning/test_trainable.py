"""Trainable parameters, by path, by layer and by expert, as they are written down by family and by preset.

To write the files of tests/golden again after a change that is meant: TRACE_JAX_WRITE_GOLDEN=1 pytest THIS_FILE
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import fields_of

from tests import tiny
from trace_jax.config import ConfigError
from trace_jax.models.architecture import abstract_params, flatten
from trace_jax.models.families import model_config
from trace_jax.unlearning.config import SomeExperts, Trainable, UnlearningConfig
from trace_jax.unlearning.trainable import table_text, trainable_paths, trainable_table, update_masks

GOLDEN, WRITE = Path(__file__).parents[1] / "golden", "TRACE_JAX_WRITE_GOLDEN"
PRESETS = [name for name in Trainable.kinds if name != "patterns"]
EXPERTS = {"layers/experts/gate_up", "layers/experts/down"}
MIXED = dataclasses.replace(
    tiny.CONFIG, num_layers=4, dense_layers=(0, 2), dense_hidden_size=8, router_bias=True, router_correction=True
)
SELECTED = np.array([[0, 0, 0, 0], [0, 0, 0, 1]], bool)


def paths_of(trainable, model=tiny.CONFIG):
    return trainable_paths(model, UnlearningConfig(trainable=trainable).trainable)


def test_first_matching_pattern_wins():
    training = paths_of(("!layers/experts/down", "layers/*"))
    assert "layers/experts/down" not in training
    assert "layers/experts/gate_up" in training and "embed" not in training


@pytest.mark.parametrize(
    ("trainable", "message"),
    [("expert", "neither a preset"), (("!*",), "freezes every"), ("layers/router_correction", "freezes every")],
)
def test_unusable_patterns_are_refused(trainable, message):
    with pytest.raises(ConfigError, match=message):
        paths_of(trainable, MIXED)


def test_a_layer_range_counts_the_layers_of_the_network_in_both_stacks():
    masks = update_masks(paths_of("down_projections", MIXED), MIXED, layers=(3, 4))
    numbers = {path: mask.reshape(-1).tolist() for path, mask in masks.items()}
    assert numbers == {"layers/experts/down": [0.0, 1.0], "dense/mlp/down": [0.0, 1.0]}  # layers 2, 4 and 1, 3
    with pytest.raises(ConfigError, match=r"nothing of layers/experts/down, .* no part of it is in layers \(1, 1\)"):
        update_masks(paths_of("experts", MIXED), MIXED, layers=(1, 1))


def test_routers_train_in_the_layers_of_selected_experts_and_whole_arrays_of_experts_need_no_mask():
    masks = update_masks(paths_of("seuf", MIXED), MIXED, selected=SELECTED)
    numbers = {path: mask.reshape(-1).tolist() for path, mask in masks.items()}
    of_router = {"layers/router": [0.0, 1.0], "layers/router_bias": [0.0, 1.0]}
    assert numbers == {f"{path}/rows": [1.0] for path in EXPERTS} | of_router
    assert update_masks(paths_of("selected_experts", MIXED), MIXED, selected=SELECTED) is None


def test_the_correction_never_trains_and_frozen_routers_are_whole():
    for trainable in ("all", ("*",), ("layers/router*",)):
        training = paths_of(trainable, MIXED)
        assert "layers/router_correction" not in training and "layers/router_bias" in training
    frozen = set(flatten(abstract_params(MIXED))) - set(paths_of("routers_frozen", MIXED))
    assert frozen == {"layers/router", "layers/router_bias", "layers/router_correction"}


def some_experts(config, preset):
    """SEUF's default, one expert of the model, or two of each layer; None where whole arrays train."""
    selected = np.zeros((len(config.moe_layers), config.num_experts), bool)
    if preset == "seuf":
        selected[-1, 3] = True
    else:
        selected[:, :2] = True
    return selected if issubclass(Trainable.kinds[preset], SomeExperts) else None


def table_of(config, preset):
    return trainable_table(config, UnlearningConfig(trainable=preset), some_experts(config, preset))


@pytest.mark.parametrize(("family", "layers"), [("olmoe", 3), ("qwen2_moe", 3), ("deepseek_v2", 4)])
def test_what_trains_is_what_is_written_down(family, layers):
    fields = {"model_type": family, **fields_of(family), "num_hidden_layers": layers}
    config = model_config(fields, dtype="bfloat16")
    text = "\n".join(f"{preset}\n{table_text(table_of(config, preset))}\n" for preset in PRESETS)
    path = GOLDEN / f"trained_{family}.txt"
    if os.environ.get(WRITE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"the trainable parameters changed; if that is meant, run with {WRITE}=1"


def test_the_table_counts_every_number_once():
    config = model_config({"model_type": "qwen2_moe", **fields_of("qwen2_moe")}, dtype="float32")
    params = abstract_params(config)
    table = {row["path"]: row for row in table_of(config, "seuf")}
    D, E, F = config.hidden_size, config.num_experts, config.expert_hidden_size
    trained = {path: row["trained"] for path, row in table.items() if row["trained"]}
    assert trained == {"layers/experts/gate_up": D * 2 * F, "layers/experts/down": F * D, "layers/router": D * E}
    assert {path: row["parameters"] for path, row in table.items()} == {p: x.size for p, x in flatten(params).items()}
