"""TensorFlow Datasets of the published data sets, in array_record. TensorFlow itself is never imported.

Shards are written in the order of the rows (`ShardBasedBuilder`): tfds' builders that may shuffle keep what is larger
than 1 GB in temporary files, which only TensorFlow can write.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax.data.errors import DataError
from trace_jax.data.published import files as published_files
from trace_jax.data.published.download import download
from trace_jax.data.published.table import INTEGER, TEXTS, Published, Subset, overview, published
from trace_jax.data.tfds import RECORD, import_tfds, tfds_directory
from trace_jax.io.files import as_path, is_remote, write_json
from trace_jax.io.progress import say

HUB = "hub"
VERSION = "1.0.0"  # of the layout; which data it is says the revision
SHARD_ROWS = 4096  # a shard is held in memory while it is written
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class _Part:
    """One configuration: the files of each split, and how many rows they hold."""

    config: str
    subset: Subset
    files: Mapping[str, Sequence[Path]]
    rows: Mapping[str, int]


def build(
    name: str,
    *,
    source: str = HUB,
    revision: str | None = None,
    data_dir: str | None = None,
    accept_counts: bool = False,
    overwrite: bool = False,
) -> str:
    """Builds a published data set, or one configuration of it; returns what was built, for people.

    All of it is written under a temporary name, and takes its place once everything is there and counted. Beside the
    data, `published.json` holds repository, revision, rows per split and the hashes of the files.

    Args:
      name: NAME or NAME/CONFIG of the table (`published`).
      source: "hub", or a directory with the files of its repository as downloaded (`files.patterns`).
      revision: a commit, branch or tag of the hub, instead of the table's. Of a directory it is found in what
        `hf download` leaves there; where it is not, the hash of the files stands for it.
      data_dir: where data sets of tfds lie; `tfds_directory` unless given.
      accept_counts: build with other numbers of rows than the table's.
      overwrite: replace what is there.

    Raises:
      DataError: an unknown name; a file that is missing or of another form; other numbers of rows than the table's;
        a data set that is there already; no access, or no connection.
    """
    base, dataset, configs = published(name)
    import_tfds(name)  # what is missing is said before anything is downloaded
    directory = as_path(data_dir) if data_dir else tfds_directory()
    if is_remote(directory):
        raise DataError(f"{directory}: data sets are built on a local disk; copy them there after.")
    directory = directory.expanduser()
    targets = {config: directory / base / config / VERSION for config in configs}
    if not overwrite and (there := [str(target) for target in targets.values() if target.exists()]):
        raise DataError(f"{', '.join(there)}: is there already; add --overwrite to build it anew.")

    if source == HUB:
        root, revision = download(base, dataset, configs, revision or dataset.revision)
    else:
        root = Path(source).expanduser()
        if not root.is_dir():
            raise DataError(f"{source}: there is no such directory.")
    parts = [_part(root, dataset, config) for config in configs]
    hashes = {str(f.relative_to(root)): _sha256(f) for part in parts for fs in part.files.values() for f in fs}
    revision = _revision(root, hashes, revision)
    if not accept_counts:
        _check_counts(dataset, revision, parts)

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{base}-", dir=directory) as scratch:
        for part in parts:
            _write(base, dataset, part, revision, Path(scratch))
            record = _record(base, dataset, part, revision, root, hashes)
            write_json(Path(scratch) / base / part.config / VERSION / RECORD, record)
        for config, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(scratch) / f"{config}-before")
            (Path(scratch) / base / config / VERSION).rename(target)
    return _summary(base, dataset, revision, parts, directory)


def _part(root: Path, dataset: Published, config: str) -> _Part:
    subset = dataset.subsets[config]
    files = {split: published_files.find(root, dataset, config, split) for split in subset.rows}
    return _Part(config, subset, files, {split: published_files.count(found) for split, found in files.items()})


def _revision(root: Path, hashes: Mapping[str, str], given: str | None) -> str:
    """The commit that the files are of; "sha256:" and their hash where nothing says so.

    `hf download` leaves the commit of each file beside it, and the SHA-256 of large ones. A cache of the hub has a
    directory per commit.

    Raises:
      DataError: files of several commits, or of another than is given; a file that was changed.
    """
    commits = set()
    for name, value in hashes.items():
        note = root / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        commit, etag = note.read_text(encoding="utf-8").split("\n")[:2] if note.exists() else ("", "")
        if len(etag) == len(value) and etag != value:
            raise DataError(f"{root / name}: is not what was downloaded; download it again.")
        commits.add(commit)
    if _COMMIT.fullmatch(root.resolve().name):
        commits = {root.resolve().name}
    if len(commits) > 1:
        raise DataError(
            f"{root}: its files are of several revisions: {', '.join(c or 'unknown' for c in sorted(commits))}."
        )
    (commit,) = commits
    if commit and given and given != commit:
        raise DataError(f"{root}: is of revision {commit}, and {given} is given.")
    whole = hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode())
    return given or commit or f"sha256:{whole.hexdigest()[:16]}"


def _record(
    name: str, dataset: Published, part: _Part, revision: str, root: Path, hashes: Mapping[str, str]
) -> dict[str, Any]:
    """What stands beside the data."""
    files = [str(file.relative_to(root)) for several in part.files.values() for file in several]
    return {
        "name": f"{name}/{part.config}",
        "repository": dataset.repository,
        "revision": revision,
        "pinned_revision": dataset.revision,
        "licence": dataset.licence,
        "rows": dict(part.rows),
        "sha256": {file: hashes[file] for file in files},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_counts(dataset: Published, revision: str, parts: Sequence[_Part]) -> None:
    for part in parts:
        for split, found in part.rows.items():
            expected = part.subset.rows[split]
            if expected not in (None, found):
                raise DataError(
                    f"{part.config}:{split} of {dataset.repository} has {found:,} rows at revision {revision}; "
                    f"expected {expected:,}, as at {dataset.revision}. What is measured on it doesn't compare with "
                    "published numbers; add --accept-counts to build it all the same."
                )


def _write(name: str, dataset: Published, part: _Part, revision: str, directory: Path) -> None:
    """Writes one configuration under `directory`, as tfds lays it out."""
    tfds = import_tfds(name)
    builder = _builder(tfds, name, dataset, part, revision)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download of unknown size
        builder(data_dir=os.fspath(directory), config=part.config, file_format="array_record").download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    for split, rows in part.rows.items():
        say(f"{name}/{part.config}:{split}: {rows:,} rows")


def _builder(tfds: Any, name: str, dataset: Published, part: _Part, revision: str) -> Any:
    """The class of tfds that builds one configuration of the data set `name`."""

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self) -> None:
            """Nothing: these data sets aren't in Google's bucket, and it isn't asked."""

    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.ShardBasedBuilder):
            VERSION = tfds.core.Version(VERSION)
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=part.config),)
            code_path = None  # nothing beside this code, such as checksums of downloads, is of use to tfds

            def _info(self) -> Any:
                return Info(
                    builder=self,
                    description=dataset.about,
                    features=_features(tfds, part.subset),
                    homepage=f"https://huggingface.co/datasets/{dataset.repository}",
                    license=dataset.licence,
                    disable_shuffling=True,
                    metadata=tfds.core.MetadataDict(repository=dataset.repository, revision=revision),
                )

            def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list]:
                del dl_manager
                shards = {}
                for split, count in part.rows.items():
                    rows = enumerate(published_files.rows(part.files[split], part.subset.columns))
                    shards[split] = [functools.partial(itertools.islice, rows, SHARD_ROWS)] * -(-count // SHARD_ROWS)
                return shards

    Builder.name = name
    return Builder


def _features(tfds: Any, subset: Subset) -> Any:
    def feature(kind: str) -> Any:
        if kind == INTEGER:
            return tfds.features.Scalar(np.int64)
        text = tfds.features.Text()
        return tfds.features.Sequence(text) if kind == TEXTS else text

    return tfds.features.FeaturesDict({name: feature(kind) for name, kind in subset.columns.items()})


def _summary(name: str, dataset: Published, revision: str, parts: Sequence[_Part], directory: Path) -> str:
    lines = [f"{name} ({dataset.repository} at {revision}) is built in {directory}"]
    if revision != dataset.revision:
        lines.append(f"the pinned revision is {dataset.revision}")
    lines.append(f"it is read as tfds:{name}/{parts[0].config}:{next(iter(parts[0].rows))}")
    if directory.resolve() != tfds_directory().resolve():
        lines.append(f"before that: export TFDS_DATA_DIR={directory.resolve()}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command `data`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print which there are: rows, revision, licence, gated")
    what.add_argument("--name", metavar="NAME[/CONFIG]", help="build this one, or one configuration of it")
    parser.add_argument("--source", default=HUB, metavar="DIR", help="its files as downloaded; default: the hub")
    parser.add_argument("--revision", metavar="R", help="commit, branch or tag of the hub, instead of the pinned one")
    parser.add_argument("--data-dir", metavar="DIR", help="where it goes; default: TFDS_DATA_DIR or tfds' own")
    parser.add_argument("--accept-counts", action="store_true", help="build with other numbers of rows than recorded")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def main(options: argparse.Namespace) -> int:
    """The command `data`."""
    if options.list:
        print(overview())
        return 0
    names = ("source", "revision", "data_dir", "accept_counts", "overwrite")
    print(build(options.name, **{name: getattr(options, name) for name in names}))
    return 0
