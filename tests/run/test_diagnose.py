"""`diagnose`: from captures alone or from a checkpoint and texts, one page and one file, never over something else."""

import json

import numpy as np
import pytest

from tests.run.toy import save_checkpoint
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.main import main

EXPERTS, LENGTHS = 16, np.full(30, 40)


def capture(path, seed, *, shift):
    """30 requests as a server gives them, [tokens, layers, K]; `shift` prefers the last four experts."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(LENGTHS.sum(), 2, EXPERTS))
    scores[..., -4:] += shift
    ids = np.argsort(-scores, axis=2)[..., :3].astype(np.int32)
    np.savez(path, expert_ids=ids, row_lengths=LENGTHS)
    return str(path)


@pytest.fixture
def arguments(tmp_path):
    """arguments(shift): of the command, where forget text differs by this much."""

    def make(shift):
        forget = capture(tmp_path / "forget.npz", 1, shift=shift)
        retain = [capture(tmp_path / f"retain{seed}.npz", seed, shift=0.0) for seed in (2, 3)]
        given = ["--forget", forget, "--retain", *retain, "--num-experts", str(EXPERTS)]
        return ["diagnose", *given, "--output", str(tmp_path / "out")]

    return make


@pytest.mark.parametrize(("shift", "verdict"), [(2.5, "present"), (0.0, "absent")])
def test_captures_are_enough_for_a_verdict(arguments, shift, verdict, tmp_path, capsys):
    assert main(arguments(shift)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"mismatch {verdict}: ") and out.count("\n") <= 40 and str(tmp_path / "out") in out
    saved = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert saved["verdict"] == verdict and saved["tokens"] == {"forget": 1200, "retain": 2400}
    assert np.allclose(np.sum(saved["forget"], axis=1), 3) and saved["rows"] == {"forget": 30, "retain": 60}
    assert np.array(saved["selected"])[:, -4:].all() or verdict == "absent"
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    assert saved["sentence"] in page and page.count("<figure>") >= 5 and "retain3.npz" in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"diagnosis.json", "diagnosis.html"}


def test_mistakes_write_nothing_and_nothing_else_is_replaced(arguments, tmp_path, capsys):
    given = arguments(0.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert main(given) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 2 and "holds no earlier diagnosis" in capsys.readouterr().err
    given[-1] = str(tmp_path / "other")
    assert main([*given, "--num-experts", "9"]) == 2
    assert "forget.npz: token 0 (row 0), layer 0: the experts are" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(given) == 0 == main([*given, "--overwrite"])
    assert main(given) == 2


def test_a_checkpoint_routes_texts_and_counts_alone_are_kept(data, tmp_path, capsys):
    """Few and short texts are in short rows, so that there are enough for a verdict."""
    checkpoint = save_checkpoint(tmp_path / "model", "deepseek_v3")
    texts = (f"--{name}={data / name}.jsonl" for name in ("forget", "retain"))
    given = [*texts, "--checkpoint", str(checkpoint)]
    assert main(["diagnose", *given, "--output", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    config = load_pretrained(checkpoint).config
    assert saved["layers"] == list(config.moe_layers) and saved["top_k"] == config.experts_per_token
    assert np.allclose(np.sum(saved["retain"], axis=1), config.experts_per_token)
    assert min(saved["rows"].values()) >= 24 and "fewer than 8 rows" not in capsys.readouterr().out


def test_every_run_says_it_before_it_trains_and_keeps_counts_of_forget_text(finished):
    path, _ = finished
    saved = json.loads((path / "statistics" / "diagnosis.json").read_text())
    assert saved["sentence"].startswith(saved["verdict"])
    assert "Is there anything to calibrate?" in (path / "report.html").read_text()
    for name, kept in (("forget", False), ("retain", True)):
        with np.load(path / "statistics" / f"{name}.npz") as arrays:
            assert ("indices" in arrays) == kept
            assert np.allclose(saved[name], arrays["counts"] / arrays["tokens"], rtol=1e-5)
