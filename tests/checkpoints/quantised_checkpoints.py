"""Quantised tiny checkpoints: DeepSeek-V3's FP8 blocks and GPT-OSS's MXFP4, each with its decoded twin."""

import json
import math

import numpy as np
import safetensors.torch
import tiny_checkpoints
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8 = {"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": []}


def random_fp8(generator, shape, block):
    """(float8 weights without NaN, a scale for each block)"""
    weight = torch.from_numpy(generator.integers(0, 256, shape, np.uint8)).view(torch.float8_e4m3fn)
    weight = torch.where(weight.float().isnan(), 0.5, weight.float()).to(torch.float8_e4m3fn)
    grid = [math.ceil(size / width) for size, width in zip(shape[-2:], block, strict=True)]
    return weight, torch.from_numpy(generator.uniform(0.001, 0.1, (*shape[:-2], *grid)).astype(np.float32))


def random_mxfp4(generator, shape):
    """Blocks and scales of a tensor of this shape."""
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16), np.uint8)
    return torch.from_numpy(blocks), torch.from_numpy(generator.integers(100, 130, blocks.shape[:-1]).astype(np.uint8))


def twins(kind, directory):
    """A tiny checkpoint with some tensors quantised, and the same with what transformers decodes them to."""
    model_type, sizes, quantization, quantise = {
        "fp8": ("deepseek_v3", {"moe_intermediate_size": 32, "num_hidden_layers": 3}, FP8, as_fp8),
        "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}, MXFP4, as_mxfp4),
    }[kind]
    source = tiny_checkpoints.save(tiny_checkpoints.build(model_type, **sizes), model_type, directory / "source")
    fields = json.loads((source / "config.json").read_text())
    packed, plain = quantise(safetensors.torch.load_file(source / "model.safetensors"))
    for name, tensors, more in (("packed", packed, {"quantization_config": quantization}), ("plain", plain, {})):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(fields | more))
        safetensors.torch.save_file(tensors, directory / name / "model.safetensors", metadata={"format": "pt"})
    return directory / "packed", directory / "plain"


def as_fp8(tensors):
    """Every matrix whose sizes are whole blocks, but the embedding, the head and the router, as DeepSeek-V3 has it."""
    generator, packed, plain = np.random.default_rng(1), {}, {}
    tensors = {**tensors, "model.layers.3.eh_proj.weight": torch.zeros(16, 32)}  # the MTP layer isn't read
    for name, tensor in tensors.items():
        packed[name] = plain[name] = tensor
        plain_only = "embed" in name or "lm_head" in name or name.endswith("gate.weight")
        if tensor.ndim == 2 and not plain_only and tensor.shape[0] % 8 == 0 and tensor.shape[1] % 16 == 0:
            packed[name], packed[f"{name}_scale_inv"] = random_fp8(generator, tuple(tensor.shape), (8, 16))
            plain[name] = Fp8Dequantize(None)._dequantize_one(packed[name], packed[f"{name}_scale_inv"])
    return packed, plain


def as_mxfp4(tensors):
    generator, packed, plain = np.random.default_rng(1), dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        blocks, scales = random_mxfp4(generator, (experts, outputs, inputs))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return packed, plain
