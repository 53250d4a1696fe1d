"""Quantised tensors decode as transformers decodes them, whole and slice by slice."""

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from quantised_checkpoints import FP8, random_fp8, random_mxfp4
from tiny import CONFIG, spread
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from trace_jax.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorFile, readable_tensor
from trace_jax.checkpoints.parts import account
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.models.families import FAMILIES


def opened(tmp_path, tensors):
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    return TensorFile(tmp_path / "m.safetensors").tensors


@pytest.mark.parametrize("shape", [(24, 32), (3, 16, 48)])
def test_fp8_blocks_decode_as_in_transformers(shape, tmp_path):
    weight, scales = random_fp8(np.random.default_rng(0), shape, (8, 16))
    tensors = opened(tmp_path, {"w": weight, "w_scale_inv": scales})
    tensor = readable_tensor("w", tensors, {"quantization_config": FP8})
    want = Fp8Dequantize(None)._dequantize_one(weight, scales).numpy().reshape(-1)
    np.testing.assert_array_equal(tensor.read(), want)
    columns = shape[-1]
    for start, stop in ((0, 1), (7, 9), (5, 20), (15, 17)):
        np.testing.assert_array_equal(
            tensor.read(start * columns, stop * columns), want[start * columns : stop * columns]
        )


def test_fp8_blocks_at_the_edge_may_be_cut(tmp_path):
    """DeepSeek-V3's kv_a_proj has 576 rows: 4.5 blocks. (transformers 5.24 refuses such a matrix.)"""
    weight, scales = random_fp8(np.random.default_rng(0), (20, 40), (8, 16))
    tensors = opened(tmp_path, {"w": weight, "w_scale_inv": scales})
    decoded = readable_tensor("w", tensors, {"quantization_config": FP8}).read().reshape(20, 40)
    for row in range(20):
        for column in range(40):
            assert decoded[row, column] == weight[row, column].float() * scales[row // 8, column // 16]


@pytest.mark.parametrize("shape", [(2, 6, 64), (1, 3, 32)])
def test_mxfp4_decodes_as_in_transformers(shape, tmp_path):
    blocks, scales = random_mxfp4(np.random.default_rng(0), shape)
    tensors = opened(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    tensor = readable_tensor("w", tensors, {}, "mxfp4")
    assert tensor.shape == shape
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).numpy().reshape(-1)
    np.testing.assert_array_equal(tensor.read(), want)
    np.testing.assert_array_equal(tensor.read(32, 96), want[32:96])


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"quantization_config": FP8}, "w is float8; it needs w_scale_inv"),
        ({"w_scale_inv": torch.ones(1, 1)}, {}, "quantization_config.weight_block_size"),
        (
            {"w_scale_inv": torch.ones(2, 2)},
            {"quantization_config": FP8},
            r"w_scale_inv is \[2, 2\], expected \[1, 1\]",
        ),
    ],
)
def test_float8_without_its_scales_is_refused(tensors, config, message, tmp_path):
    stored = opened(tmp_path, {"w": torch.zeros(8, 16).to(torch.float8_e4m3fn), **tensors})
    with pytest.raises(CheckpointError, match=message):
        readable_tensor("w", stored, config)


def test_what_cannot_be_decoded_is_refused(tmp_path):
    blocks, _ = random_mxfp4(np.random.default_rng(0), (2, 4, 32))
    with pytest.raises(CheckpointError, match=r"w_blocks is \[2, 4, 1, 16\] and w_scales missing"):
        readable_tensor("w", opened(tmp_path, {"w_blocks": blocks}), {}, "mxfp4")
    for method in ("gptq", None):
        checkpoint = Checkpoint(tmp_path, {"quantization_config": {"quant_method": method}}, (), {})
        with pytest.raises(CheckpointError, match=rf"method {method!r} can't be read; supported are fp8, mxfp4"):
            account(checkpoint, CONFIG, FAMILIES["mixtral"])


def test_a_quantised_checkpoint_imports_as_its_decoded_twin_on_one_device_and_on_four(packed_and_plain):
    packed, plain = (load_pretrained(directory) for directory in packed_and_plain)
    assert packed.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, packed.params, plain.params)
    rules = {"experts": "expert", "embed": "data", "heads": "data", "latent": "expert"}
    cut = load_pretrained(packed_and_plain[0], shardings=spread(plain.config, rules))
    jax.tree.map(np.testing.assert_array_equal, cut.params, plain.params)
