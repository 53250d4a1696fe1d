"""Files of a run: small ones, written whole under a temporary name and then renamed, by process 0 alone.

A path may be an address such as gs://bucket/runs/a. It is then an `etils.epath` path, which behaves like a `pathlib`
one; numbers and tensors are read and written through a local copy (`local_copy`, `replacing`).

Work goes by stages (`run_stage`): each names the digest of every file that it wrote, and is skipped, and believed, only
while its settings and those files are what they were.

What is not a plain value goes to JSON and back by `encode` and `decode`. Arrays become lists. JSON has no NaN: numbers
that are not finite become null, and null becomes NaN where a number is expected.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import typing
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.io.progress import say, timed
from trace_jax.parallel.processes import barrier, broadcast_from_process_0, is_main

T = TypeVar("T")
_SCHEME = "gs://"
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.(tmp|old)(\..+)?")  # names of `replacing`
_SECONDS_BETWEEN_WRITES = 30.0
_LARGE = 64 << 20  # bytes; of a larger object in a store the size stands for the digest, since reading it is transfer
_written: contextvars.ContextVar[set[Path]] = contextvars.ContextVar("written")  # what `collected` collects
_hints = functools.lru_cache(typing.get_type_hints)


def as_path(path: str | os.PathLike) -> Path:
    """`path` as a `pathlib` path, or as the path that stands for an address gs://BUCKET/NAME."""
    text = os.fspath(path)
    if not is_remote(path):
        return Path(text)
    if not text.startswith(_SCHEME) or not text.removeprefix(_SCHEME).strip("/"):
        raise ConfigError(f"{text}: expected a local path, or an address {_SCHEME}BUCKET/NAME.")
    import fsspec.config
    from etils import epath

    # Lists of objects that are kept would show another process's files as they were, at the length they had.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    try:
        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise ConfigError(f"{text}: needs a package that reads {_SCHEME}: pip install gcsfs.") from None
    return cast(Path, epath.Path(text))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is an address in an object store: nothing there is renamed, extended or mapped into memory."""
    return "://" in os.fspath(path)


def shown(path: str | os.PathLike) -> str:
    """The full path or address, for people."""
    return os.fspath(path) if is_remote(path) else str(Path(path).resolve())


def link(path: str | os.PathLike) -> str:
    """The address of a file, file://... or gs://..., which most terminals open."""
    return os.fspath(path) if is_remote(path) else Path(path).resolve().as_uri()


def free_bytes(path: str | os.PathLike) -> float:
    """Space left where `path` is or will be; endless in an object store."""
    if is_remote(path):
        return float("inf")
    return shutil.disk_usage(_there(path)).free


def check_writable(path: str | os.PathLike) -> None:
    """Raises ConfigError if no directory `path` can be made, or nothing written in it. Nothing is left behind."""
    if is_remote(path) or not is_main():
        return
    try:
        with tempfile.TemporaryFile(dir=_there(path)):
            return
    except OSError as error:
        raise ConfigError(f"{path}: can't be written ({error.strerror or error}); choose another directory.") from None


def _there(path: str | os.PathLike) -> Path:
    """`path`, or the nearest of its parents that exists."""
    there = Path(path).absolute()
    return next(p for p in (there, *there.parents) if p.exists())


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary local path, of a file or (not for an address) a directory to be made; on success it takes the
    place of `path`, on any error it vanishes. In other processes than 0 it always vanishes.
    """
    path = as_path(path)
    if not is_main() or is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            temporary = Path(scratch) / path.name
            yield temporary
            if is_main():
                _PENDING.pop(os.fspath(path), None)
                _copy(temporary, path)
                _collect(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.stem}.{os.getpid()}.{kind}{path.suffix}") for kind in ("tmp", "old"))
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # which is not replaced in a single step
            path.rename(old)
        os.replace(temporary, path)
        _collect(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            remove(left)


def sweep(directory: Path) -> None:
    """Removes what `replacing` left below a local directory in processes that were killed; what one had put aside, and
    not replaced, is in its place again.
    """
    for left in list(directory.rglob(".*")):
        if match := _TEMPORARY.fullmatch(left.name):
            path = left.with_name(match[1] + (match[3] or ""))
            if match[2] == "old" and not path.exists():
                left.rename(path)
            remove(left)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("wb") as copy:  # at an address it appears whole
        shutil.copyfileobj(file, copy, 16 << 20)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """Yields `path` itself, or a local copy of what is at the address."""
    path = as_path(path)
    with tempfile.TemporaryDirectory() if is_remote(path) else contextlib.nullcontext() as scratch:
        copy = Path(scratch) / path.name if scratch else path
        if scratch:
            _copy(path, copy)
        yield copy


def remove(path: str | os.PathLike) -> None:
    """Removes a file, or a directory with all that is in it, if it is there. Process 0 alone does."""
    path = as_path(path)
    if not is_main():
        return
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif is_remote(path):
        cast(Any, path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _collect(path: Path) -> None:
    _written.get(set()).add(path)


@contextlib.contextmanager
def collected() -> Iterator[set[Path]]:
    """Yields the set of the paths that are written within, or found finished."""
    token = _written.set(made := set())
    try:
        yield made
    finally:
        _written.reset(token)
        _written.get(set()).update(made)


def run_stage(
    name: str, directory: Path, identity: str, title: str, make: Callable[[], Any], load: Callable = lambda: None
) -> Any:
    """What `make` makes, and writes into the directory, or what `load` reads where that has been made. NAME.stage.json
    keeps `identity`, the hash of every setting that shapes it, and digests of its files; every process goes the same
    way.
    """
    marker = directory / f"{name}.stage.json"
    if _is_finished(marker, identity, title):
        say(f"{title}: already done")
        return load()
    with timed(title), collected() as made:
        result = make()
    finish(marker, identity, made)
    barrier(f"{title}: written")  # later stages read it, on every process
    return result


def finish(marker: Path, identity: str, made: Collection[Path]) -> None:
    """Writes down that work is finished: the hash of what shaped it, and the digests of the files that it made. Process
    0 alone does.
    """
    if is_main():
        flush_lines()
        names = {os.path.relpath(path, marker.parent): path for path in made if path.exists()}
        digests = {name: _digest(names[name]) for name in sorted(names)}
        write_json(marker, {"identity": identity, "files": digests})


def _is_finished(marker: Path, identity: str, title: str) -> bool:
    """Whether the work is finished that this identity shaped, and its files are what they were; what is not goes, and
    is said. The same on every process.
    """
    problem = damage(marker) if is_main() else ""
    stored = None if problem else read_json(marker)
    if broadcast_from_process_0(stored is not None and stored.get("identity") == identity):
        stored = stored or {}  # which other processes need not see yet
        _written.get(set()).update(_beside(marker, name) for name in stored.get("files", ()))
        return True
    if marker.exists():
        say(f"{title}: {problem or 'its settings changed'}, so it is made anew")
        remove(marker)
    return False


def damage(marker: Path) -> str:
    """What is not as it was when `finish` wrote the marker, for people; "" if all is."""
    try:
        stored = read_json(marker)
        digests = {} if stored is None else stored["files"]
        changed = [name for name, digest in digests.items() if _digest(_beside(marker, name)) != digest]
    except (ValueError, LookupError, AttributeError, TypeError, OSError):  # the marker itself isn't what was written
        changed = [marker.name]
    return f"{_beside(marker, changed[0])} is not as it was written" if changed else ""


def _beside(marker: Path, name: str) -> Path:
    """The file that a marker names from where it is; addresses know no "..", so that is followed here."""
    ups = name.count("../")
    return [marker.parent, *marker.parent.parents][ups] / name[3 * ups :]


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files below a directory with their names; "" if it isn't there."""
    if path.is_dir():
        inside = sorted(os.fspath(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        return hashlib.sha256("".join(f"{name} {_digest(path / name)}\n" for name in inside).encode()).hexdigest()
    if not path.exists():
        return ""
    if is_remote(path) and (size := cast(Any, path.stat()).length) > _LARGE:
        return f"{size} bytes"
    with path.open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def read_arrays(path: str | os.PathLike, names: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or of these names those that it has. ValueError: it is damaged."""
    try:
        with local_copy(path) as local, local.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("it is a single one")
            return {name: arrays[name] for name in names or arrays.files if name in arrays.files}
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: can't be read as arrays ({error}). Remove it to make it anew.") from error


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Any], *, compress: bool = True) -> None:
    """Writes an .npz file. TypeError: an array holds Python objects, which would be pickled."""
    held: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    if objects := [name for name, array in held.items() if array.dtype.hasobject]:
        raise TypeError(f"{path}: {objects} hold Python objects; arrays of numbers or text are expected")
    with replacing(path) as temporary:
        (np.savez_compressed if compress else np.savez)(temporary, **held)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON, indented so that a person can read it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, default=str) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any | None:
    """The JSON value in `path`, or None if there is no such file."""
    path = as_path(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8")) if path.exists() else None
    except ValueError as error:  # of the text, or of its encoding
        raise ValueError(f"{path}: not valid JSON ({error}). Remove it to make it anew.") from error


def read_lines(path: str | os.PathLike) -> list[dict]:
    """The JSON objects of a line-delimited file; a last line cut short by an interruption is dropped. ValueError:
    another line is damaged.
    """
    flush_lines()
    path, rows = as_path(path), []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line.decode("utf-8")))
            rows[-1].items()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error}). Run it again to make it anew.") from error
    return rows


def append_line(path: str | os.PathLike, row: dict) -> None:
    """Adds one JSON object to a line-delimited file: at once; at an address, which can only be written anew, every 30
    seconds and by `flush_lines`.
    """
    if not is_main():
        return
    path, line = as_path(path), json.dumps(row) + "\n"
    _collect(path)
    if is_remote(path):
        since, lines = _PENDING.setdefault(os.fspath(path), (time.monotonic(), []))
        lines.append(line)
        if time.monotonic() - since > _SECONDS_BETWEEN_WRITES:
            flush_lines()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def flush_lines() -> None:
    """Writes what `append_line` still holds; needed before a state is saved that the lines belong to."""
    while _PENDING:
        address, (_, lines) = _PENDING.popitem()
        path = as_path(address)
        path.write_bytes((path.read_bytes() if path.exists() else b"") + "".join(lines).encode("utf-8"))


_PENDING: dict[str, tuple[float, list[str]]] = {}  # lines by address, and since when the first of them waits


def encode(value: Any, *, digits: int | None = None) -> Any:
    """A dataclass, mapping, sequence, array or number as plain values; floats with so many significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: encode(item, digits=digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, digits=digits) for item in value]
    if isinstance(value, float):
        value = value if math.isfinite(value) else None
    return float(f"{value:.{digits}g}") if digits is not None and isinstance(value, float) else value


def decode(cls: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclass that `encode` made `plain` from: of numbers, text and arrays, and of tuples and mappings of them. A
    ValueError where a field without a default is missing, or one is unknown.
    """
    try:
        return cls(**{name: _decode(_hints(cls).get(name), value) for name, value in plain.items()})
    except TypeError as error:
        raise ValueError(f"not a {cls.__name__}: {error}.") from None


def _decode(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return math.nan if value is None else float(value)
    if hint is np.ndarray:
        array = np.array(value)
        return array.astype(np.float64) if array.dtype == object else array
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in value)
    return {key: _decode(arguments[1], item) for key, item in value.items()} if origin is Mapping else value
