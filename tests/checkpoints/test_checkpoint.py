"""Directories: what is a checkpoint, and what is refused with which advice."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint

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


def test_one_file(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": ONE | TWO}, config='{"model_type": "olmoe"}'))
    assert checkpoint.config == {"model_type": "olmoe"}
    assert set(checkpoint.tensors) == {"x", "y"}
    assert checkpoint.index is None


def test_several_files_with_an_index(tmp_path):
    files = {"a.safetensors": ONE, "b.safetensors": TWO}
    checkpoint = open_checkpoint(write(tmp_path, files, {"x": "a.safetensors", "y": "b.safetensors"}))
    assert {name: tensor.file.path.name for name, tensor in checkpoint.tensors.items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }


@pytest.mark.parametrize("absolute", [False, True], ids=["as given", "made absolute by a config"])
def test_a_name_of_the_hub_is_no_directory(absolute, tmp_path):
    name = "allenai/OLMoE-1B-7B-0924"
    with pytest.raises(CheckpointError, match="hf download allenai/OLMoE-1B-7B-0924 --local-dir"):
        open_checkpoint(tmp_path / name if absolute else name)


def test_a_directory_without_config_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(write(tmp_path, {"model.safetensors": ONE}, config=None))


@pytest.mark.parametrize("config", ["{", "[]"])
def test_a_config_json_that_is_none(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: .*Download it again"):
        open_checkpoint(write(tmp_path, {"model.safetensors": ONE}, config=config))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(name, tmp_path):
    write(tmp_path, {})
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(CheckpointError, match=rf"holds {name}, a pickle.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_no_tensors_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(write(tmp_path, {}))


@pytest.mark.parametrize(
    ("files", "weight_map", "message"),
    [
        ({"a.safetensors": ONE}, {"x": "a.safetensors", "y": "b.safetensors"}, r"names the file b\.safetensors"),
        ({"a.safetensors": ONE}, {"x": "../a.safetensors"}, r"names the file \.\./a\.safetensors"),
        ({"a.safetensors": ONE}, {"x": "a.safetensors", "y": "a.safetensors"}, r"y should be in a\.safetensors"),
        (
            {"a.safetensors": ONE, "b.safetensors": ONE | TWO},
            {"x": "a.safetensors", "y": "b.safetensors"},
            r"b\.safetensors: x is also in a\.safetensors",
        ),
        ({"a.safetensors": ONE}, ["x"], "weight_map must give each tensor's file"),
    ],
)
def test_an_index_that_does_not_fit_its_files(files, weight_map, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, files, weight_map))
