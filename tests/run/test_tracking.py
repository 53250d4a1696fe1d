"""Trackers: what they were sent is read back from their own files; with a broken one, a run goes on."""

import contextlib
import json
import shutil
import sqlite3
import struct
import threading

import pytest

from tests.run.toy import experiment
from tests.unlearning.conftest import Stop
from tests.unlearning.test_loop import fresh, placed, step_until
from trace_jax.config import ConfigError, resolve
from trace_jax.io import tracking
from trace_jax.io.tracking import Tracker, TrackingConfig
from trace_jax.run.check import dry_run
from trace_jax.run.methods import run
from trace_jax.unlearning.loop import Hook, Loop
from trace_jax.unlearning.metrics import front_rows, step_rows

ALL = {"tensorboard": True, "wandb": True, "trackio": True}


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory):
    """Where W&B and trackio keep what they are given; both read their variables once in a process."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": folder, "TRACKIO_DIR": folder / "trackio"}.items():
            patch.setenv(name, str(value))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


# --- readers


def events(directory):
    """{(tag, step): [value, ...]} of scalars and texts as TensorBoard shows them: a start purges what it comes to."""
    from tensorboardX.proto import event_pb2

    found = {}
    for file in sorted(directory.iterdir(), key=lambda file: file.name):
        data = file.read_bytes()
        while data:  # length u64, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log"):
                found = {key: values for key, values in found.items() if key[1] < event.step}
            for value in event.summary.value:
                kept = value.tensor.string_val[0].decode() if value.HasField("tensor") else value.simple_value
                found.setdefault((value.tag, event.step), []).append(kept)
    return found


def wandb_records(directory):
    """Records of a W&B file: after a header of 7 bytes a log of LevelDB, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = directory.glob("*.wandb")
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def wandb_history(store):
    """(settings by run id, {(name, step): [value, ...]}, names of artifacts) of all offline runs."""
    settings, found, artifacts = {}, {}, []
    for directory in sorted((store / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns):
        for record in wandb_records(directory):
            if record.HasField("run"):
                update = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                settings[record.run.run_id] = update | {"group": record.run.run_group, "name": record.run.display_name}
            artifacts += [record.artifact.name] * record.HasField("artifact")
            row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in row.keys() - {"step"}:
                found.setdefault((name, row["step"]), []).append(row[name])
    return settings, found, artifacts


def trackio_history(store, project):
    """The same of a project's data base."""
    with contextlib.closing(sqlite3.connect(store / "trackio" / f"{project}.db")) as base:
        settings = {name: json.loads(text) for name, text in base.execute("select run_name, config from configs")}
        rows = base.execute("select step, metrics from metrics order by id").fetchall()
        artifacts = [name for (name,) in base.execute("select name from artifacts")]
    found = {}
    for step, text in rows:
        for name, value in json.loads(text).items():
            found.setdefault((name, step), []).append(value)
    return settings, found, artifacts


# --- what they are sent


def tracked_loop(path, config=ALL, stop=None, evaluate=lambda step, _: [{"split": "test", "name": "w", "value": step}]):
    directory = path / "methods" / "uniform"
    loop = Loop(directory, "a", steps=10, checkpoint_every=3, title="test", evaluation=Hook(4, evaluate))
    with Tracker(resolve(TrackingConfig, config), directory, project="loops", settings={}) as loop.tracker:
        return loop.run(fresh, placed, step_until(stop=stop))


def test_a_continued_run_goes_on_in_the_same_place_without_a_step_twice(tmp_path, stores):
    """Stopped in step 6, after the state of step 3 was saved: steps 4 and 5, and the evaluation at 4, come again."""
    with pytest.raises(Stop):
        tracked_loop(tmp_path / "cut", stop=5)
    tracked_loop(tmp_path / "cut")
    rows = step_rows(tmp_path / "cut/methods/uniform")
    expected = {("train/loss", row["step"]): [row["loss"]] for row in rows}
    expected |= {("eval/test/w", step): [step] for step in (0, 4, 8, 10)}
    assert len(rows) == 10
    settings, of_wandb, _ = wandb_history(stores)
    assert len(settings) == 1 and len(list((stores / "wandb").glob("offline-run-*"))) == 2
    names, of_trackio, _ = trackio_history(stores, "loops")
    assert len(names) == 1
    for found in (of_wandb, of_trackio, events(tmp_path / "cut/tensorboard/uniform")):
        assert {key: found[key] for key in expected} == expected
        assert sum(name == "train/loss" for name, _ in found) == 10


def test_a_run_is_shown_with_its_settings_its_evaluations_and_its_report(data, finished, tmp_path, stores):
    path = shutil.copytree(finished[0], tmp_path / "shown")
    for _ in range(2):  # nothing is sent twice
        run(experiment(data, methods=["uniform"], unlearning={"alpha": 2.0}, tracking=ALL), path)
    steps = step_rows(path / "methods/uniform")
    fronts = front_rows(path / "methods/uniform")
    expected = {
        (f"train/{name}", 3): [steps[2][name]] for name in ("forget_loss", "learning_rate", "tokens_per_second")
    }
    for row in fronts:
        expected |= {(f"eval/{m['split']}/{m['name']}", row["step"]): [m["value"]] for m in row["evaluation"]}
    assert len(expected) > 30
    settings, of_wandb, artifacts = wandb_history(stores)
    named, of_trackio, of_project = trackio_history(stores, "toy")
    assert artifacts == of_project == ["shown-report"] and len(named) == 1
    [(name, one)] = named.items()
    other = settings[name.removeprefix("shown/uniform-")]
    assert (other["name"], other["group"], one["_Group"]) == ("shown/uniform", "shown", "shown")
    for shown in (one, other):
        assert shown["unlearning"]["alpha"] == 2.0 and shown["environment"]["packages"]["jax"] and shown["seed"] == 0
    of_tensorboard = events(path / "tensorboard/uniform")
    for found in (of_wandb, of_trackio, of_tensorboard):
        assert {key: found[key] for key in expected} == {key: pytest.approx(value) for key, value in expected.items()}
    texts = {name: value for (name, _), [value] in of_tensorboard.items() if isinstance(value, str)}
    assert '"alpha": 2.0' in texts["settings/text_summary"] and "trace_rows" not in texts["report/text_summary"]
    assert "target model" in texts["report/text_summary"]


# --- what can go wrong


class Broken:
    """A tracker that raises, or never returns, from the moment that `fails` names."""

    package, purges, hold = "broken", True, threading.Event()

    def __init__(self, *_):
        self.fail("start")

    def log(self, step, values):
        self.fail("middle") if step == 5 else None

    def close(self):
        self.fail("end")

    def fail(self, moment):
        if moment == self.fails:
            raise OSError(f"no network at the {moment}")
        if self.fails == "never":
            self.hold.wait()


def test_a_tracker_that_fails_or_is_slow_ends_no_run_and_says_so_once(tmp_path, monkeypatch, capsys):
    kinds = {fails: type(fails, (Broken,), {"fails": fails}) for fails in ("start", "middle", "end", "never")}
    monkeypatch.setattr(tracking, "_BACKENDS", kinds)
    monkeypatch.setattr(tracking, "_PATIENCE", 0.5)
    monkeypatch.setattr(TrackingConfig, "chosen", property(lambda _: tuple(kinds)))
    assert tracked_loop(tmp_path, {}).step == 10
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking")]
    Broken.hold.set()
    failed = "tracking with {0} failed, and the run goes on without it (OSError: no network at the {0})"
    slow = "tracking with never is slow; the run does not wait for it any longer"
    assert sorted(said) == sorted([*map(failed.format, ("start", "middle", "end")), slow])


def test_a_missing_package_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "version_of", lambda package: None if package == "wandb" else "1")
    config = experiment(data, tracking={"wandb": True, "tensorboard": True})
    with pytest.raises(ConfigError, match=r"tracking.wandb is on, .* not installed: pip install wandb"):
        run(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert any("pip install wandb" in line for line in dry_run(config)[1])
