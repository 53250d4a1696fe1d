"""Safetensors files: read as the library reads them, slice by slice; written as it writes them, tensor by tensor."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_jax.checkpoints.checkpoint import DTYPES, CheckpointError, TensorFile, create_file

TORCH = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    **{name: getattr(torch, DTYPES[name].name) for name in DTYPES if name[:2] not in ("F8", "BO")},
}


def numbers(dtype, shape=(5, 7, 3)):
    """Every kind of bits (for BOOL: 0 and 1) in a torch tensor."""
    itemsize = dtype.itemsize
    data = np.random.default_rng(0).integers(0, 2 if dtype == torch.bool else 256, (*shape, itemsize), np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def save(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", TORCH)
def test_any_slice_of_any_type_is_what_the_library_wrote(name, tmp_path):
    want = {"a": numbers(TORCH[name], (2, 3)), "b": numbers(TORCH[name])}
    safetensors.torch.save_file(want, tmp_path / "m.safetensors")
    tensor = TensorFile(tmp_path / "m.safetensors").tensors["b"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (DTYPES[name], (5, 7, 3), 105 * DTYPES[name].itemsize)
    assert tensor.read().tobytes() == bits(want["b"])

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.integers(0, 105), min_size=2, max_size=2).map(sorted))
    def check(bounds):
        start, stop = bounds
        assert tensor.read(start, stop).tobytes() == bits(want["b"].reshape(-1)[start:stop])

    check()


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
    np.testing.assert_array_equal(safetensors.torch.load_file(tmp_path / "m.safetensors")["x"].numpy(), array)
    for wrong in (np.zeros(2, np.int64), np.zeros(25, np.int32)):
        with pytest.raises(AssertionError, match="x"):
            tensor.write(wrong)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"x": entry([4], 0, 4), "y": entry([4], 4, 8)}, 7, "file not fully covered"),
        ({"x": entry([4], 0, 4)}, 6, "file not fully covered"),
        ({"x": entry([4], 0, 4), "y": entry([4], 2, 6)}, 6, "invalid offset for tensor `y`"),
        ({"x": entry([4], 0, 4), "y": entry([4], 6, 10)}, 10, "invalid offset for tensor `y`"),
        ({"x": entry([2, 3], 0, 4)}, 4, "invalid shape, data type, or offset"),
        ({"x": entry([4], 0, 2, "F4")}, 2, "x has dtype 'F4'; readable are F64"),
        ({"x": entry([4], 0, 4, "Q7")}, 4, "unknown variant `Q7`"),
        ({"x": entry([-4], 0, 4)}, 4, "invalid value: integer `-4`"),
        (b"{not json", 0, "invalid JSON in header"),
        (b"[]", 0, "invalid JSON in header"),
    ],
)
def test_a_wrong_header_is_refused_with_its_file(header, size, message, tmp_path):
    save(tmp_path / "m.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*" + message):
        TensorFile(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_without_a_whole_header_is_refused(content, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*header.*cut short on its way"):
        TensorFile(tmp_path / "m.safetensors")
