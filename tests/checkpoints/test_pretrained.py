"""Import: the same parameters from every way a checkpoint can lie on disk, on one device and on four."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import spread
from tokenizers import Tokenizer, models

from trace_jax.checkpoints import parts, pretrained
from trace_jax.checkpoints.checkpoint import CheckpointError
from trace_jax.checkpoints.pretrained import PretrainedConfig, load_pretrained, read_tokenizer
from trace_jax.config import ConfigError
from trace_jax.models.architecture import abstract_params, flatten
from trace_jax.models.families import PUBLISHED, model_config
from trace_jax.models.model import Source, SpecialTokens
from trace_jax.models.sharding import param_shardings
from trace_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def mixtral(tiny_checkpoint):
    """A tiny Mixtral, read the plain way."""
    return load_pretrained(tiny_checkpoint("mixtral"))


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """The parameters' memory: the host's, or (as it were) a device's own."""
    if request.param == "device":
        monkeypatch.setattr(pretrained, "host_memory", lambda *_: None)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def resaved(source, directory, dtype=torch.float32, files=1):
    """A copy of a checkpoint in another type, or with its tensors dealt to so many files."""
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    disk, weight_map = safetensors.torch.load_file(source / "model.safetensors"), {}
    for part in range(files):
        file = "model.safetensors" if files == 1 else f"part-{part}.safetensors"
        tensors = {name: disk[name].to(dtype) for name in list(disk)[part::files]}
        safetensors.torch.save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("float16", "bfloat16"), ("float64", "float32")]
)
@pytest.mark.usefixtures("where")
def test_types_are_cast_once_and_the_router_is_float32(stored, dtype, tiny_checkpoint, tmp_path):
    directory = resaved(tiny_checkpoint("mixtral"), tmp_path / "cast", getattr(torch, stored))
    model = load_pretrained(directory, dtype=dtype)
    params, want = jax.device_get(model.params), abstract_params(model.config)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), params, want))
    assert model.source == Source(directory.absolute(), "mixtral")
    disk = safetensors.torch.load_file(directory / "model.safetensors")
    router = disk["model.layers.0.block_sparse_moe.gate.weight"].float().numpy()
    head = disk["lm_head.weight"].to(getattr(torch, dtype)).float().numpy()
    assert (params["layers"]["router"].dtype, params["head"].dtype) == (np.float32, dtype)
    np.testing.assert_array_equal(params["layers"]["router"][0], router.T)
    np.testing.assert_array_equal(params["head"].astype(np.float32), head.T)


@pytest.mark.parametrize("limit", [1000, 20_000])
@pytest.mark.usefixtures("where")
def test_neither_the_size_of_parts_nor_the_files_matter(limit, tiny_checkpoint, mixtral, tmp_path, monkeypatch):
    """Also one expert's three matrices, and gate and up, in different files."""
    monkeypatch.setattr(parts, "PART_BYTES", limit)
    monkeypatch.setattr(parts, "PIECE_BYTES", 8 + limit // 2)
    directory = resaved(tiny_checkpoint("mixtral"), tmp_path / "cut", files=3)
    assert_equal(load_pretrained(directory).params, mixtral.params)


@pytest.mark.parametrize(
    ("layout", "rules"),
    [
        ("original", {"embed": "data"}),
        ("original", {"experts": ("data", "expert"), "head": "data"}),
        ("fused", {"experts": "expert", "embed": "data", "expert_hidden": None}),
    ],
)
def test_sharded_on_four_devices(layout, rules, tiny_checkpoint, mixtral):
    shardings = spread(mixtral.config, rules)
    got = load_pretrained(tiny_checkpoint("mixtral", layout), shardings=shardings)
    assert_equal(got.params, mixtral.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, got.params) == shardings


def test_shared_by_the_devices_of_a_mesh(tiny_checkpoint, mixtral):
    mesh = make_mesh(expert=2, tensor=2)
    got = load_pretrained(tiny_checkpoint("mixtral"), mesh=mesh)
    assert_equal(got.params, mixtral.params)
    assert {path: leaf.sharding for path, leaf in flatten(got.params).items()} == param_shardings(got.config, mesh)
    with pytest.raises(ValueError, match=r"layers/.*: its layers can't be sharded"):
        load_pretrained(tiny_checkpoint("mixtral"), shardings=spread(got.config, {"layers": "data"}))


def test_no_model_comes_of_a_file_that_is_short_or_shrinks_while_it_is_read(tiny_checkpoint, tmp_path, monkeypatch):
    short = resaved(tiny_checkpoint("mixtral"), tmp_path / "bad", files=2)
    os.truncate(short / "part-1.safetensors", (short / "part-1.safetensors").stat().st_size - 1)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=r"part-1\.saf.*not fully covered"):
        patched.setattr(pretrained, "stream", lambda *_: pytest.fail("tensors were read"))
        load_pretrained(short)
    shrinking = resaved(tiny_checkpoint("mixtral"), tmp_path / "cut")
    real = parts.places

    def places(*arguments):
        yield from real(*arguments)
        os.truncate(shrinking / "model.safetensors", 30_000)

    monkeypatch.setattr(parts, "places", places)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends within (model|lm_head)\."):
        load_pretrained(shrinking)


def test_special_tokens_from_ids(tmp_path):
    for generation, config, want in (
        ({}, {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}, SpecialTokens(5, (6,), 7)),
        ({"eos_token_id": [8, 9]}, {"bos_token_id": None, "eos_token_id": 6}, SpecialTokens(None, (8, 9), 8)),
        ({"bos_token_id": 0}, {"bos_token_id": 5}, SpecialTokens(0, (), 0)),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        assert read_tokenizer(tmp_path, config)[1] == want
    with pytest.raises(CheckpointError, match=r"eos_token_id has \{\}; expected the number of a token"):
        read_tokenizer(tmp_path, {"eos_token_id": [3, {}]})


def test_the_tokenizer_comes_along_and_says_the_ids_of_special_tokens(tiny_checkpoint, tmp_path):
    directory = resaved(tiny_checkpoint("mixtral"), tmp_path / "model")
    Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")).save(str(directory / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(directory, {})[1] == SpecialTokens(1, (2,), 2)
    model = load_pretrained(directory, grouped_matmul="ragged")
    assert model.tokenizer.encode("</s>").ids == [2]
    assert model.config.grouped_matmul == "ragged"
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: can't be read as a tokenizer"):
        load_pretrained(directory)


# --- which checkpoint


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
    differs = r"num_experts is 16, expected 8; experts_per_token is 1, expected 2\. Give .* mistralai/Mixtral-8x7B-In"
    with pytest.raises(ConfigError, match=rf"is no mixtral-8x7b \(model\.published\): {differs}"):
        same.shape()
    assert PretrainedConfig(path=str(tmp_path)).shape().num_experts == 16
