"""Published data sets through TensorFlow Datasets: built whole or not at all, read back as published, no TensorFlow."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
import types
import unittest.mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from tests.data.published_files import COMMIT, download, made_up, write_lines, write_parquet
from trace_jax.data import build as building
from trace_jax.data.build import build
from trace_jax.data.published import PUBLISHED, TEXT
from trace_jax.data.sources import DataError, is_here, part, read_records, read_source, revision_of
from trace_jax.main import main

BOOKS = PUBLISHED["muse_books"]


@pytest.fixture(autouse=True)
def tfds_home(tmp_path, monkeypatch):
    """An empty place for data sets, so that the machine's own is never looked at."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def books(tmp_path):
    """A copy of MUSE-Books' files, and its rows per configuration and split."""
    return str(tmp_path / "copy"), download(tmp_path / "copy", "muse_books", commit=BOOKS.revision)


@pytest.mark.parametrize("name", ["muse_books", "tofu", "wmdp", "wmdp_bio_forget"])
def test_what_is_built_is_what_was_published(tmp_path, monkeypatch, name):
    few = {c: dataclasses.replace(s, rows=dict.fromkeys(s.rows, 7)) for c, s in PUBLISHED[name].subsets.items()}
    monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], subsets=few))
    rows = download(tmp_path / "copy", name, commit=COMMIT)
    build(name, source=str(tmp_path / "copy"))
    for (config, split), expected in rows.items():
        assert read_records(part(f"tfds:{name}", config, split)) == expected
        assert revision_of(f"tfds:{name}/{config}:{split}") == COMMIT


def test_rows_keep_their_order_over_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_ROWS", 300)
    rows = download(tmp_path / "copy", "wmdp")["wmdp-cyber", "test"]
    build("wmdp/wmdp-cyber", source=str(tmp_path / "copy"))
    assert len(list((tmp_path / "tfds/wmdp/wmdp-cyber/1.0.0").glob("*.array_record-*-of-00007"))) == 7
    assert read_records("tfds:wmdp/wmdp-cyber:test") == rows
    assert read_records("tfds:wmdp/wmdp-cyber:test[295:305]") == rows[295:305]


def test_the_record_says_revision_rows_and_files(tfds_home, books):
    text = build("muse_books", source=books[0])
    assert f"muse-bench/MUSE-Books at {BOOKS.revision}) is built in {tfds_home}" in text and "export" not in text
    record = json.loads((tfds_home / "muse_books/raw/1.0.0/published.json").read_text())
    assert record["rows"] == {"forget": 4, "retain1": 12, "retain2": 13, "holdout": 3}
    assert record["revision"] == record["pinned_revision"] == BOOKS.revision
    assert set(record["sha256"]) == {f"raw/{split}-00000-of-00001.parquet" for split in record["rows"]}
    assert json.loads((tfds_home / "muse_books/raw/1.0.0/metadata.json").read_text())["revision"] == BOOKS.revision
    assert sorted(path.name for path in tfds_home.iterdir()) == ["muse_books"]


def test_a_set_that_is_there_is_replaced_whole_and_only_when_asked(tmp_path, tfds_home, books):
    build("muse_books/raw", source=books[0])
    with pytest.raises(DataError, match=r"raw/1\.0\.0: is there already; add --overwrite"):
        build("muse_books", source=books[0])
    shutil.rmtree(tmp_path / "copy/.cache")
    write_parquet(tmp_path / "copy/verbmem/forget", [{"prompt": "p"}] * 100)
    with pytest.raises(DataError, match=r"forget-00000-of-00001\.parquet:1: there is no column gt; the columns are"):
        build("muse_books", source=books[0], overwrite=True)
    assert [path.name for path in (*tfds_home.iterdir(), *tfds_home.glob("muse_books/*"))] == ["muse_books", "raw"]
    assert read_records("tfds:muse_books/raw:forget") == books[1]["raw", "forget"]
    other = {
        "verbmem": [{"prompt": "p", "gt": f"{n}"} for n in range(100)],
        "raw": [{"text": f"{n}"} for n in range(4)],
    }
    for config, rows in other.items():
        write_parquet(tmp_path / f"copy/{config}/forget", rows)
    build("muse_books", source=books[0], overwrite=True)
    assert {config: read_records(f"tfds:muse_books/{config}:forget") for config in other} == other


def test_an_interruption_leaves_nothing(tfds_home, books, monkeypatch):
    results = [unittest.mock.DEFAULT] * (15 + 5) + [KeyboardInterrupt]  # each of 15 splits is counted before
    monkeypatch.setattr(building, "rows", unittest.mock.Mock(wraps=building.rows, side_effect=results))
    with pytest.raises(KeyboardInterrupt):
        build("muse_books", source=books[0])
    assert list(tfds_home.iterdir()) == [] and not is_here("tfds:muse_books/raw:forget")


def test_other_numbers_of_rows_are_refused_until_accepted(tmp_path):
    download(tmp_path / "copy", "wmdp", counts={("wmdp-bio", "test"): 1520})
    message = r"wmdp-bio:test of cais/wmdp has 1,520 rows at revision sha256:\w{16}; expected 1,273, as at 7125571f"
    with pytest.raises(DataError, match=message):
        build("wmdp", source=str(tmp_path / "copy"))
    assert not is_here("tfds:wmdp/wmdp-bio:test")
    text = build("wmdp", source=str(tmp_path / "copy"), accept_counts=True)
    assert f"the pinned revision is {PUBLISHED['wmdp'].revision}" in text
    assert len(read_records("tfds:wmdp/wmdp-bio:test")) == 1520


def test_the_revision_of_a_copy_is_found_or_is_the_hash_of_its_files(tmp_path, books):
    def built(source, **options):
        build("muse_books/raw", source=str(source), overwrite=True, **options)
        return revision_of("tfds:muse_books/raw")

    assert built(books[0]) == BOOKS.revision
    for name in (COMMIT, "bare"):
        download(tmp_path / name, "muse_books")
    assert built(tmp_path / COMMIT) == COMMIT  # as the hub's cache names a snapshot
    first = built(tmp_path / "bare")
    write_parquet(tmp_path / "bare/raw/forget", [{"text": "changed"}] * 4)
    assert first.startswith("sha256:") and first != built(tmp_path / "bare")
    assert built(tmp_path / "bare", revision="mine") == "mine"


def test_a_copy_of_another_revision_or_changed_after_its_download_is_refused(tmp_path, books):
    with pytest.raises(DataError, match=f"is of revision {BOOKS.revision}, and {COMMIT} is given"):
        build("muse_books/raw", source=books[0], revision=COMMIT)
    write_parquet(tmp_path / "copy/raw/forget", [{"text": "changed"}] * 4)
    with pytest.raises(DataError, match=r"forget-00000-of-00001\.parquet: is not what was downloaded; download it aga"):
        build("muse_books/raw", source=books[0])
    note = tmp_path / "copy/.cache/huggingface/download/raw/forget-00000-of-00001.parquet.metadata"
    note.write_text(f"{COMMIT}\n\n")
    with pytest.raises(DataError, match="its files are of several revisions"):
        build("muse_books/raw", source=books[0])
    note.unlink()
    with pytest.raises(DataError, match=r"its files are of several revisions: unknown, 0"):
        build("muse_books/raw", source=books[0])


def test_the_hub_is_asked_for_the_pinned_commit_and_no_more_files_than_needed(books, monkeypatch):
    snapshot = unittest.mock.Mock(return_value=books[0])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    build("muse_books/privleak")
    wanted = snapshot.call_args.kwargs["allow_patterns"]
    snapshot.assert_called_once_with(
        BOOKS.repository, repo_type="dataset", revision=BOOKS.revision, allow_patterns=wanted
    )
    assert "privleak/retain-*-of-*.parquet" in wanted and all("privleak" in pattern for pattern in wanted)
    assert read_records("tfds:muse_books/privleak:retain") == books[1]["privleak", "retain"]


def test_a_branch_is_resolved_to_its_commit(tmp_path, monkeypatch):
    download(tmp_path / "copy", "wmdp")
    info = huggingface_hub.DatasetInfo(id="cais/wmdp", sha=COMMIT, tags=[], downloads=0, likes=0, private=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repository, revision: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "copy"))
    text = build("wmdp/wmdp-chem", revision="main")
    assert revision_of("tfds:wmdp/wmdp-chem:test") == COMMIT and "the pinned revision is 7125571f" in text


def refused(kind, status):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("Access is restricted\nmore", response=response)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wmdp_bio_forget", refused(errors.GatedRepoError, 403), "is gated: ask for access at https://huggingface.co"),
        ("wmdp_bio_forget", refused(errors.HfHubHTTPError, 401), r"authors grant it\), then `hf auth login`\.$"),
        ("wmdp_bio_forget", errors.LocalEntryNotFoundError("offline"), r"\(offline\)\. It is gated: ask for access"),
        ("wmdp", errors.OfflineModeIsEnabled("no"), f"--revision {PUBLISHED['wmdp'].revision} --local-dir DIR; then"),
        ("wmdp", refused(errors.HfHubHTTPError, 500), r"can't be downloaded \(Access is restricted\)"),
    ],
)
def test_without_access_or_connection_the_way_round_is_said(monkeypatch, name, error, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unittest.mock.Mock(side_effect=error))
    with pytest.raises(DataError, match=message):
        build(name)


WRONG = [
    ("muse_books", r"has the configurations knowmem, privleak, raw, train, verbmem; name one"),
    ("muse_books/raw:test", r"can't be read from .*1\.0\.0 \(Unknown split 'test'\. Should be one of \['forget'"),
    ("muse_books/raw:forget[2:x]", r"can't be read .*Error parsing split 'forget\[2:x\]'"),
    ("muse_books/raw:forget[4:]", r"can't be read from .*1\.0\.0"),
    ("tofu/full", r"is not in .*tfds \(TFDS_DATA_DIR\)\. Published data sets are built with python -m trace_jax\.ma"),
]


def test_what_cannot_be_read_is_said(books):
    build("muse_books", source=books[0])
    for name, message in WRONG:
        with pytest.raises(DataError, match=message):
            read_records(f"tfds:{name}")
    with pytest.raises(DataError, match="the columns are gt, prompt; expected text, or question and answer"):
        read_source("tfds:muse_books/verbmem:forget")


def test_the_newest_version_is_read_and_a_sole_configuration_need_not_be_named(tmp_path, tfds_home):
    rows = download(tmp_path / "copy", "wikitext", counts={("wikitext-2-raw-v1", "train"): 5})
    build("wikitext", source=str(tmp_path / "copy"), accept_counts=True)
    there, rows = tfds_home / "wikitext/wikitext-2-raw-v1", rows["wikitext-2-raw-v1", "train"]
    assert read_records("tfds:wikitext") == rows
    (there / "10.0.0").mkdir()  # nothing in it: not a prepared one
    assert read_records("tfds:wikitext:train[:3]") == rows[:3]
    (there / "1.0.0/published.json").unlink()  # as if it was not built here
    (tfds_home / "mine").mkdir()
    (there / "1.0.0").rename(tfds_home / "mine/2.0.0")
    assert [d.text for d in read_source("tfds:mine")[0]] == [row["text"] for row in rows]
    assert read_source("tfds:mine:train[:2]")[0][1].origin == "tfds:mine:train[:2]:2"
    assert revision_of("tfds:mine") == "version 2.0.0"
    assert is_here("tfds:mine:nowhere") and not is_here("tfds:muse_news/raw:forget")


def test_a_dry_run_says_what_is_to_be_built(capsys, books):
    build("muse_books/raw", source=books[0])
    sources = ["--config.data.forget=tfds:muse_books/raw:forget", "--config.data.retain=tfds:muse_news/raw:retain1"]
    assert main(["--config", "configs/text.py", "--dry-run", *sources]) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "4 documents: 4 texts" in text
    assert "tfds:muse_news/raw:retain1 is not built: python -m trace_jax.main data --name muse_news/raw" in text


def test_the_command_line_builds_and_lists(tmp_path, capsys, books):
    assert main(["data", "--list"]) == 0 and "muse_books/raw: forget 4, retain1 12" in capsys.readouterr().out
    command = ["data", "--name", "muse_books/raw", "--source", books[0], "--data-dir", str(tmp_path / "elsewhere")]
    assert main(command) == 0
    out = capsys.readouterr()
    assert f"export TFDS_DATA_DIR={tmp_path / 'elsewhere'}" in out.out and "muse_books/raw:forget: 4 rows" in out.err
    assert main(command) == 2 and "is there already; add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["data", "--name", "muse_books", "--source", "nowhere"]) == 2
    assert "trace_jax: nowhere: there is no such directory." in capsys.readouterr().err


def test_neither_tensorflow_nor_the_network_is_touched(tmp_path, books):
    """In a process of its own, with a TensorFlow that leaves a mark when it is imported and sockets that don't open."""
    mark = "import pathlib\npathlib.Path(__file__).with_suffix('.mark').touch()\nraise AssertionError\n"
    (tmp_path / "tensorflow.py").write_text(mark)
    script = f"""
        import socket, sys
        sys.path.insert(0, {str(tmp_path)!r})
        socket.socket.connect = socket.getaddrinfo = None
        from trace_jax.data.build import build
        from trace_jax.data.sources import read_records, read_source
        build("muse_books", source={books[0]!r})
        assert len(read_records("tfds:muse_books/knowmem:forget_qa")) == 100
        assert len(read_source("tfds:muse_books/raw:forget[:2]")[0]) == 2
        assert "tensorflow" not in sys.modules
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and not (tmp_path / "tensorflow.mark").exists(), result.stderr


def test_a_file_is_told_by_its_hash_and_other_sources_by_what_is_known(tmp_path, monkeypatch):
    import datasets

    write_lines(tmp_path / "a.jsonl", made_up({"text": TEXT}, 2, "a"))
    assert revision_of(str(tmp_path / "a.jsonl")).startswith("sha256:") and revision_of(str(tmp_path)) == ""
    rows, asked = datasets.Dataset.from_list([{"text": "t"}]), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k.get("revision"))) or rows)
    assert revision_of("huggingface:owner/name") == ""
    read_records("huggingface:muse-bench/MUSE-Books/raw:forget")
    assert asked == [(("owner/name",), None), (("muse-bench/MUSE-Books", "raw"), BOOKS.revision)]
    rows.info.download_checksums = {f"hf://datasets/owner/name@{COMMIT}/raw/forget.parquet": {"num_bytes": 1}}
    assert revision_of("huggingface:owner/name/raw:forget") == COMMIT
