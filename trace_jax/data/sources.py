"""Text files of the user -> documents. Errors name the file and the line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Document:
    """With `answer`, `text` is a question and only the answer carries loss. `origin` is file:line, or a name."""

    text: str
    origin: str
    answer: str | None = None


class DataError(ValueError):
    """Text that can't be used. The message names file and line, what was expected, and what to do."""


_SUFFIXES = (".jsonl", ".txt", ".md")


def load_documents(path: str) -> list[Document]:
    """Documents of a JSONL file (one a line), a text file (one document) or a directory of such files, by name.

    A line of JSONL is an object with "text", or with "question" and "answer"; other keys are refused.

    Raises:
      DataError: nothing there, unreadable, not UTF-8, empty, or a line of another form.
    """
    if not path:
        raise DataError("The path is empty; expected a JSONL file, a text file or a directory of such files.")
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{root}: there is no such file or directory.")
    documents = [d for file in _files(root) for d in _read(file)]
    if not documents:
        raise DataError(f"{root}: the file is empty; expected text, or one JSON object per line.")
    return documents


def _files(root: pathlib.Path) -> list[pathlib.Path]:
    if not root.is_dir():
        return [root]
    try:
        files = sorted(p for p in root.iterdir() if p.is_file() and p.suffix in _SUFFIXES)
    except OSError as error:
        raise DataError(f"{root}: can't be read ({error.strerror}).") from None
    if not files:
        raise DataError(f"{root}: the directory holds no file that ends in {', '.join(_SUFFIXES)}.")
    return files


def _read(file: pathlib.Path) -> Iterator[Document]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror}).") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file with UTF-8 encoding."
        ) from None
    if not text.strip():
        raise DataError(f"{file}: the file is empty; expected text, or one JSON object per line.")
    if file.suffix != ".jsonl":
        yield Document(text, f"{file}:1")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(line, f"{file}:{number}")


def _parse(line: str, origin: str) -> Document:
    expected = 'expected {"text": ...} or {"question": ..., "answer": ...}'
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON ({error.msg}, column {error.colno}); {expected} on each line.") from None
    if not isinstance(item, dict):
        raise DataError(f"{origin}: a JSON {_json_type(item)}; {expected}.")
    if set(item) not in ({"text"}, {"question", "answer"}):
        raise DataError(f"{origin}: the keys are {', '.join(sorted(item)) or 'none'}; {expected}.")
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
