"""Directories: what is a checkpoint, of which shape, and what is refused with which advice."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError
from trace_jax.models.families import PUBLISHED, model_config

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


def test_one_file_or_several_with_an_index(tmp_path):
    config = '{"model_type": "olmoe"}'
    one = open_checkpoint(write(tmp_path / "one", {"model.safetensors": ONE | TWO}, config=config))
    assert (one.config, set(one.tensors)) == ({"model_type": "olmoe"}, {"x", "y"})
    several = open_checkpoint(write(tmp_path / "several", {A: ONE, B: TWO}, {"x": A, "y": B}))
    assert [tensor.file.path.name for tensor in several.tensors.values()] == [A, B]


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
        ("{}", {"consolidated.00.pth": ONE}, None, r"holds consolidated\.00\.pth, a pickle.*save_pretrained"),
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


def mixtral_in(directory, **changes):
    (directory / "config.json").write_text(json.dumps({**PUBLISHED["mixtral-8x7b"], **changes}))
    return str(directory)


def test_without_a_path_the_shape_is_the_published_one_and_a_run_is_refused():
    model = PretrainedConfig(path="", published="mixtral-8x7b", dtype="float32", grouped_matmul="ragged")
    assert (model.shape().num_experts, model.shape().dtype, model.shape().grouped_matmul) == (8, "float32", "ragged")
    with pytest.raises(ConfigError, match=r"path is empty; .*--config\.model\.path=DIR"):
        model.check()


def test_a_path_must_have_that_shape_and_tensors(tmp_path):
    same = PretrainedConfig(path=mixtral_in(tmp_path), published="mixtral-8x7b")
    assert same.shape() == model_config(PUBLISHED["mixtral-8x7b"], dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        same.check()
    mixtral_in(tmp_path, num_local_experts=16, num_experts_per_tok=1, rms_norm_eps=1e-6)
    with pytest.raises(
        ConfigError,
        match=r"is no mixtral-8x7b \(model\.published\): num_experts is 16, expected 8; experts_per_token is 1, "
        r"expected 2\. Give the directory of mistralai/Mixtral-8x7B-Instruct-v0\.1",
    ):
        same.shape()
    assert PretrainedConfig(path=str(tmp_path)).shape().num_experts == 16
