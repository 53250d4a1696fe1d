"""Text of the user -> documents. Errors name the file and the line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from trace_jax.data.errors import DataError
from trace_jax.data.published.table import PUBLISHED
from trace_jax.data.tfds import TFDS, is_prepared, open_tfds, revision
from trace_jax.io.files import as_path, is_remote


@dataclasses.dataclass(frozen=True)
class Document:
    """With `answer`, `text` is a question and only the answer carries loss. `origin` is file:line, or a name."""

    text: str
    origin: str
    answer: str | None = None


HUGGINGFACE = "huggingface:"
_SUFFIXES = (".jsonl", ".txt", ".md")
_FIELDS = ({"text"}, {"question", "answer"})


@dataclasses.dataclass(frozen=True)
class Source:
    """The documents of a source, and how many texts of it were too short to be one."""

    documents: list[Document]
    left_out: int = 0


def load_documents(path: str) -> list[Document]:
    """Documents of a JSONL file (one a line), a text file (one document) or a directory of such files, by name.

    A line of JSONL is an object with "text", or with "question" and "answer"; other keys are refused.
    `huggingface:NAME[/CONFIG][:SPLIT]` and `tfds:NAME[/CONFIG][:SPLIT]` are data sets with such columns
    (`open_dataset`, `open_tfds`). Files may be at gs://BUCKET/NAME.

    Raises:
      DataError: nothing there, unreadable, not UTF-8, empty, or a line of another form.
    """
    return read_source(path).documents


def read_source(path: str, *, min_length: int = 0, most: int | None = None) -> Source:
    """`load_documents` of what is at least `min_length` characters long, white space around it not counted.

    Questions are never left out. Of `most` documents, the first are read and what follows isn't looked at.

    Raises:
      DataError: `load_documents`; every text is too short.
    """
    documents, left_out = [], 0
    for item, origin in _items(path):
        text = item.get("text")
        if min_length and isinstance(text, str) and len(text.strip()) < min_length:
            left_out += 1
            continue
        documents.append(_document(item, origin))
        if len(documents) == most:
            break
    if not documents and left_out:
        raise DataError(f"{path}: all {left_out} texts have fewer than {min_length} characters; lower data.min_length.")
    if not documents:
        raise DataError(f"{path}: the file is empty; expected text, or one JSON object per line.")
    return Source(documents, left_out)


def read_records(source: str) -> list[dict[str, Any]]:
    """Every row of a data set with all its columns.

    Args:
      source: a file that ends in .jsonl, huggingface:NAME[/CONFIG][:SPLIT] (`open_dataset`), or
        tfds:NAME[/CONFIG][:SPLIT] (`open_tfds`).

    Raises:
      DataError: nothing there, another kind of file, a line that is no JSON object, or no rows. No text is quoted.
    """
    if source.startswith(HUGGINGFACE):
        return [dict(row) for row in _load_dataset(source.removeprefix(HUGGINGFACE))]
    if source.startswith(TFDS):
        return list(open_tfds(source.removeprefix(TFDS)))
    file = as_path(source)
    file = file if is_remote(file) else file.expanduser()
    if not file.exists():
        raise DataError(f"{file}: there is no such file.")
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: expected JSON lines: one object per line, in a file that ends in .jsonl.")
    lines = _text(file).split("\n")
    return [_object(line, f"{file}:{number}", "a JSON object") for number, line in enumerate(lines, 1) if line.strip()]


def part(base: str, config: str, split: str) -> str:
    """The source of one configuration and split of a data set: huggingface:OWNER/NAME/CONFIG:SPLIT,
    tfds:NAME/CONFIG:SPLIT, or the file DIRECTORY/CONFIG/SPLIT.jsonl."""
    if base.startswith((HUGGINGFACE, TFDS)):
        return f"{base}/{config}:{split}"
    return f"{base}/{config}/{split}.jsonl"


def is_here(path: str) -> bool:
    """Whether a source lies on a disk of this machine, so that reading it downloads nothing."""
    if path.startswith(TFDS):
        return is_prepared(path.removeprefix(TFDS).partition(":")[0])
    path = path.removeprefix(HUGGINGFACE).partition(":")[0] if path.startswith(HUGGINGFACE) else path
    return not is_remote(path) and pathlib.Path(path).expanduser().exists()


def revision_of(source: str) -> str:
    """Which revision of its data set a source is: the commit on the hub, or what was recorded when it was built.

    A file is told by the start of its SHA-256. Empty where nothing is known: other data sets, and a directory.
    """
    if source.startswith(TFDS):
        return revision(source.removeprefix(TFDS).partition(":")[0])
    if source.startswith(HUGGINGFACE):
        downloaded = _load_dataset(source.removeprefix(HUGGINGFACE)).info.download_checksums or {}
        commits = {match[1] for name in downloaded if (match := re.search(r"@([0-9a-f]{40})/", name))}
        return ", ".join(sorted(commits))
    file = as_path(source)
    file = file if is_remote(file) else file.expanduser()
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" if file.is_file() else ""


def revision_and_content(source: str, content: str) -> str:
    """`revision_of` a data set, where it is known, and the hash `content` of what was read of it.

    A file has no revision: the hash of what was read is all there is to say.
    """
    known = "" if source.endswith(".jsonl") else revision_of(source)
    return f"{known} sha256:{content}".strip()


def _items(path: str) -> Iterator[tuple[dict, str]]:
    """Every object {"text"} or {"question", "answer"} of a source, unchecked, with its origin."""
    if not path:
        raise DataError("The path is empty; expected a JSONL file, a text file or a directory of such files.")
    if path.startswith(HUGGINGFACE):
        rows = open_dataset(path.removeprefix(HUGGINGFACE))
        yield from ((row, f"{path}:{number}") for number, row in enumerate(rows, start=1))
        return
    if path.startswith(TFDS):
        rows = open_tfds(path.removeprefix(TFDS))
        fields = _fields(path, rows.columns)
        yield from (({f: row[f] for f in fields}, f"{path}:{number}") for number, row in enumerate(rows, start=1))
        return
    root = as_path(path)
    root = root if is_remote(root) else root.expanduser()
    if not root.exists():
        raise DataError(f"{root}: there is no such file or directory.")
    for file in _files(root):
        yield from _read(file)


def open_dataset(name: str) -> Any:
    """A data set of the package `datasets`, with the columns text or question and answer alone, and at least one row.

    Args:
      name: NAME[/CONFIG][:SPLIT]; NAME is OWNER/NAME as on the hub, or a local directory of data files. SPLIT is
        train unless given, and may be a slice such as train[:1000]. What `data.published.table` has is read at the
        revision that stands there, and any other data set as it is now.

    Raises:
      DataError: `datasets` is missing or can't load it; no such columns; no rows.
    """
    rows = _load_dataset(name)
    return rows.select_columns(sorted(_fields(f"{HUGGINGFACE}{name}", rows.column_names)))


def _fields(source: str, columns: Sequence[str]) -> set[str]:
    """Which of the columns make a document."""
    fields = next((f for f in _FIELDS if f <= set(columns)), None)
    if fields is None:
        raise DataError(
            f"{source}: the columns are {', '.join(columns)}; expected text, or question and "
            "answer. Save what you need as JSONL."
        )
    return fields


def _load_dataset(name: str) -> Any:
    """The same with all columns."""
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
    pinned = next(({"revision": known.revision} for known in PUBLISHED.values() if known.repository == path), {})
    try:
        rows = datasets.load_dataset(path, *parts[2:], split=split or "train", **pinned)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{HUGGINGFACE}{name}: can't be loaded ({error}).") from error
    if not len(rows):
        raise DataError(f"{HUGGINGFACE}{name}: there are no rows.")
    return rows


def _files(root: pathlib.Path) -> list[pathlib.Path]:
    if not root.is_dir():
        return [root]
    try:
        files = sorted(p for p in root.iterdir() if p.is_file() and p.suffix in _SUFFIXES)
    except OSError as error:
        raise DataError(f"{root}: can't be read ({error.strerror or error}).") from None
    if not files:
        raise DataError(f"{root}: the directory holds no file that ends in {', '.join(_SUFFIXES)}.")
    return files


def _read(file: pathlib.Path) -> Iterator[tuple[dict, str]]:
    if file.suffix == ".json":
        raise DataError(f"{file}: is JSON; expected JSON lines: one object per line, in a file that ends in .jsonl.")
    text = _text(file)
    if file.suffix != ".jsonl":
        yield {"text": text}, f"{file}:1"
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(line, f"{file}:{number}"), f"{file}:{number}"


def _text(file: pathlib.Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror or error}).") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file with UTF-8 encoding."
        ) from None
    if not text.strip():
        raise DataError(f"{file}: the file is empty; expected text, or one JSON object per line.")
    return text


def _parse(line: str, origin: str) -> dict:
    expected = '{"text": ...} or {"question": ..., "answer": ...}'
    item = _object(line, origin, expected)
    if set(item) not in _FIELDS:
        raise DataError(f"{origin}: the keys are {', '.join(sorted(item)) or 'none'}; expected {expected}.")
    return item


def _object(line: str, origin: str, expected: str) -> dict:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: not JSON ({error.msg}, column {error.colno}); expected {expected} on each line."
        ) from None
    if not isinstance(item, dict):
        raise DataError(f"{origin}: a JSON {_json_type(item)}; expected {expected}.")
    return item


def _document(item: dict, origin: str) -> Document:
    """The document of a line or row whose keys are known to be right."""
    for key, value in item.items():
        if not isinstance(value, str):
            raise DataError(f"{origin}: {key} is a JSON {_json_type(value)}; expected text.")
        if not value.strip():
            raise DataError(f"{origin}: {key} is empty.")
        if not _is_unicode(value):
            raise DataError(f"{origin}: {key} holds half of a surrogate pair (\\ud800 to \\udfff).")
    if "text" in item:
        return Document(item["text"], origin)
    return Document(f"Question: {item['question']}\nAnswer:", origin, answer=f" {item['answer']}")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def document_hash(document: Document) -> str:
    """Hash of the words of a document: case and white space make no difference."""
    words = f"{document.text} {document.answer or ''}".casefold().split()
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def overlap(left: Sequence[Document], right: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Documents of `left` that stand in `right` too, each with its first twin there (`document_hash`)."""
    twins: dict[str, Document] = {}
    for document in right:
        twins.setdefault(document_hash(document), document)
    hashed = ((document, twins.get(document_hash(document))) for document in left)
    return [(document, twin) for document, twin in hashed if twin is not None]


def check_leakage(train: Sequence[Document], held_out: Sequence[Document]) -> None:
    """Raises `DataError` if a held-out document is trained on."""
    if leaked := overlap(held_out, train):
        document, twin = leaked[0]
        raise DataError(
            f"{len(leaked)} held-out documents are also trained on, for example {document.origin} = {twin.origin}."
        )
