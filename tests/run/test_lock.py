"""One run at a time: a second process is refused and told who is there; a crash lets go, on disk and at an address."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.run.test_files import bucket as bucket
from trace_jax.config import ConfigError
from trace_jax.io import lock
from trace_jax.io.files import as_path, read_json, remove, write_json
from trace_jax.io.lock import LOCK, locked

HOLD = """import sys, time
from trace_jax.io.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(path):
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_is_there_and_a_crash_lets_go(tmp_path):
    with holder(tmp_path / "run") as first:
        with pytest.raises(ConfigError, match=rf"run: process {first.pid} on .* works there since .*Wait for it"):
            locked(tmp_path / "run").__enter__()
        first.kill()
        first.wait()
        assert (tmp_path / "run" / LOCK).exists()
        with locked(tmp_path / "run"):
            assert read_json(tmp_path / "run" / LOCK)["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_what_killed_writers_left_goes_with_the_next_lock(tmp_path):
    (tmp_path / "methods" / ".export.12.old").mkdir(parents=True)
    for name in (".model.12.tmp.safetensors", ".a.b.12.old.json", ".hidden.json", "methods/.export.12.old/kept"):
        (tmp_path / name).touch()
    (tmp_path / ".c.12.old.json").touch()
    (tmp_path / "c.json").write_text("new")
    with locked(tmp_path):
        pass
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".hidden.json", "a.b.json", "c.json", "methods/export/kept"]
    assert (tmp_path / "c.json").read_text() == "new"


def test_where_nothing_can_be_locked_nothing_is_swept_up(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    (tmp_path / ".model.12.tmp.safetensors").touch()
    with locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".model.12.tmp.safetensors"]
    assert "can't be locked (No locks available)" in capsys.readouterr().err


def test_within_a_process_it_is_one_at_a_time_too(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(lock, "_SETTLED", 0.02)


@pytest.mark.usefixtures("quick")
def test_at_an_address_signs_of_life_tell_a_holder_from_what_a_crash_left(bucket):
    path = as_path(f"{bucket}/run")
    with locked(path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            locked(path).__enter__()
        time.sleep(0.25)
        assert read_json(path / LOCK)["beats"] >= 2
    assert not (path / LOCK).exists()
    write_json(path / LOCK, {"pid": 7, "host": "of-a-crash"})
    with locked(path):
        assert read_json(path / LOCK)["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_at_an_address_who_loses_the_lock_stops(bucket, monkeypatch, capsys):
    """Two that start at once see no lock; the last to write has it. A holder that was asleep finds another's."""
    path, asked = as_path(f"{bucket}/run"), threading.Event()
    monkeypatch.setattr(lock.os, "kill", lambda pid, number: asked.set() if number == signal.SIGTERM else None)
    with locked(path):
        write_json(path / LOCK, {"pid": 8, "host": "elsewhere", "token": "another"})
        assert asked.wait(5)
    assert "process 8 on elsewhere has taken it; this run stops" in capsys.readouterr().err
    assert read_json(path / LOCK)["pid"] == 8, "not ours to remove"
    remove(path / LOCK)
    writes = threading.Timer(0.01, write_json, (path / LOCK, {"pid": 9, "host": "elsewhere"}))
    monkeypatch.setattr(lock, "_SETTLED", 0.1)
    writes.start()
    with pytest.raises(ConfigError, match="process 9 on elsewhere"):
        locked(path).__enter__()
