"""The whole run on a real layout: from a checkpoint and two files to a checkpoint that transformers loads."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.run.toy import SMALL, VOCABULARY, save_checkpoint
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError, fingerprint
from trace_jax.io.files import read_json, write_json
from trace_jax.main import main
from trace_jax.models.decoder import forward
from trace_jax.run.directory import calibration_directory
from trace_jax.run.experiment import load_config
from trace_jax.run.export import export, find_model, load_model
from trace_jax.run.methods import run


def settings(checkpoint, data):
    files = {f"data.{name}": str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    return SMALL | {"model.path": str(checkpoint)} | files


def command(checkpoint, data, path):
    overrides = [f"--config.{name}={value}" for name, value in settings(checkpoint, data).items()]
    return main(["--config", "configs/huggingface.py", "--workdir", str(path), *overrides])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Layers without experts, experts that all tokens share; padding that is an end."""
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    directory = save_checkpoint(tmp_path_factory.mktemp("deepseek_v3"), "deepseek_v3", **marks)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe original.\n")
    return directory


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    """The checkpoint's run by the config file's command."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert command(checkpoint, data, path) == 0
    return path


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_export_is_the_unlearned_model_and_only_what_trained_differs(finished, checkpoint):
    config, label, _ = find_model(finished, None)
    unlearned = load_model(config, finished, label)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (3, 20))
    ours = forward(unlearned.params, unlearned.config, jnp.asarray(tokens, jnp.int32)).logits
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "export", **how)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)
    before, after = tensors(checkpoint), tensors(finished / "export")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert before.keys() == after.keys()
    assert changed and all("down_proj" in name and "shared" not in name for name in changed)
    results = read_json(finished / "methods/trace_rows/results.json")
    trained = {row["path"] for row in results["trained"] if row["trained"]}
    assert tensors(finished / "methods/trace_rows").keys() == trained
    assert not list(finished.rglob("checkpoints")), "training states are of no use after the end"


def test_the_card_says_what_was_done_and_not_what_was_forgotten(finished, data, checkpoint):
    card = (finished / "export" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and "forget.jsonl" in card and "12 documents" in card
    assert "trace_rows" in card and "forget probability ratio" in card and "[" in card
    text = json.loads((data / "forget.jsonl").read_text().split("\n")[0])["text"]
    assert text[:40] not in card and str(data) not in card and str(checkpoint.parent) not in card


def test_statistics_and_certificate_name_the_layers_of_the_network(finished, checkpoint):
    config = load_pretrained(checkpoint).config
    results = read_json(finished / "methods/trace_rows/results.json")
    assert results["routing"]["layers"] == list(config.moe_layers)
    assert len(results["routing"]["expert_drift"]) == len(config.moe_layers)
    layers = set(read_json(calibration_directory(finished, "trace_rows") / "calibration.json")["certificate"]["layer"])
    assert layers <= set(config.moe_layers)
    assert "Expert activation" in (finished / "report.html").read_text()


def test_the_export_command_writes_the_same_and_never_over_something(finished, tmp_path, capsys):
    arguments = ["export", "--workdir", str(finished), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    for name in ("model.safetensors", "README.md", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "export" / name).read_bytes()
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert main([*arguments, "--method=rmu"]) == 2 and "--method=trace_rows" in capsys.readouterr().err


def test_a_finished_run_is_kept_and_a_lost_export_is_written_again(finished, checkpoint, data):
    config = load_config("configs/huggingface.py", settings(checkpoint, data))
    model = finished / "methods/trace_rows/model.safetensors"
    before, exported = model.stat().st_mtime_ns, tensors(finished / "export")
    shutil.rmtree(finished / "export")
    assert "export: " in str(run(config, finished))
    assert model.stat().st_mtime_ns == before
    assert all((exported[name] == tensor).all() for name, tensor in tensors(finished / "export").items())


def test_a_run_is_told_by_what_is_in_its_checkpoint_and_not_by_where_it_lies(finished, checkpoint, data, tmp_path):
    """Other weights of the same shapes are another model, even if but one expert differs."""
    moved = shutil.copytree(checkpoint, tmp_path / "copy")
    identity = read_json(finished / "config.json")["identity"]
    same = load_config("configs/huggingface.py", settings(moved, data))
    assert same.identity() == identity
    tensors_of = tensors(moved)
    name = next(name for name in sorted(tensors_of) if "down_proj" in name and "shared" not in name)
    tensors_of[name][-1] += 1
    for file in moved.glob("*.safetensors"):
        file.unlink()
    save_file(tensors_of, moved / "model.safetensors", {"format": "pt"})
    assert same.identity() != identity
    with pytest.raises(ConfigError, match=r"holds a run of another configuration .*--overwrite"):
        run(same, finished)


def test_a_run_is_exported_if_its_checkpoint_is_the_same_however_its_settings_were_spelled_then(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    saved = read_json(path / "config.json")
    saved["config"]["data"]["forget_substances"] = None  # of another benchmark, as files of earlier runs have it
    saved["identity"] = fingerprint(saved["config"]["data"], find_model(finished, None)[0].model.identity())
    write_json(path / "config.json", saved)
    assert find_model(path, None)[1] == "trace_rows"
    write_json(path / "config.json", {**saved, "identity": "other"})
    with pytest.raises(ConfigError, match="the checkpoint that this run started from has changed"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_can_not_be_used_is_refused_before_anything_is_written(checkpoint, data, tmp_path, capsys):
    moved = shutil.copytree(checkpoint, tmp_path / "copy")
    (moved / "tokenizer.json").unlink()
    assert command(moved, data, tmp_path / "run") == 2
    assert re.search(r"tokenizer\.json is missing.*AutoTokenizer.*save_pretrained", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_said_before_the_work_begins(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("trace_jax.run.prepare.free_bytes", lambda _: 1000)
    message = r"0\.0 GiB are free there; this run needs .* GiB \(export 0\.0, trace_rows 0\.0, states"
    with pytest.raises(ConfigError, match=message):
        run(load_config("configs/huggingface.py", settings(checkpoint, data)), tmp_path / "run")
