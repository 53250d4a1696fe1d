"""The texts of the study of a user's own documents."""

import json
import sys

import documents

from trace_jax.run.experiment import load_config


def test_the_three_files_have_texts_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["documents.py", "--output", str(tmp_path)])
    documents.main()
    lines = {p.stem: [json.loads(line) for line in p.read_text("utf-8").splitlines()] for p in tmp_path.iterdir()}
    assert {line["id"].rpartition(".")[0] for line in lines["forget"]} == set(documents.FORGET)
    assert {line["id"].rpartition(".")[0] for line in lines["neighbour"]} == set(documents.NEIGHBOURS)
    texts = [line["text"] for several in lines.values() for line in several]
    assert len(lines["retain"]) > 100 and len(set(texts)) == len(texts)
    data = load_config("configs/documents_study.py").data
    assert {data.forget, data.neighbour, data.retain} == {f"runs/documents/{name}.jsonl" for name in lines}
