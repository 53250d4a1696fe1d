"""A checkpoint that must be a published model is refused when its config.json describes another."""

import json

import pytest

from trace_jax.checkpoints.checkpoint import CheckpointError
from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.config import ConfigError
from trace_jax.models.families.published import PUBLISHED, published_config


def written(directory, **changes):
    (directory / "config.json").write_text(json.dumps({**PUBLISHED["mixtral-8x7b"], **changes}))
    return str(directory)


def test_without_a_path_the_shape_is_the_published_one_and_a_run_is_refused():
    model = PretrainedConfig(path="", published="mixtral-8x7b", dtype="float32", grouped_matmul="ragged")
    assert (model.shape().num_experts, model.shape().dtype, model.shape().grouped_matmul) == (8, "float32", "ragged")
    with pytest.raises(ConfigError, match=r"path is empty; .*--config\.model\.path=DIR"):
        model.check()


def test_a_path_must_have_that_shape_and_tensors(tmp_path):
    same = PretrainedConfig(path=written(tmp_path), published="mixtral-8x7b")
    assert same.shape() == published_config("mixtral-8x7b", dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        same.check()
    written(tmp_path, num_local_experts=16, num_experts_per_tok=1, rms_norm_eps=1e-6)
    with pytest.raises(
        ConfigError,
        match=r"is no mixtral-8x7b \(model\.published\): num_experts is 16, expected 8; experts_per_token is 1, "
        r"expected 2\. Give the directory of mistralai/Mixtral-8x7B-Instruct-v0\.1",
    ):
        same.shape()
    assert PretrainedConfig(path=str(tmp_path)).shape().num_experts == 16
