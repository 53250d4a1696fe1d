"""The table of published data sets, and their files: what counts as a split, and what a wrong file is answered with."""

import dataclasses
import json
import re

import pytest

from tests.data.published_files import made_up, write_lines, write_parquet
from trace_jax.data import build as files
from trace_jax.data.published import INTEGER, PUBLISHED, TEXT, TEXT_OR_NULL, TEXTS, overview, published
from trace_jax.data.sources import DataError

BOOKS = PUBLISHED["muse_books"]
WMDP = PUBLISHED["wmdp"]


def test_the_table_adds_up_and_the_overview_has_every_configuration():
    assert all(re.fullmatch("[0-9a-f]{40}", dataset.revision) for dataset in PUBLISHED.values())
    assert len({dataset.revision for dataset in PUBLISHED.values()}) == len(PUBLISHED)
    news = PUBLISHED["muse_news"].subsets
    folds = list(news["sust"].rows.values())
    assert list(news["scal"].rows.values()) == [sum(folds[: n + 1]) for n in range(4)]
    assert news["train"].rows["forget"] == sum(folds) and news["raw"].rows["forget"] == folds[0]
    rows = {name: subset.rows["train"] for name, subset in PUBLISHED["tofu"].subsets.items()}
    for forget, retain in (("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")):
        assert rows[forget] + rows[retain] == rows["full"] == 200 * 20 and rows[f"{forget}_perturbed"] == rows[forget]
    text = overview()
    for name, dataset in PUBLISHED.items():
        assert dataset.revision in text and dataset.licence in text
        assert all(f"{name}/{config}: " in text for config in dataset.subsets)
    assert "wmdp-cyber: test 1,987 (question, choices, answer)" in text
    assert [name for name, dataset in PUBLISHED.items() if dataset.gated] == ["wmdp_bio_forget"]
    assert "ask for access at https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus" in text


def test_a_data_set_or_one_configuration_is_chosen():
    assert published("wmdp") == ("wmdp", WMDP, ("wmdp-bio", "wmdp-chem", "wmdp-cyber"))
    assert published("wmdp/wmdp-chem")[2] == ("wmdp-chem",)
    with pytest.raises(DataError, match="wmpd: no such published data set is known here; there are muse_books, "):
        published("wmpd")
    with pytest.raises(DataError, match="wmdp/bio: no such configuration; wmdp has wmdp-bio, wmdp-chem, wmdp-cyber"):
        published("wmdp/bio")


LAYOUTS = [
    ("muse_books", "privleak", "retain", "privleak/retain-00000-of-00001.parquet"),
    ("muse_books", "knowmem", "forget_qa", "knowmem/forget_qa.jsonl"),
    ("tofu", "forget10", "train", "forget10.json"),
    ("wmdp_corpora", "cyber-forget-corpus", "train", "cyber-forget-corpus.jsonl"),
    ("wmdp_bio_forget", "default", "train", "train.jsonl"),
]


@pytest.mark.parametrize(("name", "config", "split", "path"), LAYOUTS)
def test_a_split_is_found_where_it_is_published(tmp_path, name, config, split, path):
    write_lines(tmp_path / path, [])
    assert files.find(tmp_path, PUBLISHED[name], config, split) == [tmp_path / path]


def test_files_that_older_revisions_left_there_are_not_taken(tmp_path):
    write_parquet(tmp_path / "privleak" / "retain", [{"text": "new"}])
    write_parquet(tmp_path / "privleak" / "retain2", [{"text": "old"}])
    write_lines(tmp_path / "privleak" / "retain.json", [{"text": "older"}])
    found = files.find(tmp_path, BOOKS, "privleak", "retain")
    assert list(files.rows(found, {"text": TEXT})) == [{"text": "new"}]
    with pytest.raises(DataError, match=r"no file of wmdp-bio:test; expected one of wmdp-bio/test-\*-of-\*\.parquet, "):
        files.find(tmp_path, WMDP, "wmdp-bio", "test")
    (tmp_path / "raw.json").touch()  # of several splits
    with pytest.raises(DataError, match="no file of raw:forget"):
        files.find(tmp_path, dataclasses.replace(BOOKS, subsets={"raw": BOOKS.subsets["raw"]}), "raw", "forget")


def test_shards_are_read_in_order_and_a_missing_one_is_missed(tmp_path):
    rows = made_up({"text": TEXT}, 10, "a")
    write_parquet(tmp_path / "raw" / "forget", rows, shards=3)
    found = files.find(tmp_path, BOOKS, "raw", "forget")
    assert list(files.rows(found, {"text": TEXT})) == rows
    found[1].unlink()
    with pytest.raises(DataError, match="raw: 2 of 3 files of raw:forget are there"):
        files.find(tmp_path, BOOKS, "raw", "forget")


@pytest.mark.parametrize("form", ["parquet", "jsonl", "list.json", "lines.json"])
def test_every_form_of_file_gives_the_same_rows(tmp_path, form):
    columns = {"question": TEXT, "choices": TEXTS, "answer": INTEGER, "doi": TEXT_OR_NULL}
    rows = made_up(columns, 600, "a")
    rows[1]["doi"] = ""
    extended = [row | {"unknown": 1.5, "doi": row["doi"] or None} for row in rows]
    if form == "list.json":
        (tmp_path / form).write_text(json.dumps(extended))
    else:
        (write_parquet if form == "parquet" else write_lines)(tmp_path / form, extended)
    assert list(files.rows(list(tmp_path.iterdir()), columns)) == rows


SECRET = "this must not be quoted"
GOOD = {"question": "q", "choices": ["a"], "answer": 0}
ROWS = [
    ({"question": SECRET, "answer": 1}, r"a\.jsonl:2: there is no column choices; the columns are question, answer"),
    (GOOD | {"question": None}, r":2: question is a NoneType; expected text"),
    (GOOD | {"question": f"{SECRET}\ud800"}, r":2: question is a str; expected text"),
    (GOOD | {"choices": SECRET}, r":2: choices is a str; expected a list of texts"),
    (GOOD | {"choices": [SECRET, 3]}, r":2: choices is a list; expected a list of texts"),
    (GOOD | {"answer": True}, r":2: answer is a bool; expected an integer"),
    (GOOD | {"answer": 2**63}, r":2: answer is a int; expected an integer"),
    ([SECRET], r"a\.jsonl:2: a JSON list; expected a JSON object"),
]
WRONG = [("a.jsonl", f"{json.dumps(GOOD)}\n{json.dumps(row)}\n".encode(), message) for row, message in ROWS] + [
    ("a.json", b'[{"text": "ok"},\n{"text" 5}]', r"a\.json:2: not JSON \(.*column \d+\)"),
    ("a.parquet", b"no parquet", r"a\.parquet: can't be read as parquet; download it again"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_wrong_row_or_file_is_named_and_not_quoted(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(files.rows([tmp_path / name], WMDP.subsets["wmdp-bio"].columns))
    assert SECRET not in str(raised.value)
