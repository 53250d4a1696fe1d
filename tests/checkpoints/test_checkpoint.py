"""Safetensors files: read as the library reads them, slice by slice; written as it writes them, tensor by tensor.
Quantised tensors decode as transformers decodes them."""

import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from quantised_checkpoints import FP8, random_fp8, random_mxfp4
from safetensors.numpy import save_file
from tiny import CONFIG, spread
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from trace_jax.checkpoints import checkpoint
from trace_jax.checkpoints.checkpoint import DTYPES, CheckpointError, TensorFile, create_file, open_checkpoint
from trace_jax.checkpoints.parts import account
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.models.families import FAMILIES

TORCH = {name: getattr(torch, dtype.name) for name, dtype in DTYPES.items()}


def numbers(dtype, shape=(5, 7, 3)):
    """Every kind of bits (for BOOL: 0 and 1) in a torch tensor."""
    stop = 2 if dtype == torch.bool else 256
    data = np.random.default_rng(0).integers(0, stop, (*shape, dtype.itemsize), np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", TORCH)
def test_any_slice_of_any_type_is_what_the_library_wrote(name, tmp_path):
    want = {"a": numbers(TORCH[name], (2, 3)), "b": numbers(TORCH[name])}
    safetensors.torch.save_file(want, tmp_path / "m.safetensors")
    tensor = TensorFile(tmp_path / "m.safetensors").tensors["b"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (DTYPES[name], (5, 7, 3), 105 * DTYPES[name].itemsize)
    for start, stop in ((0, None), (0, 1), (7, 7), (13, 90), (21, 105), (104, None)):
        assert tensor.read(start, stop).tobytes() == bits(want["b"].reshape(-1)[start:stop])


def test_written_files_are_those_of_the_library(tmp_path):
    want = {name: numbers(dtype) for name, dtype in TORCH.items()}
    safetensors.torch.save_file(want, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = TensorFile(tmp_path / "theirs.safetensors")
    specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in theirs.tensors.values()}
    ours = create_file(tmp_path / "ours.safetensors", specs, {"format": "pt"})
    for name in reversed(list(specs)):  # in any order
        ours.tensors[name].copy(theirs.tensors[name])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_tensor_can_be_written_in_parts_of_its_type_and_size(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    tensor = create_file(tmp_path / "m.safetensors", {"x": (array.dtype, array.shape)}, {}).tensors["x"]
    tensor.write(array[2:], start=12)
    tensor.write(array[:3])
    np.testing.assert_array_equal(tensor.read().reshape(4, 6), array)
    for wrong in (np.zeros(2, np.int64), np.zeros(25, np.int32)):
        with pytest.raises(AssertionError, match="x"):
            tensor.write(wrong)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"x": entry([4], 0, 4), "y": entry([4], 4, 8)}, 7, "file not fully covered"),
        ({"x": entry([4], 0, 4), "y": entry([4], 2, 6)}, 6, "invalid offset for tensor `y`"),
        ({"x": entry([2, 3], 0, 4)}, 4, "invalid shape, data type, or offset"),
        ({"x": entry([4], 0, 2, "F4")}, 2, "x has dtype 'F4'; readable are F64"),
        (b"\x09\x00\x00\x00\x00\x00\x00\x00{not json", 0, "invalid JSON in header"),
        (b"", 0, "header.*cut short on its way"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", 0, "header.*cut short on its way"),
    ],
)
def test_a_wrong_header_is_refused_with_its_file(header, size, message, tmp_path):
    if not isinstance(header, bytes):
        text = json.dumps(header).encode()
        header = len(text).to_bytes(8, "little") + text
    (tmp_path / "m.safetensors").write_bytes(header + bytes(size))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*" + message):
        TensorFile(tmp_path / "m.safetensors")


# --- directories

A, B = "a.safetensors", "b.safetensors"
ONE = {"x": np.arange(3, dtype=np.float32)}
TWO = {"y": np.arange(4, dtype=np.float32)}


def write(directory, files, weight_map=None, config="{}"):
    directory.mkdir(exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(config)
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    if weight_map is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("absolute", [False, True], ids=["as given", "made absolute by a config"])
def test_a_name_of_the_hub_is_no_directory(absolute, tmp_path):
    name = "allenai/OLMoE-1B-7B-0924"
    with pytest.raises(CheckpointError, match="hf download allenai/OLMoE-1B-7B-0924 --local-dir"):
        open_checkpoint(tmp_path / name if absolute else name)


@pytest.mark.parametrize(
    ("config", "files", "weight_map", "message"),
    [
        (None, {"model.safetensors": ONE}, None, r"config\.json is missing"),
        ("{", {"model.safetensors": ONE}, None, r"config\.json: .*Download it again"),
        ("[]", {"model.safetensors": ONE}, None, r"config\.json: .*Download it again"),
        ("{}", {"pytorch_model.bin": ONE}, None, r"holds pytorch_model\.bin, a pickle.*save_pretrained"),
        ("{}", {}, None, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        ("{}", {A: ONE}, {"x": A, "y": B}, r"names the file b\.safetensors"),
        ("{}", {A: ONE}, {"x": f"../{A}"}, r"names the file \.\./a\.safetensors"),
        ("{}", {A: ONE}, {"x": A, "y": A}, r"y should be in a\.safetensors"),
        ("{}", {A: ONE, B: ONE | TWO}, {"x": A, "y": B}, r"b\.safetensors: x is also in a\.safetensors"),
        ("{}", {A: ONE}, ["x"], "weight_map must give each tensor's file"),
    ],
)
def test_a_directory_that_is_no_checkpoint_or_whose_index_does_not_fit(config, files, weight_map, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, files, weight_map, config))


# --- quantised tensors


def opened(tmp_path, tensors):
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    return TensorFile(tmp_path / "m.safetensors").tensors


def as_float8(tmp_path, tensors, config=FP8):
    return checkpoint.readable_tensor("w", opened(tmp_path, tensors), {"quantization_config": config})


@pytest.mark.parametrize("shape", [(24, 32), (3, 16, 48)])
def test_fp8_blocks_decode_as_in_transformers(shape, tmp_path):
    weight, scales = random_fp8(np.random.default_rng(0), shape, (8, 16))
    tensor = as_float8(tmp_path, {"w": weight, "w_scale_inv": scales})
    want = Fp8Dequantize(None)._dequantize_one(weight, scales).numpy().reshape(-1)
    np.testing.assert_array_equal(tensor.read(), want)
    for start, stop in shape[-1] * np.array([(0, 1), (7, 9), (5, 20), (15, 17)]):
        np.testing.assert_array_equal(tensor.read(start, stop), want[start:stop])


def test_fp8_blocks_at_the_edge_may_be_cut(tmp_path):
    """DeepSeek-V3's kv_a_proj has 576 rows: 4.5 blocks. (transformers 5.24 refuses such a matrix.)"""
    weight, scales = random_fp8(np.random.default_rng(0), (20, 40), (8, 16))
    decoded = as_float8(tmp_path, {"w": weight, "w_scale_inv": scales}).read().reshape(20, 40)
    row, column = np.indices((20, 40))
    np.testing.assert_array_equal(decoded, weight.float() * scales[row // 8, column // 16])


@pytest.mark.parametrize("shape", [(2, 6, 64), (1, 3, 32)])
def test_mxfp4_decodes_as_in_transformers(shape, tmp_path):
    blocks, scales = random_mxfp4(np.random.default_rng(0), shape)
    tensors = opened(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    tensor = checkpoint.readable_tensor("w", tensors, {}, "mxfp4")
    assert tensor.shape == shape
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).numpy().reshape(-1)
    np.testing.assert_array_equal(tensor.read(), want)
    np.testing.assert_array_equal(tensor.read(32, 96), want[32:96])


@pytest.mark.parametrize(
    ("scales", "config", "message"),
    [
        ({}, FP8, "w is float8; it needs w_scale_inv"),
        ({"w_scale_inv": torch.ones(1, 1)}, None, "quantization_config.weight_block_size"),
        ({"w_scale_inv": torch.ones(2, 2)}, FP8, r"w_scale_inv is \[2, 2\], expected \[1, 1\]"),
    ],
)
def test_float8_without_its_scales_is_refused(scales, config, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        as_float8(tmp_path, {"w": torch.zeros(8, 16).to(torch.float8_e4m3fn), **scales}, config)


def test_what_cannot_be_decoded_is_refused(tmp_path):
    blocks, _ = random_mxfp4(np.random.default_rng(0), (2, 4, 32))
    with pytest.raises(CheckpointError, match=r"w_blocks is \[2, 4, 1, 16\] and w_scales missing"):
        checkpoint.readable_tensor("w", opened(tmp_path, {"w_blocks": blocks}), {}, "mxfp4")
    for method in ("gptq", None):
        unread = checkpoint.Checkpoint(tmp_path, {"quantization_config": {"quant_method": method}}, (), {})
        with pytest.raises(CheckpointError, match=rf"method {method!r} can't be read; supported are fp8, mxfp4"):
            account(unread, CONFIG, FAMILIES["mixtral"])


def test_a_quantised_checkpoint_imports_as_its_decoded_twin_on_one_device_and_on_four(packed_and_plain):
    packed, plain = (load_pretrained(directory) for directory in packed_and_plain)
    assert packed.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, packed.params, plain.params)
    rules = {"experts": "expert", "embed": "data", "heads": "data", "latent": "expert"}
    cut = load_pretrained(packed_and_plain[0], shardings=spread(plain.config, rules))
    jax.tree.map(np.testing.assert_array_equal, cut.params, plain.params)
