"""A run directory belongs to one corpus and model; a stage is kept exactly as long as its settings stay."""

from pathlib import Path

import pytest

from tests.two_processes import JOIN, run_processes
from trace_jax.config import ConfigError, resolve
from trace_jax.io.files import read_json, replacing, run_stage, write_json
from trace_jax.run.directory import check_files, check_workdir, open_workdir
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import find_model


def experiment(**values):
    return resolve(ExperimentConfig, {"name": "x", **values})


def test_a_model_is_found_whatever_the_settings_of_unlearning_were_called_then(tmp_path):
    """Settings of the run's method are not read again; those of data and model are."""
    open_workdir(experiment(), tmp_path)
    saved = read_json(tmp_path / "config.json")
    saved["config"]["unlearning"] = {"objective": "npo", "beta": 0.1, "lora_rank": None, "keep_forgetting": None}
    write_json(tmp_path / "config.json", saved)
    write_json(tmp_path / "methods" / "uniform" / "results.json", {})
    write_json(tmp_path / "methods" / "uniform" / "unlearning.stage.json", {"identity": "a", "files": {}})
    config, *found = find_model(tmp_path, None)
    assert (config.name, *found) == ("x", "uniform", "a")


def test_a_workdir_is_reopened_by_the_same_corpus_and_model_and_refused_to_others_untouched(tmp_path):
    path, other = tmp_path / "run", experiment(model={"num_layers": 3})
    open_workdir(experiment(), path)
    open_workdir(experiment(unlearning={"steps": 5}), path)
    assert read_json(path / "config.json")["config"]["unlearning"]["steps"] == 5
    write_json(path / "results.json", {})
    with pytest.raises(ConfigError, match=r"another configuration \(model.num_layers 2 -> 3\).*--overwrite"):
        open_workdir(other, path)
    assert (path / "results.json").exists()
    open_workdir(other, path, overwrite=True)
    assert not (path / "results.json").exists()


def test_text_is_the_same_however_its_files_are_named(tmp_path, monkeypatch):
    """By full paths, or as it was spelled: a directory that moves with its text is the same run, as one of earlier
    versions is, which know the spelling alone."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")

    def text(*forget):
        return experiment(data={"benchmark": "text", "forget": forget, "retain": str(tmp_path / "a" / "../retain.txt")})

    open_workdir(text("forget.txt", "huggingface:a/b"), tmp_path / "run")
    assert not check_workdir(text(str(tmp_path / "a/forget.txt"), "huggingface:a/b"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert not check_workdir(text("a/forget.txt", "huggingface:a/b"), tmp_path / "run")
    assert not check_workdir(text("forget.txt", "huggingface:a/b"), tmp_path / "run")
    with pytest.raises(ConfigError, match="another configuration"):
        check_workdir(text("a/forget.txt", "a/b"), tmp_path / "run")
    saved = read_json(tmp_path / "run" / "config.json")
    del saved["located"]
    write_json(tmp_path / "run" / "config.json", saved)
    assert not check_workdir(text("forget.txt", "huggingface:a/b"), tmp_path / "run")


def test_a_directory_that_is_no_run_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds no run"):
            open_workdir(experiment(), tmp_path, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file"):
        open_workdir(experiment(), tmp_path / "thesis.txt")


def test_a_full_disk_is_said_before_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("trace_jax.io.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5 << 20}))
    with pytest.raises(ConfigError, match="only 5 MiB are free"):
        open_workdir(experiment(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_runs_once_and_again_only_when_it_failed_or_its_settings_change(tmp_path):
    calls = []
    with pytest.raises(ZeroDivisionError):
        run_stage("count", tmp_path, "a", "counting", lambda: 1 / 0)
    for identity in ("a", "a", "b", "b"):
        run_stage("count", tmp_path, identity, "counting", lambda identity=identity: calls.append(identity))
    assert calls == ["a", "b"]


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b""), Path.unlink, lambda f: f.write_text("made of x!")])
def test_a_stage_whose_files_are_not_as_it_left_them_is_made_anew(tmp_path, damage, capsys):
    file = tmp_path / "stage" / "inside" / "made.txt"

    def make():
        with replacing(file) as temporary:
            temporary.write_text("made of x")

    def stage(load=lambda: "loaded"):
        return run_stage("made", tmp_path / "stage", "x", "making", make, load)

    assert [stage(), stage()] == [None, "loaded"]
    check_files(tmp_path)
    damage(file)
    with pytest.raises(ValueError, match=r"inside/made.txt is not as it was written. Run it again"):
        check_files(tmp_path)
    assert [stage(), stage()] == [None, "loaded"] and file.read_text() == "made of x"
    assert "made.txt is not as it was written, so it is made anew" in capsys.readouterr().err
    (tmp_path / "stage" / "made.stage.json").write_text("{")
    assert [stage(), stage()] == [None, "loaded"]


def test_a_stage_within_a_stage_is_of_both(tmp_path):
    """What the inner one kept from before counts as the outer one's, too."""

    def inner():
        run_stage("inner", tmp_path / "a", "x", "inner", lambda: write_json(tmp_path / "a" / "file.json", 1))

    inner()
    run_stage("outer", tmp_path / "b", "x", "outer", inner)
    digests = read_json(tmp_path / "b" / "outer.stage.json")["files"]
    assert digests.keys() == {"../a/file.json"} and len(digests["../a/file.json"]) == 64


def test_a_configuration_that_is_damaged_is_named_and_replaced_only_when_asked(tmp_path):
    open_workdir(experiment(), tmp_path / "run")
    for content in (b"", b"{}", b"[1]", b"\xff"):
        (tmp_path / "run" / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config.json: is damaged"):
            open_workdir(experiment(), tmp_path / "run")
    (tmp_path / "run" / "left.txt").touch()
    open_workdir(experiment(), tmp_path / "run", overwrite=True)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.json"]


WORKDIR = (
    JOIN
    + """
import functools, sys
from pathlib import Path
from tests.run.test_directory import experiment
from trace_jax.run import directory
from trace_jax.config import ConfigError
from trace_jax.io import files
from trace_jax.io.files import append_line, read_json, remove, write_json
from trace_jax.io.progress import progress, say
directory._SECONDS_TO_SEE = 2.0
index, path = jax.process_index(), Path(sys.argv[1])
try:
    path = directory.open_workdir(experiment(), path)
except ConfigError as error:
    print(f"<{error}>")
    sys.exit()
say(f"from {index}")
with progress("work", 1) as advance:
    advance(1, "")
append_line(path / "lines.jsonl", {"process": index})
stage = functools.partial(files.run_stage, "made", path, "x", "making")
made = stage(lambda: write_json(path / "made.json", index))
print(f"<{made} {read_json(path / 'made.json')}>")
if index == 1:  # what one process alone sees decides nothing
    files.read_json = lambda file: None
print(f"<{stage(lambda: 'made again', lambda: 'loaded')}>")
if index == 1:
    remove(path / "made.json")
"""
)


def test_of_two_processes_one_writes_and_both_take_the_same_way(tmp_path):
    (code, out, err), (other_code, other_out, other_err) = run_processes(WORKDIR, [[tmp_path / "run"]] * 2)
    assert (code, other_code) == (0, 0), err + other_err
    assert out == other_out == ["None 0", "loaded"]
    assert "from 0" in err and "making: already done" in err
    assert "from 1" not in other_err and "making" not in other_err
    files = sorted(f.name for f in (tmp_path / "run").iterdir())
    assert files == ["config.json", "lines.jsonl", "made.json", "made.stage.json"]
    assert (tmp_path / "run" / "lines.jsonl").read_text() == '{"process": 0}\n'


def test_a_workdir_that_one_process_does_not_see_is_refused(tmp_path):
    for code, out, err in run_processes(WORKDIR, [[tmp_path / "of-one-host"], [tmp_path / "of-the-other"]]):
        assert code == 0, err
        assert "not every process sees what process 0 writes there" in out[0]
    assert not (tmp_path / "of-the-other").exists()
