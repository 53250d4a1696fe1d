"""Tensor names: every family in both layouts, and what published checkpoints have besides."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import KIMI, MODEL_TYPES

from trace_jax.checkpoints.accounting import account, slots_of
from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.models.families import FAMILIES, family_of, model_config


def accounting(directory):
    config_json = json.loads((directory / "config.json").read_text())
    return account(open_checkpoint(directory), model_config(config_json, dtype="float32"), family_of(config_json))


def test_the_registry_is_what_the_tests_cover():
    assert set(MODEL_TYPES) - {KIMI} == set(FAMILIES)
    assert len(FAMILIES) == 23


@pytest.mark.parametrize(
    ("model_type", "name", "why"),
    [
        ("deepseek_v3", "model.layers.{layers}.eh_proj.weight", "multi-token"),
        ("glm4_moe", "model.layers.{layers}.self_attn.q_proj.weight", "multi-token"),
        ("mellum", "mtp.layers.0.mlp.gate.weight", "multi-token"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.gate_proj.weight", "multi-token"),
        ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq", "frequencies"),
        ("granitemoeshared", "lm_head.weight", "output head is the embedding"),
    ],
)
def test_what_a_model_does_not_use_is_ignored_with_a_reason(model_type, name, why, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(model_type)
    name = name.format(layers=json.loads((source / "config.json").read_text())["num_hidden_layers"])
    directory = with_tensor(source, tmp_path, name)
    assert why in accounting(directory).ignored[name]


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mixtral", "model.layers.3.mlp.gate.weight"),
        ("mixtral", "model.layers.0.self_attn.q_proj.bias"),
        ("deepseek_v3", "model.layers.9.self_attn.o_proj.weight"),
    ],
)
def test_any_other_tensor_is_an_error(model_type, name, tiny_checkpoint, tmp_path):
    directory = with_tensor(tiny_checkpoint(model_type), tmp_path, name)
    with pytest.raises(CheckpointError, match=name):
        accounting(directory)


def with_tensor(source, directory, name):
    (directory / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: np.zeros((2, 2), np.float32)}, directory / "model.safetensors")
    return directory


def test_gpt_oss_as_published_packs_along_the_input_axis():
    config = model_config({"model_type": "gpt_oss", "num_hidden_layers": 1}, dtype="bfloat16")
    experts = "model.layers.0.mlp.experts"
    present = {f"{experts}.{name}_proj_blocks" for name in ("gate_up", "down")}
    slots = {slot.path: slot for slot in slots_of(config, FAMILIES["gpt_oss"], present)}
    packed = slots["layers/experts/gate_up"], slots["layers/experts/down"]
    assert [slot.storage for slot in packed] == ["mxfp4", "mxfp4"]
    assert [slot.layout.tensor_shape for slot in packed] == [(128, 2 * 2880, 2880), (128, 2880, 2880)]
