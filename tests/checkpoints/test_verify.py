"""verify says what a checkpoint holds, and its exit code whether transformers computes the same."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trace_jax.checkpoints import verify
from trace_jax.io.progress import byte_size
from trace_jax.main import main
from trace_jax.models.architecture import count_params
from trace_jax.models.families import model_config


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """A copy of OLMoE's checkpoint that a test may change."""
    return shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "copy")


@pytest.fixture
def run(capsys):
    """run(directory, option, ...): exit code and text."""
    return lambda *words: (main(["verify", "--checkpoint", *map(str, words)]), capsys.readouterr().out)


@pytest.mark.parametrize(
    ("model_type", "switch"), [("olmoe", "qk_norm"), ("gpt_oss", "sinks"), ("deepseek_v3", "latent_size")]
)
def test_a_good_checkpoint_passes(model_type, switch, tiny_checkpoint, run):
    directory = tiny_checkpoint(model_type)
    code, text = run(directory)
    tensors = load_file(directory / "model.safetensors")
    total, active = count_params(model_config(json.loads((directory / "config.json").read_text()), dtype="float32"))
    size = byte_size(sum(array.nbytes for array in tensors.values()))
    assert f"{len(tensors)} tensors of 1 file(s): float32 {size}" in text
    assert text.split("total")[1].split()[:2] == [f"{total:,}", f"{active:,}"]
    assert total == sum(array.size for array in tensors.values())
    assert f"\n  {switch} " in text
    assert "none of" in text and "sets differ" in text
    assert text.endswith("PASS\n") and code == 0


def test_what_is_ignored_and_unread_is_said(copy, run):
    file, unread = copy / "model.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(file), unread: np.ones(6, np.float32)}, file, {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "mystery": 3}))
    code, text = run(copy, "--no-compare")
    assert f"1 tensors, such as {unread}: rotary frequencies" in text
    assert "nobody read: mystery" in text and "skipped (--no-compare)" in text and code == 0


def test_another_computation_fails(copy, run, monkeypatch):
    theirs, path = verify._theirs, copy / "config.json"

    def of_changed_config(*arguments):
        path.write_text(json.dumps({**json.loads(path.read_text()), "norm_topk_prob": True}))
        return theirs(*arguments)

    monkeypatch.setattr(verify, "_theirs", of_changed_config)
    code, text = run(copy)
    assert "FAIL: transformers computes something else." in text and code == 1


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (("importlib.util.find_spec", lambda package: None), "torch is not installed"),
        (("trace_jax.checkpoints.verify._available_bytes", lambda: 1000), "KiB of memory, 1000 B are free"),
    ],
)
def test_the_comparison_is_skipped_where_it_cannot_be_made(patch, reason, tiny_checkpoint, run, monkeypatch):
    monkeypatch.setattr(*patch)
    code, text = run(tiny_checkpoint("olmoe"))
    assert "skipped (" in text and reason in text and code == 0
