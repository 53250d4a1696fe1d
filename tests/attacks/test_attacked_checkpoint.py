"""Every attack on an imported model in bfloat16, with dense layers, shared experts and a correction of its routers."""

import math

from tests.run.toy import SMALL, save_checkpoint
from trace_jax.io.files import read_json
from trace_jax.main import main

ATTACKS = {
    "relearning": {"steps": [2], "batch_size": 2, "share": 0.3},
    "benign_relearning": {"steps": [1], "batch_size": 2},
    "quantization": {"bits": [4]},
    "router_swap": {},
    "expert_forcing": {},
    "prompting": {"examples": [1], "prefixes": [0.5]},
}
MARKS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SETTINGS = {**SMALL, "model.dtype": "bfloat16", "methods": ("uniform",), "export": None, "attacks": ATTACKS}
EVALUATION = {"max_rows": 4, "max_prompts": 2, "max_members": 4, "patching": True}
SETTINGS |= {f"evaluation.{name}": value for name, value in EVALUATION.items()}


def test_an_imported_model_is_attacked_in_every_way(data, tmp_path, monkeypatch, request):
    """The checkpoint stands for the retrained model too."""
    monkeypatch.chdir(request.config.rootpath)
    checkpoint = save_checkpoint(tmp_path / "model", "deepseek_v3", max_position_embeddings=128, **MARKS)
    files = {f"data.{name}": str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    overrides = {**SETTINGS, "model.path": str(checkpoint), "model.retrained": str(checkpoint), **files}
    arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
    assert main(["--config", "configs/huggingface.py", "--workdir", str(tmp_path / "run"), *arguments]) == 0
    result = read_json(tmp_path / "run/results.json")["methods"]["uniform"]
    put = {row["name"] for row in result["patching"]["models"]}  # only down projections trained
    assert {"1 critical", "all experts", "shared and dense MLPs"} <= put and not put & {"attention", "routers"}
    result = result["attacks"]
    assert set(result) == set(ATTACKS)
    for attack in result.values():
        assert attack["points"] and attack["strongest"] is not None and not attack["failed"]
        for point in attack["points"]:
            assert all(math.isfinite(m["value"]) and m["n"] > 0 for m in point["measurements"])
    # The control is the checkpoint itself: it is trained as the unlearned model is, and measured beside it.
    assert all(result[name]["points"][0]["retrained"] for name in ("relearning", "benign_relearning"))
    assert [p["at"] for p in result["prompting"]["points"]] == ["1 example", "half of the text"]
