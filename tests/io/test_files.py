"""Dataclasses go to JSON and come back as they were; files are whole or absent."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from trace_jax.io.codec import decode, encode
from trace_jax.io.files import append_line, read_json, read_lines, replacing, write_json


@dataclasses.dataclass(frozen=True)
class Inner:
    value: float
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    array: np.ndarray
    pairs: tuple[tuple[int, float], ...]
    by_name: Mapping[str, Inner]
    listed: Sequence[Inner]
    rest: Inner | None = None
    flag: bool | None = None


def test_what_is_written_is_read_back():
    array, pairs = np.array([[0.5, math.nan], [math.inf, 2.0]]), ((1, 0.25), (2, math.nan))
    outer = Outer(3, array, pairs, {"a": Inner(math.nan)}, [Inner(1.0, "x")], rest=Inner(2.0))
    back = decode(Outer, json.loads(json.dumps(encode(outer), allow_nan=False)))
    assert (back.count, back.rest, back.listed, back.flag) == (3, Inner(2.0), [Inner(1.0, "x")], None)
    np.testing.assert_array_equal(back.array, [[0.5, math.nan], [math.nan, 2.0]])
    assert back.pairs[0] == (1, 0.25) and math.isnan(back.pairs[1][1]) and math.isnan(back.by_name["a"].value)
    outer = dataclasses.replace(outer, array=np.arange(3))
    assert decode(Outer, encode(outer)).array.dtype == np.int64


def test_numbers_may_be_shortened():
    assert encode({"x": np.float64(0.123456789), "n": 123456789}, digits=3) == {"x": 0.123, "n": 123456789}


@pytest.mark.parametrize("change, name", [({"valu": 1.0}, "valu"), ({"value": None}, "value")])
def test_fields_that_do_not_fit_are_named(change, name):
    plain = {k: v for k, v in ({"value": 1.0} | change).items() if v is not None}
    with pytest.raises(ValueError, match=name):
        decode(Inner, plain)


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
