"""The notebook of the diagnosis: on generated routing, on files of a server, and on a checkpoint with its texts."""

import json

import pytest

NAME = "is_there_anything_to_calibrate"


def test_it_runs_and_tells_two_texts_from_one(printed, tmp_path):
    assert "present: Calibrate" in printed(NAME)
    captures = {name: str(tmp_path / "generated_retain.npz") for name in ("forget_path", "retain_path")}
    assert "absent: Use uniform weights." in printed(NAME, source="captures", **captures)
    assert json.loads((tmp_path / "diagnosis.json").read_text())["verdict"] == "absent"


def test_it_routes_texts_by_a_checkpoint(printed, data, tmp_path):
    pytest.importorskip("torch", reason="transformers makes the checkpoint of this test with it")
    from tests.run.toy import save_checkpoint

    texts = {f"{name}_path": str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    said = printed(NAME, source="checkpoint", checkpoint=str(save_checkpoint(tmp_path / "model")), **texts)
    assert "undecided: Record more rows of both texts" in said and "fewer than 8 rows" in said
