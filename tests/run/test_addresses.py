"""Data and runs at gs:// addresses, against a bucket in memory (but for states: Orbax speaks to Google itself)."""

import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.run.toy import experiment, numbers
from trace_jax.checkpoints import state
from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError
from trace_jax.data.sources import DataError, read_source
from trace_jax.io import files
from trace_jax.io.files import append_line, as_path, flush_lines, read_json, read_lines, replacing, write_json
from trace_jax.run.export import export_run
from trace_jax.run.methods import run


class Bucket(MemoryFileSystem):
    """gs:// in memory. It counts how often each object is written, which an object store limits and charges."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs, writes = {}, [""], []
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("gs://", "/", 1))

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode, "objects can't be extended"
        if "w" in mode:
            self.writes.append(path)
        return super()._open(path, mode=mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    from etils.epath import backend, gpath

    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda name: Bucket)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    for held in (Bucket.store, Bucket.writes, files._PENDING):
        held.clear()
    Bucket.pseudo_dirs[:] = [""]
    yield "gs://bucket"
    files._PENDING.clear()


def test_small_files_are_written_whole_and_read_back(bucket):
    write_json(f"{bucket}/run/a.json", {"x": 1})
    assert read_json(f"{bucket}/run/a.json") == {"x": 1}
    assert read_json(as_path(bucket) / "run" / "absent.json") is None
    with pytest.raises(RuntimeError), replacing(f"{bucket}/run/a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(Bucket.store) == ["/bucket/run/a.json"] and read_json(f"{bucket}/run/a.json") == {"x": 1}
    with files.local_copy(f"{bucket}/run/a.json") as local:
        assert json.loads(local.read_text()) == {"x": 1}
    assert not local.exists()
    assert files.shown(as_path(bucket) / "run") == "gs://bucket/run"
    assert files.free_bytes(f"{bucket}/run") == float("inf")
    files.remove(f"{bucket}/run")
    assert not Bucket.store


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
    config, (here, _), manager = experiment(data), finished, state._Manager

    def on_disk(directory, **more):
        assert str(directory).startswith("gs://bucket/runs/a/")
        local = tmp_path / str(directory).removeprefix("gs://")
        local.mkdir(parents=True, exist_ok=True)
        return manager(local, **more)

    monkeypatch.setattr(state, "_Manager", on_disk)
    text = run(config, f"{bucket}/runs/a")
    assert "report: gs://bucket/runs/a/report.html" in text
    address = as_path(f"{bucket}/runs/a")
    assert numbers(address) == numbers(here)
    assert "<html" in (address / "report.html").read_text()
    names = {name.removeprefix("/bucket/runs/a/") for name in Bucket.store}
    assert names == {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()}
    (address / "methods" / "trace_rows" / "unlearning.stage.json").unlink()
    Bucket.writes.clear()
    capsys.readouterr()
    assert run(config, address) == text
    assert "target model: already done" in capsys.readouterr().err
    assert not any("target/" in name for name in Bucket.writes)
    assert export_run(address, tmp_path / "out", label="trace_rows").endswith(str(tmp_path / "out"))
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
    with pytest.raises(ConfigError, match=r"pip install 'trace-jax\[gcs\]'"):
        as_path("gs://bucket/x")
