"""Export: the source's bytes where nothing changed, ours where something did, and nothing half written."""

import dataclasses
import filecmp
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models

from trace_jax.checkpoints import export
from trace_jax.checkpoints.checkpoint import Checkpoint, CheckpointError
from trace_jax.checkpoints.export import ModelCard, base_model_of, licence_of, readme, save_pretrained
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model, SpecialTokens

NEVER = {"modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", "model.gguf"}
DOWN = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
TOKENS = np.random.default_rng(0).integers(3, 60, (2, 12)).astype(np.int32)
logits = jax.jit(lambda params, config: forward(params, config, TOKENS).logits, static_argnums=1)


def tensors_of(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def different(*directories):
    """Names whose tensors are not the same bytes in both."""
    got, want = (
        {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors_of(d).items()}
        for d in directories
    )
    assert set(got) == set(want)
    return {name for name in got if got[name] != want[name]}


def twice_one_expert(model):
    """`model` with one expert's second projection doubled."""
    flat = flatten(model.params)
    flat["layers/experts/down"] = jax.jit(lambda down: down.at[1, 2].multiply(2))(flat["layers/experts/down"])
    return model.replace(params=unflatten(flat))


def theirs(directory):
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype=torch.float32, attn_implementation="eager")
    return model(torch.from_numpy(TOKENS)).logits.detach().numpy()


@pytest.fixture
def source(tiny_checkpoint, tmp_path):
    """A tiny Mixtral with everything that lies beside the tensors of a published one."""
    directory = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("mixtral"), directory)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    beside = "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "LICENSE"
    for name in (*beside, "tokenizer.model", "chat_template.jinja", *NEVER):
        (directory / name).write_text("{ }")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\ntags: [moe]\n---\n# A model\nlicense: fake\n")
    return directory


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_only_what_changed_differs_and_is_cast_back(stored, dtype, source, tmp_path):
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors_of(source).items()}
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    model = twice_one_expert(load_pretrained(source, dtype=dtype))
    save_pretrained(model, tmp_path / "out")
    assert different(tmp_path / "out", source) == {DOWN}
    want = 2 * tensors[DOWN].to(getattr(torch, dtype)).to(getattr(torch, stored))
    assert torch.equal(tensors_of(tmp_path / "out")[DOWN], want)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "out", dtype=dtype).params, model.params)


def test_transformers_gives_our_logits(tiny_checkpoint, tmp_path):
    model = twice_one_expert(load_pretrained(tiny_checkpoint("mixtral", "fused")))
    save_pretrained(model, tmp_path / "out")
    np.testing.assert_allclose(logits(model.params, model.config), theirs(tmp_path / "out"), atol=1e-4)
    assert np.abs(theirs(tmp_path / "out") - theirs(tiny_checkpoint("mixtral"))).max() > 1e-3


def test_what_lies_beside_the_tensors_travels_along_but_no_code_and_no_other_weights(source, tmp_path):
    save_pretrained(load_pretrained(source), tmp_path / "out")
    names = {file.name for file in source.iterdir()} - NEVER
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    same = sorted(names - {"README.md"})
    assert filecmp.cmpfiles(source, tmp_path / "out", same, shallow=False) == (same, [], [])


def test_small_shards_get_an_index_that_transformers_reads(source, tmp_path):
    save_pretrained(load_pretrained(source), tmp_path / "out", shard_bytes=50_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 60_000 for file in files)
    assert not different(tmp_path / "out", source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(source).values())
    np.testing.assert_array_equal(theirs(tmp_path / "out"), theirs(source))
    # Already cut, it is kept as it is, index and all.
    save_pretrained(load_pretrained(tmp_path / "out"), tmp_path / "again")
    names = [file.name for file in files] + ["model.safetensors.index.json"]
    assert filecmp.cmpfiles(tmp_path / "out", tmp_path / "again", names, shallow=False) == (names, [], [])


def test_a_model_spread_over_devices_is_written_as_from_one(source, tmp_path):
    single = load_pretrained(source)
    shardings = tiny.spread(single.config, {"experts": "expert", "embed": "data", "heads": "expert"})
    save_pretrained(twice_one_expert(load_pretrained(source, shardings=shardings)), tmp_path / "out")
    save_pretrained(twice_one_expert(single), tmp_path / "single")
    assert not different(tmp_path / "out", tmp_path / "single")
    assert different(tmp_path / "out", source) == {DOWN}


def test_quantised_tensors_are_written_decoded_where_one_changed_and_else_stay(packed_and_plain, tmp_path):
    packed, plain = packed_and_plain
    imported = load_pretrained(packed)
    save_pretrained(imported, tmp_path / "same")
    names = ["config.json", "model.safetensors"]
    assert filecmp.cmpfiles(packed, tmp_path / "same", names, shallow=False) == (names, [], [])
    head = {"head": 2 * imported.params["head"]}
    save_pretrained(imported.replace(params=imported.params | head), tmp_path / "head")
    assert different(tmp_path / "head", packed) == {"lm_head.weight"}

    model = twice_one_expert(imported)
    save_pretrained(model, tmp_path / "out")
    got, decoded, stored = (tensors_of(directory) for directory in (tmp_path / "out", plain, packed))
    assert set(got) == set(decoded)
    for name, tensor in got.items():
        if name in stored and stored[name].dtype != torch.float8_e4m3fn:
            assert torch.equal(tensor, stored[name])
        elif f".layers.{model.config.moe_layers[1]}." not in name:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, decoded[name].to(torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "written as bfloat16" in (tmp_path / "out" / "README.md").read_text()
    again, want = (m.params["layers"]["experts"]["down"] for m in (load_pretrained(tmp_path / "out"), model))
    np.testing.assert_array_equal(again, np.asarray(want).astype(jnp.bfloat16).astype(np.float32))


def test_a_model_trained_here_becomes_a_mixtral_and_what_that_cannot_express_is_named(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    model = Model(tiny.CONFIG, tiny.random_params(tiny.CONFIG), tokenizer, SpecialTokens(1, (2,), 0))
    save_pretrained(model, tmp_path / "out", shard_bytes=10**4)
    np.testing.assert_allclose(logits(model.params, model.config), theirs(tmp_path / "out"), atol=1e-4)
    again = load_pretrained(tmp_path / "out")
    assert (again.config, again.special) == (model.config, model.special)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    other = model.replace(config=dataclasses.replace(model.config, normalize_top_k=False))
    with pytest.raises(ConfigError, match=r"mixtral, which can't express .*normalize_top_k = False"):
        save_pretrained(other, tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_only_a_checkpoint_is_replaced_and_only_when_that_is_wanted(source, tmp_path):
    model = load_pretrained(source)
    save_pretrained(model, tmp_path / "out")
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(CheckpointError, match="out exists; choose another directory, or overwrite it"):
        save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()
    save_pretrained(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
    for path in (source, tmp_path):
        with pytest.raises(CheckpointError, match="holds the checkpoint that the model came from"):
            save_pretrained(model, path, overwrite=True)
    (tmp_path / "thesis" / "draft").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="thesis is no checkpoint, and is not replaced"):
        save_pretrained(model, tmp_path / "thesis", overwrite=True)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize(("error", "overwrite"), [(KeyboardInterrupt(), True), (OSError("disk full"), False)])
def test_an_interrupted_export_leaves_everything_as_it_was(error, overwrite, source, tmp_path, monkeypatch):
    model = load_pretrained(source)
    if overwrite:
        save_pretrained(model, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    for name in ("take", "readme"):
        monkeypatch.setattr(export, name, mock.Mock(side_effect=error))
        with pytest.raises(type(error)):
            save_pretrained(twice_one_expert(model), tmp_path / "out", overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before


def test_space_and_parameters_are_checked_first(source, tmp_path, monkeypatch):
    model = load_pretrained(source)
    with pytest.raises(ValueError, match=r"missing tensors \['head'\]"):
        save_pretrained(model.replace(params={k: v for k, v in model.params.items() if k != "head"}), tmp_path / "out")
    monkeypatch.setattr(export, "free_bytes", lambda _: 1000)
    with pytest.raises(CheckpointError, match=r"out needs 0\.1 GB, and there are 0\.0 GB free"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the card

CARD = ModelCard(
    unlearned="The model was made to forget the presidents.",
    method="trace",
    settings={"learning_rate": 1e-5, "steps": "b | c\nd"},
    measured=[{"score": "verbatim memory", "before": 0.91, "after": 0.1}, {"score": "utility", "before": 0.6}],
)


def test_front_matter_and_tables_and_without_a_card_nothing_is_claimed(source):
    text = readme(CARD, Checkpoint(source, {"_name_or_path": "org/base"}, (), {}), "3 of 9 tensors differ.")
    _, front, body = text.split("---\n", 2)
    want = ['license: "apache-2.0"', 'library_name: "transformers"', 'pipeline_tag: "text-generation"']
    assert front.splitlines() == [*want, 'base_model: "org/base"', 'tags: ["unlearning", "trace_jax"]']
    lines = ["The model was made to forget the presidents.", "Method: trace, by trace_jax.", "3 of 9 tensors differ."]
    lines += ["| learning_rate | 1e-05 |", "| steps | b \\| c d |"]
    lines += ["| score | before | after |", "| verbatim memory | 0.91 | 0.1 |"]
    assert set(lines) <= set(body.splitlines())
    text = readme(None, None, "An unchanged re-export.")
    assert "An unchanged re-export." in text and "unlearn" not in text.lower()


def test_the_licence_fields_are_those_of_the_front_matter(tmp_path):
    assert licence_of(tmp_path) == {}
    fields = {"license": "other", "license_name": "x y", "license_link": "https://a.b/c"}
    front = "---\nlicense: other\nlicense_name: 'x y'\nlicense_link: https://a.b/c\n"
    for text, want in (("# license: mit\n", {}), (front, {}), (f"{front}---\n", fields)):  # the second is never closed
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == want


def test_the_base_model_is_named_as_well_as_can_be():
    cached = Path("/cache/models--allenai--OLMoE-1B-7B-0924/snapshots/abc")
    assert base_model_of(cached, {}) == "allenai/OLMoE-1B-7B-0924"
    assert base_model_of(Path("/data/mine"), {"_name_or_path": "org/base"}) == "org/base"
    assert base_model_of(Path("/data/mine"), {}) == "mine"
