"""Files are whole or absent and dataclasses come back from JSON, on disk and at gs:// addresses; so data and runs are.

Against an object store in memory that answers fsspec, and over HTTP TensorStore, which writes states.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping

import fsspec
import numpy as np
import pytest
from orbax.checkpoint._src.path import gcs_utils

from tests.run.gcs import Bucket, for_other_processes, serve
from tests.run.toy import experiment, numbers
from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError
from trace_jax.data.sources import DataError, read_source
from trace_jax.io import files, lock
from trace_jax.io.files import append_line, as_path, decode, encode, flush_lines, read_json, read_lines, write_json
from trace_jax.run.export import export
from trace_jax.run.methods import run
from trace_jax.unlearning.loop import Loop


@pytest.fixture
def bucket(monkeypatch):
    from etils.epath import backend, gpath

    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda name: Bucket)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)  # asks Google's own package
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    serve()
    for held in (Bucket.store, Bucket.writes, files._PENDING):
        held.clear()
    Bucket.pseudo_dirs[:] = [""]
    yield "gs://bucket"
    files._PENDING.clear()


@pytest.mark.parametrize("remote", [False, True])
def test_files_are_written_whole_and_read_back(bucket, tmp_path, remote):
    place = as_path(bucket if remote else tmp_path) / "run"
    write_json(place / "a.json", {"x": 1})
    with pytest.raises(RuntimeError), files.replacing(place / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(place / "a.json") == {"x": 1} and read_json(place / "absent.json") is None
    assert [file.name for file in place.iterdir()] == ["a.json"]
    files.write_arrays(place / "a.npz", {"x": np.arange(3)})
    with pytest.raises(TypeError, match=r"a\.npz: \['y'\] hold Python objects"):
        files.write_arrays(place / "a.npz", {"x": np.arange(2), "y": np.array([{}])})
    assert {name: array.tolist() for name, array in files.read_arrays(place / "a.npz").items()} == {"x": [0, 1, 2]}
    with files.local_copy(place / "a.json") as local:
        assert json.loads(local.read_text()) == {"x": 1}
    assert local.exists() == (not remote) and (files.free_bytes(place) == math.inf) == remote
    assert files.shown(place) == ("gs://bucket/run" if remote else str(place))
    (place / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(place / "a.json")
    files.remove(place)
    assert not (place / "a.json").exists() and not Bucket.store


GCSFS = """
import fsspec
from trace_jax.io import files
path = files.as_path("gs://bucket/run")
files.write_json(path / "a.json", {"a": 1})
print([file.name for file in path.iterdir()], files.read_json(path / "a.json"), path.is_dir())
other = fsspec.filesystem("gcs", skip_instance_cache=True)  # as another process sees the store
other.pipe({"bucket/run/a.json": b'{"a": 123456789}', "bucket/run/b.json": b"[]"})
print(files.read_json(path / "a.json"), files.read_json(path / "b.json"), [file.name for file in path.iterdir()])
files.remove(path)
print(path.exists())
"""


def test_gcsfs_sees_what_another_process_has_just_written(bucket):
    """It keeps lists of objects with their sizes, and reads no further than those say."""
    environment = {**os.environ, **for_other_processes()}
    told = subprocess.run([sys.executable, "-c", GCSFS], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    first, second, third = told.stdout.splitlines()
    assert (first, third) == ("['a.json'] {'a': 1} True", "False") and not Bucket.store
    assert second == "{'a': 123456789} [] ['a.json', 'b.json']"


def test_a_last_line_cut_short_is_dropped(tmp_path):
    append_line(tmp_path / "m.jsonl", {"step": 1})
    append_line(tmp_path / "m.jsonl", {"step": 2})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3})[:-4])
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]


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


def test_lines_are_gathered_because_objects_can_not_be_extended(bucket, monkeypatch):
    path = f"{bucket}/m.jsonl"
    for step in range(50):
        append_line(path, {"step": step})
    assert Bucket.writes == []
    flush_lines()
    flush_lines()
    append_line(path, {"step": 50})
    assert Bucket.writes == ["/bucket/m.jsonl"]
    assert [row["step"] for row in read_lines(path)] == list(range(51))
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_WRITES", 0.0)
    append_line(path, {"step": 51})
    assert Bucket.writes == ["/bucket/m.jsonl"] * 3
    files._PENDING.clear()  # another process continues the file
    append_line(path, {"step": 52})
    assert len(read_lines(path)) == 53


def test_text_is_read_from_a_file_or_a_directory(bucket):
    for name, text in (("b.txt", "Second."), ("a.jsonl", '{"text": "First."}\n'), ("c.csv", "no")):
        (as_path(bucket) / "data" / name).write_text(text)
    assert [d.text for d in read_source(f"{bucket}/data")[0]] == ["First.", "Second."]
    assert read_source(f"{bucket}/data/b.txt")[0][0].origin == "gs://bucket/data/b.txt:1"
    with pytest.raises(DataError, match=r"gs://bucket/data/d\.txt: there is no such file"):
        read_source(f"{bucket}/data/d.txt")


def test_a_run_at_an_address_equals_the_one_on_disk_and_continues(
    bucket, data, finished, tmp_path, monkeypatch, capsys
):
    """States, statistics, weights and results; cut off in the middle of unlearning."""
    config, (here, _), log = experiment(data), finished, Loop._log

    def cut_off(loop, pending):
        if pending is not None and pending[0] == 5 and "unlearning with trace_rows" in loop.title:
            raise KeyboardInterrupt
        return log(loop, pending)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loop, "_log", cut_off)
        run(config, f"{bucket}/runs/a")
    address = as_path(f"{bucket}/runs/a")
    assert (address / "methods/trace_rows/checkpoints/4/commit_success.txt").exists()
    capsys.readouterr()
    text = str(run(config, address))
    assert "unlearning with trace_rows: continuing after step 4 of 6" in capsys.readouterr().err
    assert "report: gs://bucket/runs/a/report.html" in text
    assert numbers(address) == numbers(here)
    assert "<html" in (address / "report.html").read_text()
    names = {name.removeprefix("/bucket/runs/a/") for name in Bucket.store}
    assert names == {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()}
    (address / "methods" / "trace_rows" / "unlearning.stage.json").unlink()
    Bucket.writes.clear()
    capsys.readouterr()
    assert str(run(config, address)) == text
    assert "target model: already done" in capsys.readouterr().err
    assert not any("target/" in name for name in Bucket.writes)
    assert export(address, tmp_path / "out", method="trace_rows") == tmp_path / "out"
    with pytest.raises(ConfigError, match=r"export --workdir gs://bucket/runs/b --output DIR"):
        run(experiment(data, export="trace_rows", methods=["trace_rows"]), f"{bucket}/runs/b")


def test_what_can_not_be_used_is_refused_with_what_to_do(bucket, monkeypatch):
    for address in ("s3://b/x", "gs://"):
        with pytest.raises(ConfigError, match=f"{address}: expected a local path, or an address gs://BUCKET/NAME"):
            as_path(address)
    for read in (open_checkpoint, lambda path: PretrainedConfig(path=path).identity()):
        with pytest.raises(CheckpointError, match=r"gcloud storage cp -r gs://bucket/olmoe DIRECTORY"):
            read("gs://bucket/olmoe")

    def missing(name):
        raise ImportError

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        as_path("gs://bucket/x")
