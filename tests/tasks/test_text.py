"""The user's files: what is accepted, how it is split, and what each mistake is answered with."""

import pathlib
import sys
from unittest import mock

import datasets
import numpy as np
import pytest

from tests.tiny import write_lines
from trace_jax.data.corpora import build_corpora
from trace_jax.data.sources import DataError, Document, is_here, read_source
from trace_jax.tasks.text import TextConfig, hold_out, split_at_paragraphs


def sentences(prefix, count, length=30):
    return [f"{prefix} number {i}: " + " ".join(f"word{(i * 7 + j) % 50}" for j in range(length)) for i in range(count)]


def write(path, documents):
    return write_lines(path, [d if isinstance(d, dict) else {"text": d} for d in documents])


@pytest.fixture
def files(tmp_path):
    return {
        "forget": write(tmp_path / "forget.jsonl", sentences("secret", 12)),
        "retain": write(tmp_path / "retain.jsonl", sentences("public", 30)),
    }


def config_of(files, **changes):
    return TextConfig(row_length=32, vocab_size=400, **{**files, **changes})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.txt", b" \n\n", r"a\.txt:1: text is empty"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', r"a\.jsonl:2: not UTF-8 \(byte 0xff\); save the file with UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3: not JSON \(.*column \d+\); expected"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON list; expected \{"),
        ("a.json", b'{"text": "x"}', r"a\.json: expected JSON lines"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: the keys are txt; expected \{\"text\""),
        ("a.jsonl", b'{"text": "x", "answer": "y"}\n', r"the keys are answer, text; expected"),
        ("a.csv", b"text\nx\n", r"a\.csv: is a table; huggingface:DIR names a directory"),
        ("a", b"%PDF-1.4\n", r"a: is a PDF, not text; save its text in a \.txt file, or as JSONL"),
        ("a.doc", b"words\nmore\0\n", r"a\.doc: is a binary file, not text"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: text is a int; expected text"),
        ("a.jsonl", b'{"text": " "}\n', r"a\.jsonl:1: text is empty"),
        ("a.jsonl", b'{"question": "x", "answer": ""}\n', r"a\.jsonl:1: answer is empty"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: text holds half of a surrogate pair"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(str(tmp_path / name))


def test_what_is_not_there_or_can_not_be_read(tmp_path, monkeypatch):
    for path, message in (
        (tmp_path / "nothing.txt", r"nothing\.txt: there is no such file or directory"),
        ("", "The path is empty"),
        (tmp_path, r"holds no file that ends in \.jsonl, \.txt, \.md"),
    ):
        with pytest.raises(DataError, match=message):
            read_source(str(path))
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(pathlib.Path, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match=r"a\.txt: can't be read \(Permission denied\)"):
        read_source(str(tmp_path / "a.txt"))


def test_a_directory_is_read_by_name_and_a_line_knows_where_it_stands(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "one", "id": 7}, {"question": "Who?", "answer": "Nobody"}])
    (tmp_path / "a.txt").write_text("\ufeffplain\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text("not text")
    plain, one, question = read_source(str(tmp_path))[0]
    assert (plain.text, plain.origin) == ("plain\n", f"{tmp_path}/a.txt:1")
    assert (one.text, one.origin, one.answer) == ("one", f"{tmp_path}/b.jsonl:1", None)
    assert (question.text, question.answer) == ("Question: Who?\nAnswer:", " Nobody")
    short, left_out = read_source(str(tmp_path), min_length=50)  # questions are never left out
    assert (len(short), left_out) == (1, 2)
    lines = write(tmp_path / "d.jsonl", ["one", "two", {"wrong": "key"}])
    assert [d.text for d in read_source(lines, most=2)[0]] == ["one", "two"]
    with pytest.raises(DataError, match=r"d\.jsonl:3: the keys are wrong"):
        read_source(lines, most=3)
    assert is_here(lines) and is_here(f"huggingface:{tmp_path}:train[:5]")
    assert not any(map(is_here, (f"{tmp_path}/e.jsonl", "huggingface:owner/name:train", "gs://bucket/a.jsonl")))


def test_overlap_is_counted_and_refused_unless_allowed(tmp_path, files):
    retain = [*sentences("public", 30), *(s.upper() for s in sentences("secret", 2))]
    files["retain"] = write(tmp_path / "retain.jsonl", retain)
    with pytest.raises(
        DataError, match=r"2 of 12 .* stand in retain, .*forget\.jsonl:1 = .*retain\.jsonl:31.*allow_overlap"
    ):
        config_of(files).build()
    for seed in range(8):
        trained = config_of(files, allow_overlap=True, seed=seed).build().train["general"]
        assert {":31", ":32"} <= {d.origin[-3:] for d in trained}
    files["holdout"] = write(tmp_path / "holdout.jsonl", ["new text", sentences("secret", 3)[2]])
    with pytest.raises(DataError, match=r"1 of 2 holdout documents also stand in forget, .*holdout\.jsonl:2 = .*:3\. "):
        config_of(files, allow_overlap=True).build()


def test_forget_text_inside_a_longer_retain_document_is_warned_of(tmp_path, files, capsys):
    own = {name: [" ".join(f"{name}{i}-{j}" for j in range(20)) for i in range(6)] for name in ("secret", "public")}
    files = {name: write(tmp_path / f"{name}.jsonl", own[of]) for name, of in zip(files, own, strict=True)}
    config_of(files).build()
    assert "warning" not in capsys.readouterr().err
    inside = [f"Before. {text.upper()} After." for text in own["secret"][:2]]
    files["retain"] = write(tmp_path / "retain.jsonl", [*own["public"], *inside])
    config_of(files).build()
    said = capsys.readouterr().err
    assert "2 of 6 forget documents share 13 or more words in a row with retain (2 of its 8 documents, 16 such" in said
    assert "forget.jsonl:1 and" in said and "retain.jsonl:7: retain would teach again" in said


def test_sets_that_are_too_small(tmp_path, files):
    for build, name, texts, message in (
        (TextConfig.build, "retain", ["one paragraph"], "retain: 1 documents, 1 of them unlike all others; at least 3"),
        (TextConfig.build, "retain", [*"aabbc"], r"retain: 5 documents, 1 of them unlike all others"),
        (build_corpora, "forget", ["secret"], r"train/forget has 1 rows of 32 tokens, and at least 2 are needed"),
        (build_corpora, "holdout", ["short"], "holdout text is too short for membership inference"),
    ):
        with pytest.raises(DataError, match=message):
            build(config_of(files, **{name: write(tmp_path / "few.jsonl", texts)}))


def test_corpora_of_user_text(tmp_path, files):
    files["neighbour"] = write(tmp_path / "near.jsonl", sentences("nearby", 10))
    files["holdout"] = write(tmp_path / "holdout.jsonl", sentences("unseen", 6))
    corpora = build_corpora(config_of(files))
    assert corpora.documents == {
        "train/general": 24, "train/neighbour": 8, "train/forget": 12, "validation/general": 3,
        "validation/neighbour": 1, "test/general": 3, "test/neighbour": 1, "holdout": 6,
    }  # fmt: skip
    for probes in (corpora.validation, corpora.test):
        assert set(probes.text) == {"general", "neighbour", "forget"} and probes.questions == {}
        assert set(probes.members) == {"forget", "holdout"} and len(probes.prompts["forget"])
    assert len(corpora.retain) == len(corpora.train["general"]) + len(corpora.train["neighbour"])
    assert corpora.retain.domain.sum() == len(corpora.train["neighbour"])
    assert corpora.fingerprint == build_corpora(config_of(files)).fingerprint
    assert corpora.fingerprint != build_corpora(config_of(files, seed=1)).fingerprint


def test_only_answers_of_questions_are_trained_on(tmp_path, files):
    pairs = [{"question": f"What is thing {i}?", "answer": f"It is number {i * 37}"} for i in range(20)]
    corpora = build_corpora(config_of(files, forget=write(tmp_path / "qa.jsonl", pairs)))
    rows = corpora.forget
    r, t = np.nonzero(rows.valid)
    predicted = corpora.tokenizer.decode(rows.tokens[r, t + 1].tolist(), skip_special_tokens=False)
    assert predicted == "".join(f" It is number {i * 37}<eos>" for i in range(20))
    assert corpora.validation.prompts == {}


def test_a_single_long_text_is_split_at_paragraph_ends(tmp_path, files, capsys):
    paragraphs = sentences("public", 40)
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(paragraphs))
    benchmark = config_of(files, retain=str(path)).build()
    assert "retain: 1 documents are split into" in capsys.readouterr().err
    held_out = [part.held_out["general"] for part in (benchmark.validation, benchmark.test)]
    parts = [d for part in (benchmark.train["general"], *held_out) for d in part]
    parts.sort(key=lambda d: int(d.origin.rsplit(":", 1)[1]))
    assert "\n\n".join(d.text for d in parts) == "\n\n".join(paragraphs)
    lines = path.read_text().split("\n")
    assert all(lines[int(d.origin.rsplit(":", 1)[1]) - 1] == d.text.split("\n")[0] for d in parts)
    pieces = split_at_paragraphs(Document("one\ntwo\nthree\nfour\n", "a.txt:1"), 6)  # without empty lines
    assert [d.text for d in pieces] == ["one\ntwo", "three\nfour"]


def test_a_tenth_is_held_out_at_least_one(tmp_path):
    documents = read_source(write(tmp_path / "a.jsonl", sentences("x", 50)))[0]
    for count, sizes in ((50, [40, 5, 5]), (3, [1, 1, 1])):
        parts = hold_out(documents[:count], "retain", repeated=set(), rng=np.random.default_rng(0))
        assert [*map(len, parts)] == sizes
        assert {d.origin for part in parts for d in part} == {d.origin for d in documents[:count]}


def test_a_named_data_set_is_read_by_its_columns(tmp_path):
    """A directory of data files, as `datasets` reads it: plain text to train, an empty one to test."""
    rows = [{"id": i, "text": text} for i, text in enumerate(["one", "two", "three"])]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_list([{"id": 1, "text": " "}]).to_parquet(tmp_path / "test.parquet")
    name = f"huggingface:{tmp_path}"
    documents, _ = read_source(name)
    assert [d.text for d in documents] == ["one", "two", "three"] and documents[1].origin == f"{name}:2"
    assert [d.text for d in read_source(f"{name}:train[1:]")[0]] == ["two", "three"]
    for split, message in (
        ("test", ":test:1: text is empty"),
        ("dev", r":dev: can't be loaded \(.*dev"),
        ("train[:0]", "corresponds to no data"),
    ):
        with pytest.raises(DataError, match=message):
            read_source(f"{name}:{split}")


def test_names_are_taken_apart_and_columns_chosen(monkeypatch):
    rows = datasets.Dataset.from_list([{"question": "Who?", "answer": "Nobody", "url": "x"}])
    load = mock.Mock(return_value=rows)
    monkeypatch.setattr(datasets, "load_dataset", load)
    (document,) = read_source("huggingface:owner/name/config:validation")[0]
    assert (document.text, document.answer) == ("Question: Who?\nAnswer:", " Nobody")
    read_source("huggingface:owner/name")
    asked = mock.call("owner/name", "config", split="validation"), mock.call("owner/name", split="train")
    assert load.call_args_list == [*asked]
    load.return_value = datasets.Dataset.from_list([{"body": "x"}])
    with pytest.raises(DataError, match=r"owner/name: the columns are body; expected text, or question and"):
        read_source("huggingface:owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets: pip install datasets"):
        read_source("huggingface:owner/name")


def test_several_forget_sources_are_topics_that_share_no_row(tmp_path, files):
    other = write(tmp_path / "other.jsonl", sentences("hidden", 5))
    one, both = build_corpora(config_of(files)), build_corpora(config_of(files, forget=[files["forget"], other]))
    assert not one.forget.domain.any() and "train/forget/0" not in one.documents
    assert np.array_equal(np.unique(both.forget.domain), [0, 1]) and np.all(np.diff(both.forget.domain) >= 0)
    assert [both.documents[f"train/forget{topic}"] for topic in ("", "/0", "/1")] == [17, 12, 5]
    for topic, word in enumerate(("secret", "hidden")):
        rows = both.forget.take(np.flatnonzero(both.forget.domain == topic))
        text = both.tokenizer.decode(rows.tokens.ravel().tolist())
        assert f"{word} number" in text and ("secret" in text) == (topic == 0)
    assert both.fingerprint != one.fingerprint and not both.retain.domain.any()
    assert build_corpora(config_of(files, forget=[other, files["forget"]])).fingerprint != both.fingerprint
    leaking = write(tmp_path / "other.jsonl", [*sentences("hidden", 5), sentences("public", 1)[0]])
    for forget, message in (
        ([files["forget"], leaking], r"1 of 18 forget documents also stand in retain, .*other\.jsonl:6 = "),
        ([files["forget"], str(tmp_path / "nowhere.jsonl")], "no such file"),
        ([], "forget is an empty list"),
    ):
        with pytest.raises(DataError, match=message):
            config_of(files, forget=forget).build()


def test_short_texts_are_left_out_and_counted(tmp_path, files):
    lines = ["", " \n", " = Title = \n", *sentences("public", 30), "x" * 30]
    files["retain"] = write(tmp_path / "retain.jsonl", lines)
    with pytest.raises(DataError, match=r"retain\.jsonl:1: text is empty"):
        config_of(files).build()
    corpora = build_corpora(config_of(files, min_length=30))
    assert corpora.documents["left out/general"] == 3 and "left out/forget" not in corpora.documents
    assert sum(corpora.documents[f"{split}/general"] for split in ("train", "validation", "test")) == 31
    with pytest.raises(DataError, match=r"all 12 texts have fewer than 9000 characters; lower min_length"):
        config_of(files, min_length=9000).build()
