"""Text and tables of the user -> documents and rows: files, the package `datasets`, TensorFlow Datasets.

Errors name the file and the line. Data sets that tfds has prepared in array_record are read without TensorFlow.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trace_jax.data.published import PUBLISHED, DataError
from trace_jax.io.files import as_path, is_remote, read_json

HUGGINGFACE, TFDS = "huggingface:", "tfds:"
TFDS_PACKAGES = ("array_record", "tensorflow_datasets")  # which import no TensorFlow
RECORD = "published.json"  # beside the data of what was built here: its revision, rows and files
_SUFFIXES = (".jsonl", ".txt", ".md")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_FIELDS = (("text",), ("question", "answer"))
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


def overlap(left: Sequence[Document], right: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Documents of `left` that stand in `right` too, each with its first twin there (`Document.hash`)."""
    twins: dict[str, Document] = {}
    for document in right:
        twins.setdefault(document.hash, document)
    return [(document, twins[document.hash]) for document in left if document.hash in twins]


_kept: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("kept", default=None)


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within it the documents of a source are kept, and it is not read again."""
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def read_source(path: str, *, min_length: int = 0, most: int | None = None) -> tuple[list[Document], int]:
    """(documents, how many texts were left out as too short) of a text file (one document), a JSONL file (one a line:
    an object with "text", or with "question" and "answer"), a directory of such files, by name, or a data set with such
    columns (`read_records`). Files may be at gs://BUCKET/NAME. What follows the first `most` isn't looked at.

    `min_length`: characters of the shortest text, white space around it not counted; questions are never left out.
    """
    kept, key = _kept.get(), (path, min_length, most)
    if kept and key in kept:
        return kept[key]
    documents, left_out = [], 0
    for item, origin in _items(path):
        text = item.get("text")
        if min_length and isinstance(text, str) and len(text.strip()) < min_length:
            left_out += 1
            continue
        documents.append(document_of(item, origin))
        if len(documents) == most:
            break
    if not documents:  # a source has at least one item
        raise DataError(f"{path}: all {left_out} texts have fewer than {min_length} characters; lower min_length.")
    if kept is not None:
        kept[key] = documents, left_out
    return documents, left_out


def document_of(item: Mapping[str, Any], origin: str) -> Document:
    """The document of an object with "text", or with "question" and "answer". DataError: text that can't be used."""
    for key in item:
        if has_surrogate(text_of(item, key, origin)):
            raise DataError(f"{origin}: {key} holds half of a surrogate pair (\\ud800 to \\udfff).")
    if "text" in item:
        return Document(item["text"], origin)
    return Document(f"Question: {item['question']}\nAnswer:", origin, f" {item['answer']}")


def _items(path: str) -> Iterator[tuple[dict, str]]:
    """Every object {"text"} or {"question", "answer"} of a source, unchecked, with its origin; at least one."""
    if not path:
        raise DataError("The path is empty; expected a JSONL file, a text file or a directory of such files.")
    if path.startswith((HUGGINGFACE, TFDS)):
        for number, row in enumerate(_data_set(path), start=1):
            if (item := _fields(row)) is None:
                columns = f"the columns are {', '.join(sorted(row))}; expected text, or question and answer"
                raise DataError(f"{path}: {columns}. Save what you need as JSONL.")
            yield item, f"{path}:{number}"
        return
    root = _existing(path)
    files = [root]
    if root.is_dir():
        try:
            files = sorted(p for p in root.iterdir() if p.is_file() and p.suffix in _SUFFIXES)
        except OSError as error:
            raise DataError(f"{root}: can't be read ({error.strerror or error}).") from None
        if not files:
            raise DataError(f"{root}: the directory holds no file that ends in {', '.join(_SUFFIXES)}.")
    for file in files:
        if file.suffix != ".jsonl":
            yield {"text": "".join(text_lines(file))}, f"{file}:1"
            continue
        for line, origin in json_lines(file, _EXPECTED):
            if (item := _fields(line)) is None or sum(key in line for key in sum(_FIELDS, ())) > len(item):
                raise DataError(f"{origin}: the keys are {', '.join(sorted(line)) or 'none'}; expected {_EXPECTED}.")
            yield item, origin


def _fields(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a document is made of; other columns are ignored. None: it isn't there."""
    return next(({name: row[name] for name in fields} for fields in _FIELDS if {*fields} <= row.keys()), None)


def read_records(source: str) -> list[dict[str, Any]]:
    """Every row, with all its columns, of a .jsonl file or a data set huggingface:NAME[/CONFIG][:SPLIT] (of the hub, or
    a local directory of data files) or tfds:NAME[/CONFIG][:SPLIT]; at least one. SPLIT may be a slice: train[:1000].
    """
    if source.startswith((HUGGINGFACE, TFDS)):
        return list(_data_set(source))
    return [item for item, _ in json_lines(_existing(source), "a JSON object")]


def text_of(record: Mapping[str, Any], column: str, origin: str) -> str:
    """The text in a column of a record. Raises DataError: none is there, or it is empty; nothing is quoted."""
    value = record.get(column)
    if not isinstance(value, str):
        there = f"a {type(value).__name__}" if column in record else "missing"
        raise DataError(f"{origin}: {column} is {there}; expected text (the columns are {', '.join(sorted(record))}).")
    if not value.strip():
        raise DataError(f"{origin}: {column} is empty.")
    return value


def has_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair is in a text, which can't be encoded then."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def text_lines(file: pathlib.Path) -> Iterator[str]:
    """The lines of a text file with their ends, one by one. Raises DataError: it can't be read, or isn't UTF-8."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if b"\0" in line or (number == 1 and line.startswith(b"%PDF")):
                    kind = "a PDF" if line.startswith(b"%PDF") else "a binary file"
                    raise DataError(f"{file}: is {kind}, not text; save its text in a .txt file, or as JSONL.")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{line[error.start]:02x}"
                    raise DataError(f"{file}:{number}: not UTF-8 ({byte}); save the file with UTF-8.") from None
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
            what = f"not JSON ({error.msg}, column {error.colno})"
            raise DataError(f"{origin}: {what}; expected {expected} on each line.") from None
        if not isinstance(item, dict):
            raise DataError(f"{origin}: a JSON {type(item).__name__}; expected {expected}.")
        yield item, origin
    if empty:
        raise DataError(f"{file}: the file is empty; expected text, or one JSON object per line.")


def located(source: str) -> str:
    """A source on this machine by its full path, which is one however it is given; the name of any other as it is."""
    if not source or source.startswith((HUGGINGFACE, TFDS)) or is_remote(source):
        return source
    return os.path.realpath(os.path.expanduser(source))


def part(base: str, config: str, split: str) -> str:
    """The source of one configuration and split of a data set, or of a directory with CONFIG/SPLIT.jsonl."""
    return f"{base}/{config}" + (f":{split}" if base.startswith((HUGGINGFACE, TFDS)) else f"/{split}.jsonl")


def is_here(path: str) -> bool:
    """Whether a source lies on a disk of this machine, so that reading it downloads nothing."""
    if path.startswith(TFDS):
        with contextlib.suppress(DataError):
            return prepared(path).is_dir()
        return False
    path = path.removeprefix(HUGGINGFACE).partition(":")[0] if path.startswith(HUGGINGFACE) else path
    return not is_remote(path) and pathlib.Path(path).expanduser().exists()


def revision_of(source: str) -> str:
    """Which revision a source is: the commit on the hub, what was recorded when it was built, or the start of a file's
    SHA-256. Empty where nothing is known: other data sets, and a directory.
    """
    if source.startswith(TFDS):
        directory = prepared(source)
        return (read_json(directory / RECORD) or {"revision": f"version {directory.name}"})["revision"]
    if source.startswith(HUGGINGFACE):
        downloaded = _load_dataset(source).info.download_checksums or {}
        commits = {match[1] for name in downloaded if (match := re.search(r"@([0-9a-f]{40})/", name))}
        return ", ".join(sorted(commits))
    file = _existing(source)
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" if file.is_file() else ""


def revision_and_content(source: str, content: str) -> str:
    """`revision_of` a data set, where it is known, and the hash `content` of what was read; of a file this alone."""
    revision = "" if source.endswith(".jsonl") else revision_of(source)
    return f"{revision} sha256:{content}".strip()


def _existing(source: str) -> pathlib.Path:
    """The file or directory of a source."""
    path = as_path(source)
    path = path if is_remote(path) else path.expanduser()
    if not path.exists():
        raise DataError(f"{path}: there is no such file or directory.")
    if path.suffix in _TABLES:
        named = f"{HUGGINGFACE}DIR names a directory of such files with a column text, or question and answer"
        raise DataError(f"{path}: is a table; {named}. Or save it as JSONL: {_EXPECTED} on each line.")
    if path.suffix == ".json":
        raise DataError(f"{path}: expected JSON lines: one object per line, in a file that ends in .jsonl.")
    return path


def _data_set(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a named data set; at least one."""
    if source.startswith(HUGGINGFACE):
        rows, plain = _load_dataset(source), dict
    else:
        directory, split = prepared(source), source.removeprefix(TFDS).partition(":")[2]
        tfds = import_optional(source, *TFDS_PACKAGES)
        builder = tfds.builder_from_directory(os.fspath(directory))
        try:
            rows, plain = builder.as_data_source(split=split or "train"), _plain
        except (ValueError, NotImplementedError, OSError) as error:
            raise DataError(f"{source}: can't be read from {directory} ({str(error).splitlines()[0]}).") from error
    if not len(rows):
        raise DataError(f"{source}: there are no rows.")
    yield from map(plain, rows)


def _plain(row: Any) -> dict[str, Any]:
    """A row of tfds as JSON would hold it: texts where it has bytes, numbers and lists where it has arrays."""
    return json.loads(json.dumps(row, default=lambda x: x.decode() if isinstance(x, bytes) else x.tolist()))


def _load_dataset(source: str) -> Any:
    """A split of a data set of the package `datasets`: at the revision that `PUBLISHED` has, or else as it is now."""
    datasets = import_optional(source, "datasets")
    address, _, split = source.removeprefix(HUGGINGFACE).partition(":")
    parts = [address] if pathlib.Path(address).exists() else address.split("/")
    path = "/".join(parts[:2])
    pinned = next(({"revision": entry.revision} for entry in PUBLISHED.values() if entry.repository == path), {})
    try:
        return datasets.load_dataset(path, *parts[2:], split=split or "train", **pinned)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: can't be loaded ({error}).") from error


def check_packages(source: str) -> None:
    """Raises DataError or ConfigError: a package is missing that reads such a source."""
    if source.startswith((HUGGINGFACE, TFDS)):
        import_optional(source, *(TFDS_PACKAGES if source.startswith(TFDS) else ("datasets",)))
    else:
        as_path(source)


def import_optional(source: str, *packages: str) -> Any:
    """The last of packages that not every source needs."""
    try:
        return [importlib.import_module(package) for package in packages][-1]
    except ImportError as error:
        needed = f"needs the package {error.name}: pip install {error.name}"
        raise DataError(f"{source}: {needed}. Or save what you need as JSONL.") from None


def tfds_directory() -> pathlib.Path:
    """Where data sets lie, as for tfds itself: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return as_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared(source: str) -> pathlib.Path:
    """The directory of the newest prepared version of tfds:NAME or tfds:NAME/CONFIG, with or without a split."""
    address = source.removeprefix(TFDS).partition(":")[0]

    def versions(pattern: str) -> list[pathlib.Path]:
        files = (tfds_directory() / address).glob(f"{pattern}/dataset_info.json")
        return [file.parent for file in files if re.fullmatch(r"\d+\.\d+\.\d+", file.parent.name)]

    there = versions("*") or versions("*/*")
    if len(configs := {path.parent.name for path in there}) > 1:
        raise DataError(f"{TFDS}{address}: has the configurations {', '.join(sorted(configs))}; name one.")
    if not there:
        command = "python -m trace_jax.main data --name NAME; data --list says which there are"
        missing = f"{TFDS}{address}: is not in {tfds_directory()} (TFDS_DATA_DIR)"
        raise DataError(f"{missing}. Published data sets are built with {command}.")
    return max(there, key=lambda path: tuple(map(int, path.name.split("."))))
