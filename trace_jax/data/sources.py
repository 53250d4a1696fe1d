"""Text and tables of the user -> documents and rows: files, the package `datasets`, TensorFlow Datasets.

Errors name the file and the line. Data sets that tfds has prepared in array_record are read without TensorFlow.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.data.published import PUBLISHED, DataError
from trace_jax.io.files import as_path, is_remote, read_json

HUGGINGFACE, TFDS = "huggingface:", "tfds:"
RECORD = "published.json"  # beside the data of what was built here: its revision, rows and files
_SUFFIXES = (".jsonl", ".txt", ".md")
_FIELDS = ({"text"}, {"question", "answer"})
_EXPECTED = '{"text": ...} or {"question": ..., "answer": ...}'


@dataclasses.dataclass(frozen=True)
class Document:
    """With `answer`, `text` is a question and only the answer carries loss. `origin` is file:line, or a name."""

    text: str
    origin: str
    answer: str | None = None

    @functools.cached_property
    def hash(self) -> str:
        """Of its words: case and white space make no difference."""
        words = f"{self.text} {self.answer or ''}".casefold().split()
        return hashlib.sha256(" ".join(words).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Source:
    """The documents of a source."""

    documents: list[Document]
    left_out: int = 0  # texts that were too short to be one


def overlap(left: Sequence[Document], right: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Documents of `left` that stand in `right` too, each with its first twin there (`Document.hash`)."""
    twins: dict[str, Document] = {}
    for document in right:
        twins.setdefault(document.hash, document)
    return [(document, twins[document.hash]) for document in left if document.hash in twins]


def read_source(path: str, *, min_length: int = 0, most: int | None = None) -> Source:
    """Documents of a JSONL file (one a line), a text file (one document) or a directory of such files, by name.

    A line of JSONL is an object with "text", or with "question" and "answer"; other keys are refused.
    `huggingface:NAME[/CONFIG][:SPLIT]` and `tfds:NAME[/CONFIG][:SPLIT]` are data sets with such columns, among others
    (`read_records`). Files may be at gs://BUCKET/NAME.

    Args:
      min_length: shorter texts (characters, white space around them not counted) are left out; questions never.
      most: so many documents are read, and what follows isn't looked at.

    Raises:
      DataError: nothing there, unreadable, not UTF-8, empty, or a line of another form; every text is too short.
    """
    documents, left_out = [], 0
    for item, origin in _items(path):
        text = item.get("text")
        if min_length and isinstance(text, str) and len(text.strip()) < min_length:
            left_out += 1
            continue
        for key in item:
            value = text_of(item, key, origin)
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise DataError(f"{origin}: {key} holds half of a surrogate pair (\\ud800 to \\udfff).")
        if "text" in item:
            documents.append(Document(item["text"], origin))
        else:
            documents.append(Document(f"Question: {item['question']}\nAnswer:", origin, f" {item['answer']}"))
        if len(documents) == most:
            break
    if not documents and left_out:
        raise DataError(f"{path}: all {left_out} texts have fewer than {min_length} characters; lower data.min_length.")
    if not documents:
        raise DataError(f"{path}: the file is empty; expected text, or one JSON object per line.")
    return Source(documents, left_out)


def _items(path: str) -> Iterator[tuple[dict, str]]:
    """Every object {"text"} or {"question", "answer"} of a source, unchecked, with its origin."""
    if not path:
        raise DataError("The path is empty; expected a JSONL file, a text file or a directory of such files.")
    if path.startswith((HUGGINGFACE, TFDS)):
        columns, rows = _data_set(path)
        fields = next((f for f in _FIELDS if f <= set(columns)), None)
        if fields is None:
            raise DataError(
                f"{path}: the columns are {', '.join(columns)}; expected text, or question and "
                "answer. Save what you need as JSONL."
            )
        yield from (({f: row[f] for f in fields}, f"{path}:{number}") for number, row in enumerate(rows, start=1))
        return
    root = _local(path)
    if not root.exists():
        raise DataError(f"{root}: there is no such file or directory.")
    files = [root]
    if root.is_dir():
        try:
            files = sorted(p for p in root.iterdir() if p.is_file() and p.suffix in _SUFFIXES)
        except OSError as error:
            raise DataError(f"{root}: can't be read ({error.strerror or error}).") from None
        if not files:
            raise DataError(f"{root}: the directory holds no file that ends in {', '.join(_SUFFIXES)}.")
    for file in files:
        if file.suffix == ".json":
            raise DataError(
                f"{file}: is JSON; expected JSON lines: one object per line, in a file that ends in .jsonl."
            )
        if file.suffix != ".jsonl":
            yield {"text": "".join(text_lines(file))}, f"{file}:1"
            continue
        for item, origin in json_lines(file, _EXPECTED):
            if set(item) not in _FIELDS:
                raise DataError(f"{origin}: the keys are {', '.join(sorted(item)) or 'none'}; expected {_EXPECTED}.")
            yield item, origin


def read_records(source: str) -> list[dict[str, Any]]:
    """Every row of a data set with all its columns.

    Args:
      source: a file that ends in .jsonl, or huggingface:NAME[/CONFIG][:SPLIT] or tfds:NAME[/CONFIG][:SPLIT]. NAME is
        OWNER/NAME as on the hub, or a local directory of data files. SPLIT is train unless given, and may be a slice
        such as train[:1000].

    Raises:
      DataError: nothing there, another kind of file, a line that is no JSON object, or no rows. No text is quoted.
    """
    if source.startswith((HUGGINGFACE, TFDS)):
        return [dict(row) for row in _data_set(source)[1]]
    file = _local(source)
    if not file.exists():
        raise DataError(f"{file}: there is no such file.")
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: expected JSON lines: one object per line, in a file that ends in .jsonl.")
    return [item for item, _ in json_lines(file, "a JSON object")]


def text_of(record: Mapping[str, Any], column: str, origin: str) -> str:
    """The text in a column of a record. Raises DataError: none is there, or it is empty; nothing is quoted."""
    value = record.get(column)
    if not isinstance(value, str):
        there = f"a {type(value).__name__}" if column in record else "missing"
        raise DataError(f"{origin}: {column} is {there}; expected text (the columns are {', '.join(sorted(record))}).")
    if not value.strip():
        raise DataError(f"{origin}: {column} is empty.")
    return value


def text_lines(file: pathlib.Path) -> Iterator[str]:
    """The lines of a text file with their ends, one by one. Raises DataError: it can't be read, or isn't UTF-8."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file with UTF-8 "
                        "encoding."
                    ) from None
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror or error}).") from None


def json_lines(file: pathlib.Path, expected: str) -> Iterator[tuple[dict, str]]:
    """The object of every line that isn't empty, with its origin FILE:LINE; at least one."""
    empty = True
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        empty, origin = False, f"{file}:{number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{origin}: not JSON ({error.msg}, column {error.colno}); expected {expected} on each line."
            ) from None
        if not isinstance(item, dict):
            raise DataError(f"{origin}: a JSON {type(item).__name__}; expected {expected}.")
        yield item, origin
    if empty:
        raise DataError(f"{file}: the file is empty; expected text, or one JSON object per line.")


def part(base: str, config: str, split: str) -> str:
    """The source of one configuration and split of a data set: huggingface:OWNER/NAME/CONFIG:SPLIT,
    tfds:NAME/CONFIG:SPLIT, or the file DIRECTORY/CONFIG/SPLIT.jsonl."""
    if base.startswith((HUGGINGFACE, TFDS)):
        return f"{base}/{config}:{split}"
    return f"{base}/{config}/{split}.jsonl"


def is_here(path: str) -> bool:
    """Whether a source lies on a disk of this machine, so that reading it downloads nothing."""
    if path.startswith(TFDS):
        try:
            prepared(path.removeprefix(TFDS).partition(":")[0])
        except DataError:
            return False
        return True
    path = path.removeprefix(HUGGINGFACE).partition(":")[0] if path.startswith(HUGGINGFACE) else path
    return not is_remote(path) and pathlib.Path(path).expanduser().exists()


def revision_of(source: str) -> str:
    """Which revision of its data set a source is: the commit on the hub, or what was recorded when it was built.

    A file is told by the start of its SHA-256. Empty where nothing is known: other data sets, and a directory.
    """
    if source.startswith(TFDS):
        directory = prepared(source.removeprefix(TFDS).partition(":")[0])
        return (read_json(directory / RECORD) or {"revision": f"version {directory.name}"})["revision"]
    if source.startswith(HUGGINGFACE):
        downloaded = _load_dataset(source.removeprefix(HUGGINGFACE)).info.download_checksums or {}
        commits = {match[1] for name in downloaded if (match := re.search(r"@([0-9a-f]{40})/", name))}
        return ", ".join(sorted(commits))
    file = _local(source)
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" if file.is_file() else ""


def revision_and_content(source: str, content: str) -> str:
    """`revision_of` a data set, where it is known, and the hash `content` of what was read of it.

    A file has no revision: the hash of what was read is all there is to say.
    """
    revision = "" if source.endswith(".jsonl") else revision_of(source)
    return f"{revision} sha256:{content}".strip()


def _local(source: str) -> pathlib.Path:
    path = as_path(source)
    return path if is_remote(path) else path.expanduser()


def _data_set(source: str) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """(columns, rows) of a named data set; at least one row."""
    if source.startswith(HUGGINGFACE):
        rows = _load_dataset(source.removeprefix(HUGGINGFACE))
        return rows.column_names, rows
    address, _, split = source.removeprefix(TFDS).partition(":")
    directory = prepared(address)
    builder = import_tfds(source).builder_from_directory(os.fspath(directory))
    try:
        rows = builder.as_data_source(split=split or "train")
    except (ValueError, NotImplementedError, OSError) as error:
        raise DataError(f"{source}: can't be read from {directory} ({str(error).splitlines()[0]}).") from error
    if not len(rows):
        raise DataError(f"{source}: there are no rows.")
    return sorted(builder.info.features), (_plain(rows[index]) for index in range(len(rows)))


def _load_dataset(name: str) -> Any:
    """A split of a data set of the package `datasets`, with at least one row.

    What `trace_jax.data.published` has is read at the revision that stands there, any other data set as it is now.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{HUGGINGFACE}{name}: needs the package datasets: pip install 'trace-jax[data]'. "
            "Or save the text as JSONL."
        ) from None
    address, _, split = name.partition(":")
    parts = [address] if pathlib.Path(address).exists() else address.split("/")
    path = "/".join(parts[:2])
    pinned = next(({"revision": entry.revision} for entry in PUBLISHED.values() if entry.repository == path), {})
    try:
        rows = datasets.load_dataset(path, *parts[2:], split=split or "train", **pinned)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{HUGGINGFACE}{name}: can't be loaded ({error}).") from error
    if not len(rows):
        raise DataError(f"{HUGGINGFACE}{name}: there are no rows.")
    return rows


def import_tfds(name: str) -> Any:
    """The package tensorflow_datasets, without TensorFlow. Raises DataError where it, or array_record, is missing."""
    for package in ("tensorflow_datasets", "array_record"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{name}: needs the package {package}: pip install 'trace-jax[data]'. Or use JSONL.")
    return importlib.import_module("tensorflow_datasets")


def tfds_directory() -> pathlib.Path:
    """Where data sets lie, as for tfds itself: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return as_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared(address: str) -> pathlib.Path:
    """The directory of the newest prepared version of NAME or NAME/CONFIG.

    Raises:
      DataError: there is none (how to build it); several configurations, and none is named.
    """

    def versions(root: pathlib.Path) -> list[pathlib.Path]:
        files = root.glob("*/dataset_info.json")
        return [file.parent for file in files if re.fullmatch(r"\d+\.\d+\.\d+", file.parent.name)]

    root = tfds_directory() / address
    newest = versions(root)
    if not newest:
        configs = {path.name: several for path in root.glob("*") if (several := versions(path))}
        if len(configs) > 1:
            raise DataError(f"{TFDS}{address}: has the configurations {', '.join(sorted(configs))}; name one.")
        newest = next(iter(configs.values()), [])
    if not newest:
        raise DataError(
            f"{TFDS}{address}: is not in {tfds_directory()} (TFDS_DATA_DIR). Published data sets are built with "
            "python -m trace_jax.main data --name NAME; data --list says which there are."
        )
    return max(newest, key=lambda path: tuple(map(int, path.name.split("."))))


def _plain(value: Any) -> Any:
    """What JSON would hold: text, numbers, lists and objects."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
