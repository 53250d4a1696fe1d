"""Files of a published data set, as downloaded: which hold a split, how many rows, and the rows, checked.

Errors name the file and the row, and never quote what stands there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax.data.errors import DataError
from trace_jax.data.published.table import INTEGER, TEXT, TEXT_OR_NULL, TEXTS, Published

_BATCH = 256  # rows read from parquet at once
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")


def patterns(dataset: Published, config: str, split: str) -> list[str]:
    """Where a split may lie in a copy of the repository; the first that is there counts."""
    found = [f"{config}/{split}{ending}" for ending in ("-*-of-*.parquet", ".parquet", ".jsonl", ".json")]
    if len(dataset.subsets[config].rows) == 1:
        found += [f"{config}{ending}" for ending in (".parquet", ".jsonl", ".json")]
    if len(dataset.subsets) == 1:
        found += [f"data/{split}-*-of-*.parquet", f"{split}.parquet", f"{split}.jsonl", f"{split}.json"]
    return found


def find(root: Path, dataset: Published, config: str, split: str) -> list[Path]:
    """The files of a split under `root`, in the order of their rows.

    Raises:
      DataError: none of the `patterns`, or not every shard.
    """
    searched = patterns(dataset, config, split)
    files = next((there for pattern in searched if (there := sorted(root.glob(pattern)))), [])
    if not files:
        raise DataError(f"{root}: no file of {config}:{split}; expected one of {', '.join(searched)}.")
    shards = [match.groups() for file in files if (match := _SHARD.search(file.name))]
    if shards and {int(index) for index, _ in shards} != set(range(int(shards[0][1]))):
        raise DataError(f"{files[0].parent}: {len(files)} of {int(shards[0][1])} files of {config}:{split} are there.")
    return files


def count(files: Sequence[Path]) -> int:
    """How many rows the files hold."""
    return sum(_count(file) for file in files)


def rows(files: Sequence[Path], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of the files, with those columns alone.

    Raises:
      DataError: a missing column, or a value of another kind.
    """
    for file in files:
        for number, row in enumerate(_parquet(file, columns) if _is_parquet(file) else _json(file), start=1):
            yield {name: _checked(row, name, kind, f"{file}:{number}") for name, kind in columns.items()}


def _is_parquet(file: Path) -> bool:
    return file.suffix == ".parquet"


def _count(file: Path) -> int:
    if _is_parquet(file):
        with _opened(file) as table:
            return table.metadata.num_rows
    return sum(1 for _ in _json(file))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{file}: needs the package pyarrow: pip install 'trace-jax[data]'.") from None
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: can't be read as parquet; download it again.") from error


def _parquet(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    with _opened(file) as table:
        known = [name for name in columns if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=_BATCH, columns=known):
            yield from batch.to_pylist()


def _json(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, or of one JSON list."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            first = lines.readline()
            lines.seek(0)
            items = json.load(lines) if first.lstrip().startswith("[") else _lines(file, lines)
            for number, item in enumerate(items, start=1):
                if not isinstance(item, dict):
                    raise DataError(f"{file}:{number}: expected a JSON object, not a {type(item).__name__}.")
                yield item
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON ({error.msg}, column {error.colno}).") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8.") from None


def _lines(file: Path, lines: Iterator[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}:{number}: not JSON ({error.msg}, column {error.colno}).") from None


def _checked(row: Mapping[str, Any], name: str, kind: str, origin: str) -> Any:
    if name not in row:
        raise DataError(f"{origin}: there is no column {name}; the columns are {', '.join(row)}.")
    value = row[name]
    if value is None and kind == TEXT_OR_NULL:
        return ""
    if not _KINDS[kind](value):
        raise DataError(f"{origin}: {name} is a {type(value).__name__}; expected {kind}.")
    return value


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")  # half of a surrogate pair is no text
    except UnicodeEncodeError:
        return False
    return True


_KINDS = {
    TEXT: _is_text,
    TEXT_OR_NULL: _is_text,
    TEXTS: lambda value: isinstance(value, list) and all(map(_is_text, value)),
    INTEGER: lambda value: type(value) is int and -(2**63) <= value < 2**63,
}
