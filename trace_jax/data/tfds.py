"""Data sets that TensorFlow Datasets has prepared in array_record: random access, and TensorFlow is never imported."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.data.errors import DataError
from trace_jax.io.files import as_path, read_json

TFDS = "tfds:"
RECORD = "published.json"  # beside the data of what was built here: its revision, rows and files
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one split, read when they are asked for."""

    columns: tuple[str, ...]
    source: Sequence[Any]

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (_plain(self.source[index]) for index in range(len(self)))


def import_tfds(name: str) -> Any:
    """The package tensorflow_datasets, without TensorFlow.

    Raises:
      DataError: it, or what reads array_record, isn't installed.
    """
    for package in ("tensorflow_datasets", "array_record"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{name}: needs the package {package}: pip install 'trace-jax[data]'. Or use JSONL.")
    return importlib.import_module("tensorflow_datasets")


def tfds_directory() -> Path:
    """Where data sets lie, as for tfds itself: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return as_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_tfds(name: str) -> Rows:
    """A split of a data set of tfds, with all columns and at least one row.

    Args:
      name: NAME[/CONFIG][:SPLIT]. CONFIG is needed where there are several. SPLIT is train unless given, and may be
        what tfds allows: train[:1000], train[10%:], train+test.

    Raises:
      DataError: not prepared (how to build it), several configurations, no such split, no rows.
    """
    address, _, split = name.partition(":")
    directory = prepared(address)
    builder = import_tfds(f"{TFDS}{name}").builder_from_directory(os.fspath(directory))
    try:
        source = builder.as_data_source(split=split or "train")
    except (ValueError, NotImplementedError, OSError) as error:
        raise DataError(f"{TFDS}{name}: can't be read from {directory} ({str(error).splitlines()[0]}).") from error
    if not len(source):
        raise DataError(f"{TFDS}{name}: there are no rows.")
    return Rows(tuple(sorted(builder.info.features)), source)


def prepared(address: str) -> Path:
    """The directory of the newest prepared version of NAME or NAME/CONFIG.

    Raises:
      DataError: there is none; several configurations, and none is named.
    """
    root = tfds_directory() / address
    found = _versions(root)
    if not found:
        configs = {path.name: versions for path in _directories(root) if (versions := _versions(path))}
        if len(configs) > 1:
            raise DataError(f"{TFDS}{address}: has the configurations {', '.join(sorted(configs))}; name one.")
        found = next(iter(configs.values()), [])
    if not found:
        raise DataError(
            f"{TFDS}{address}: is not in {tfds_directory()} (TFDS_DATA_DIR). Published data sets are built with "
            "python -m trace_jax.main data --name NAME; data --list says which there are."
        )
    return max(found, key=lambda path: tuple(map(int, path.name.split("."))))


def is_prepared(address: str) -> bool:
    """Whether NAME or NAME/CONFIG can be read here."""
    try:
        prepared(address)
    except DataError:
        return False
    return True


def revision(address: str) -> str:
    """What was recorded when NAME/CONFIG was built here; of another data set its version."""
    directory = prepared(address)
    return (read_json(directory / RECORD) or {"revision": f"version {directory.name}"})["revision"]


def _versions(root: Path) -> list[Path]:
    found = [path for path in _directories(root) if _VERSION.fullmatch(path.name)]
    return [path for path in found if (path / "dataset_info.json").exists()]


def _directories(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _plain(value: Any) -> Any:
    """What JSON would hold: text, numbers, lists and objects."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
