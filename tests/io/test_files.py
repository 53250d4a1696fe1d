"""Dataclasses go to JSON and come back as they were; files are whole or absent."""

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest

from trace_jax.io.files import append_line, decode, encode, read_json, read_lines, replacing, write_json


@dataclasses.dataclass(frozen=True)
class Stored:
    value: float
    array: np.ndarray
    pairs: tuple[tuple[float, float], ...]
    by_name: Mapping[str, np.ndarray]
    name: str = ""
    flag: bool | None = None


def test_what_is_written_is_read_back():
    array = np.array([[0.5, math.nan], [math.inf, 2.0]])
    stored = Stored(math.nan, array, ((1, 0.25), (2, math.nan)), {"a": np.arange(3)}, name="x")
    back = decode(Stored, json.loads(json.dumps(encode(stored), allow_nan=False)))
    assert (back.name, back.flag, back.pairs[0]) == ("x", None, (1, 0.25))
    assert math.isnan(back.value) and math.isnan(back.pairs[1][1])
    np.testing.assert_array_equal(back.array, [[0.5, math.nan], [math.nan, 2.0]])
    assert back.by_name["a"].dtype == np.int64 and back.by_name["a"].tolist() == [0, 1, 2]


def test_numbers_may_be_shortened():
    assert encode({"x": np.float64(0.123456789), "n": 123456789}, digits=3) == {"x": 0.123, "n": 123456789}


@pytest.mark.parametrize("change, name", [({"valu": 1.0}, "valu"), ({}, "by_name")])
def test_fields_that_do_not_fit_are_named(change, name):
    with pytest.raises(ValueError, match=rf"not a Stored: .*'{name}'"):
        decode(Stored, {"value": 1.0, "array": [], "pairs": []} | change)


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
