"""Every tensor is used once and every parameter filled once; what doesn't fit is named."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trace_jax.checkpoints.accounting import account
from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.models.arrays import flat_specs
from trace_jax.models.families import FAMILIES, family_of, model_config

Q = "model.layers.1.self_attn.q_proj.weight"


def accounting(directory):
    config_json = json.loads((directory / "config.json").read_text())
    return account(open_checkpoint(directory), model_config(config_json, dtype="float32"), family_of(config_json))


@pytest.fixture
def changed(tiny_checkpoint, tmp_path):
    """changed(change): a tiny Mixtral after `change` of its tensors."""

    def make(change):
        source = tiny_checkpoint("mixtral")
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        shutil.copy(source / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


def test_each_tensor_is_used_once_and_each_parameter_filled_once(tiny_checkpoint):
    found = accounting(tiny_checkpoint("mixtral"))
    config = model_config(found.checkpoint.config, dtype="float32")
    used = [name for slot in found.slots for name in slot.names]
    assert sorted(used) == sorted(found.checkpoint.tensors)
    rows = [(slot.path, slot.row) for slot in found.slots]
    assert sorted(rows, key=str) == sorted(
        (
            (path, row)
            for path, spec in flat_specs(config).items()
            for row in (range(spec.shape[0]) if spec.axes[0] == "layers" else [None])
        ),
        key=str,
    )


def test_a_missing_tensor_is_named(changed):
    with pytest.raises(CheckpointError, match=f"missing {Q}"):
        accounting(changed(lambda tensors: tensors.pop(Q)))


def test_of_many_missing_tensors_ten_are_named(changed):
    def drop(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    with pytest.raises(
        CheckpointError, match=r"missing model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight"
    ) as found:
        accounting(changed(drop))
    assert str(found.value).count(".weight") == 10
    experts = model_config({"model_type": "mixtral"}, dtype="float32").num_experts
    assert f"and {2 * 3 * experts - 10} more" in str(found.value)


def test_an_unexpected_tensor_is_named(changed):
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.lora_A would stay unread; a mixtral"):
        accounting(changed(lambda tensors: tensors.update({"model.layers.0.lora_A": np.zeros(2, np.float32)})))


def test_a_misshapen_tensor_is_named_with_both_shapes(changed):
    with pytest.raises(CheckpointError, match=rf"{Q} is \[48, 47\], expected \[64, 48\]"):
        accounting(changed(lambda tensors: tensors.update({Q: np.zeros((48, 47), np.float32)})))


def test_tensors_of_one_layer_must_have_one_type(changed):
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    with pytest.raises(CheckpointError, match="the other tensors of layers/experts/gate_up have different types"):
        accounting(changed(lambda tensors: tensors.update({name: tensors[name].astype(np.float16)})))


def test_scales_and_ignored_tensors_are_accounted_for(packed_and_plain):
    found = accounting(packed_and_plain[0])
    parts = {part.name for tensor in found.readable.values() for part in tensor.parts}
    assert not parts & set(found.ignored)
    assert parts | set(found.ignored) == set(found.checkpoint.tensors)
    assert any(name.endswith(("_scale_inv", "_scales")) for name in parts)
    assert all("multi-token" in reason for reason in found.ignored.values())


def test_a_quantised_tensor_without_scales_is_an_error(packed_and_plain, tmp_path):
    import safetensors.torch

    tensors = safetensors.torch.load_file(packed_and_plain[0] / "model.safetensors")
    scales = next(name for name in tensors if name.endswith(("_scale_inv", "_scales")) and ".layers.1." in name)
    del tensors[scales]
    shutil.copy(packed_and_plain[0] / "config.json", tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=scales):
        accounting(tmp_path)


def test_a_family_that_fills_a_parameter_from_nothing_is_a_mistake_of_ours(tiny_checkpoint):
    directory = tiny_checkpoint("mixtral")
    config = model_config(json.loads((directory / "config.json").read_text()), dtype="float32")
    with pytest.raises(ValueError, match="parameters and stored tensors don't correspond"):
        account(open_checkpoint(directory), config, FAMILIES["deepseek_v3"])
