"""Every tensor is used once and every parameter filled once; what doesn't fit is named."""

import dataclasses
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.checkpoints.parts import account, slots_of
from trace_jax.models.architecture import flat_specs
from trace_jax.models.families import FAMILIES, family_of, model_config

Q = "model.layers.1.self_attn.q_proj.weight"


def accounting(directory):
    checkpoint = open_checkpoint(directory)
    return account(checkpoint, model_config(checkpoint.config, dtype="float32"), family_of(checkpoint.config))


@pytest.fixture
def changed(tiny_checkpoint, tmp_path):
    """changed(change): a tiny Mixtral (or other checkpoint) after `change` of its tensors."""

    def make(change, model_type="mixtral"):
        source = tiny_checkpoint(model_type)
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        shutil.copy(source / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


def test_each_tensor_is_used_once_and_each_parameter_filled_once(tiny_checkpoint):
    checkpoint, slots = open_checkpoint(tiny_checkpoint("mixtral")), accounting(tiny_checkpoint("mixtral"))[0]
    specs = flat_specs(model_config(checkpoint.config, dtype="float32"))
    assert sorted(name for slot in slots for name in slot.names) == sorted(checkpoint.tensors)
    rows = {path: range(spec.shape[0]) if spec.axes[0] == "layers" else [None] for path, spec in specs.items()}
    want = [(path, row) for path in rows for row in rows[path]]
    assert sorted(((slot.path, slot.row) for slot in slots), key=str) == sorted(want, key=str)


GATES = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(Q), f"missing {Q}"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name],
            r"missing model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight(.*\.weight){9} and 38 more\.",
        ),
        (
            lambda tensors: tensors.update({Q: np.zeros((48, 47), np.float32)}),
            rf"{Q} is \[48, 47\], expected \[64",
        ),
        (
            lambda tensors: tensors.update({GATES[1]: tensors[GATES[1]].astype(np.float16)}),
            "the other tensors of layers/experts/gate_up have different types",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, changed):
    with pytest.raises(CheckpointError, match=message):
        accounting(changed(change))


@pytest.mark.parametrize(
    ("model_type", "name", "why"),
    [
        ("deepseek_v3", "model.layers.2.eh_proj.weight", "multi-token"),
        ("glm4_moe", "model.layers.2.self_attn.q_proj.weight", "multi-token"),
        ("mellum", "mtp.layers.0.mlp.gate.weight", "multi-token"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.gate_proj.weight", "multi-token"),
        ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq", "frequencies"),
        ("granitemoeshared", "lm_head.weight", "output head is the embedding"),
        ("mixtral", "model.layers.3.mlp.gate.weight", None),
        ("mixtral", "model.layers.0.self_attn.q_proj.bias", None),
        ("mixtral", "model.layers.0.lora_A", None),
        ("deepseek_v3", "model.layers.9.self_attn.o_proj.weight", None),
    ],
)
def test_a_tensor_that_fills_nothing_is_ignored_with_a_reason_or_an_error(model_type, name, why, changed):
    directory = changed(lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)}), model_type)
    if why:
        assert why in accounting(directory)[2][name]
    else:
        with pytest.raises(CheckpointError, match=rf"{name} would stay unread; a {model_type}"):
            accounting(directory)


def test_scales_and_ignored_tensors_are_accounted_for(packed_and_plain):
    _, readable, ignored = accounting(packed_and_plain[0])
    parts = {part.name for tensor in readable.values() for part in tensor.parts}
    assert not parts & set(ignored)
    assert parts | set(ignored) == set(open_checkpoint(packed_and_plain[0]).tensors)
    assert any(name.endswith(("_scale_inv", "_scales")) for name in parts)
    assert all("multi-token" in reason for reason in ignored.values())


def test_a_parameter_that_nothing_fills_is_a_mistake_of_ours():
    config = model_config({"model_type": "mixtral"}, dtype="float32")
    with pytest.raises(ValueError, match="mixtral: no tensor fills the parameter layers/experts/"):
        slots_of(dataclasses.replace(config, expert_bias=True), FAMILIES["mixtral"], ())


def test_gpt_oss_as_published_packs_along_the_input_axis():
    config = model_config({"model_type": "gpt_oss", "num_hidden_layers": 1}, dtype="bfloat16")
    experts = "model.layers.0.mlp.experts"
    present = {f"{experts}.{name}_proj_blocks" for name in ("gate_up", "down")}
    slots = {slot.path: slot for slot in slots_of(config, FAMILIES["gpt_oss"], present)}
    packed = slots["layers/experts/gate_up"], slots["layers/experts/down"]
    assert [slot.storage for slot in packed] == ["mxfp4", "mxfp4"]
    assert [slot.tensor_shape for slot in packed] == [(128, 2 * 2880, 2880), (128, 2880, 2880)]
