"""Artefacts are whole or absent."""

import json

import pytest

from trace_jax.io.files import append_line, read_json, read_lines, replacing, write_json


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "absent.json") is None


def test_a_last_line_cut_short_is_dropped(tmp_path):
    append_line(tmp_path / "m.jsonl", {"step": 1})
    append_line(tmp_path / "m.jsonl", {"step": 2})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3})[:-4])
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]
