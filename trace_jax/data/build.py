"""TensorFlow Datasets of the published data sets, in array_record. TensorFlow itself is never imported.

Shards are written in the order of the rows (`ShardBasedBuilder`): tfds' builders that may shuffle keep what is larger
than 1 GB in temporary files, which only TensorFlow can write. Errors name file and row, and never quote what is there.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (its HTTP client's, whichever)

from trace_jax.data import sources
from trace_jax.data.published import INTEGER, TEXT, TEXT_OR_NULL, TEXTS, DataError, Published, overview, published
from trace_jax.io.files import as_path, is_remote, write_json
from trace_jax.io.progress import say

HUB = "hub"
VERSION = "1.0.0"  # of the layout; which data it is says the revision
SHARD_ROWS = 4096  # a shard is held in memory while it is written
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")


def build(
    name: str,
    *,
    source: str = HUB,
    revision: str | None = None,
    data_dir: str | None = None,
    accept_counts: bool = False,
    overwrite: bool = False,
) -> str:
    """Builds a published data set, or one configuration of it (`published`); returns what was built, for people.

    The options are those of the command. All of it is written under a temporary name, and takes its place once it is
    there and counted, with `published.json`: repository, revision, rows per split and the hashes of the files.
    """
    base, dataset, configs = published(name)
    tfds = sources.import_optional(name, *sources.TFDS_PACKAGES)  # before anything is downloaded
    directory = as_path(data_dir) if data_dir else sources.tfds_directory()
    if is_remote(directory):
        raise DataError(f"{directory}: data sets are built on a local disk; copy them there after.")
    directory = directory.expanduser()
    targets = {config: directory / base / config / VERSION for config in configs}
    if not overwrite and (there := [str(target) for target in targets.values() if target.exists()]):
        raise DataError(f"{', '.join(there)}: is there already; add --overwrite to build it anew.")

    if source == HUB:
        root, revision = _download(base, dataset, configs, revision or dataset.revision)
    elif not (root := Path(source).expanduser()).is_dir():
        raise DataError(f"{source}: there is no such directory.")
    files = {c: {split: find(root, dataset, c, split) for split in dataset.subsets[c].rows} for c in configs}
    hashes: dict[str, dict[str, str]] = {config: {} for config in configs}  # by the names of its files
    for config, file in ((c, f) for c, splits in files.items() for several in splits.values() for f in several):
        with file.open("rb") as opened:
            hashes[config][str(file.relative_to(root))] = hashlib.file_digest(opened, "sha256").hexdigest()
    revision = _revision(root, {name: value for own in hashes.values() for name, value in own.items()}, revision)
    counts: dict[str, dict[str, int]] = {config: {} for config in configs}
    for config, split in ((c, split) for c in configs for split in files[c]):
        subset = dataset.subsets[config]  # every row is checked before any is written
        count = counts[config][split] = sum(1 for _ in rows(files[config][split], subset.columns))
        if not accept_counts and subset.rows[split] not in (None, count):
            raise DataError(
                f"{config}:{split} of {dataset.repository} has {count:,} rows at revision {revision}; expected "
                f"{subset.rows[split]:,}, as at {dataset.revision}. What is measured on it doesn't compare with "
                "published numbers; add --accept-counts to build it all the same."
            )

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{base}-", dir=directory) as scratch:
        for config, splits in files.items():
            builder = _builder(tfds, base, dataset, config, splits, counts[config], revision)
            with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download of unknown size
                builder(data_dir=scratch, config=config, file_format="array_record").download_and_prepare()
            for split, number in counts[config].items():
                say(f"{base}/{config}:{split}: {number:,} rows")
            record = {"name": f"{base}/{config}", "repository": dataset.repository, "revision": revision}
            record |= {"pinned_revision": dataset.revision, "licence": dataset.licence}
            record |= {"rows": counts[config], "sha256": hashes[config]}
            write_json(Path(scratch) / base / config / VERSION / sources.RECORD, record)
        for config, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(scratch) / f"{config}-before")
            (Path(scratch) / base / config / VERSION).rename(target)

    lines = [f"{base} ({dataset.repository} at {revision}) is built in {directory}"]
    if revision != dataset.revision:
        lines.append(f"the pinned revision is {dataset.revision}")
    lines.append(f"it is read as tfds:{base}/{configs[0]}:{next(iter(counts[configs[0]]))}")
    if directory.resolve() != sources.tfds_directory().resolve():
        lines.append(f"before that: export TFDS_DATA_DIR={directory.resolve()}")
    return "\n".join(lines)


def _download(name: str, dataset: Published, configs: Sequence[str], revision: str) -> tuple[Path, str]:
    """(directory, commit) of the files of some configurations of the hub, or its cache, at a commit, branch or tag."""
    wanted = {p for c in configs for split in dataset.subsets[c].rows for p in patterns(dataset, c, split)}
    try:
        if not _COMMIT.fullmatch(revision):
            revision = huggingface_hub.HfApi().dataset_info(dataset.repository, revision=revision).sha or revision
        root = huggingface_hub.snapshot_download(
            dataset.repository, repo_type="dataset", revision=revision, allow_patterns=sorted(wanted)
        )
    except (OSError, ValueError, HTTPError) as error:
        statuses = {getattr(getattr(e, "response", None), "status_code", None) for e in (error, error.__cause__)}
        if dataset.gated and statuses & {401, 403}:
            raise DataError(f"{name}: {dataset.repository} is gated: {dataset.gated}.") from None
        why = str(error).strip().split("\n")[0] or type(error).__name__
        gated = f" It is gated: {dataset.gated}." if dataset.gated else ""
        raise DataError(
            f"{name}: {dataset.repository} can't be downloaded ({why}).{gated} Where the hub can be reached: "
            f"hf download {dataset.repository} --repo-type dataset --revision {revision} --local-dir DIR; then build "
            "it here with --source DIR."
        ) from None
    return Path(root), revision


def _revision(root: Path, hashes: Mapping[str, str], asked: str | None) -> str:
    """The commit that the files are of: a cache of the hub has it in its path, and `hf download` leaves it beside each
    file, with the SHA-256 of large ones. Else what was `asked` for, or "sha256:" and their hash.
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
    commit, *others = sorted(commits)
    if others:
        several = ", ".join([commit or "unknown", *others])
        raise DataError(f"{root}: its files are of several revisions: {several}.")
    if commit and asked and asked != commit:
        raise DataError(f"{root}: is of revision {commit}, and {asked} is given.")
    content = hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode())
    return asked or commit or f"sha256:{content.hexdigest()[:16]}"


def _builder(
    tfds: Any, name: str, dataset: Published, config: str, files: dict[str, list[Path]], counts: dict, revision: str
) -> Any:
    """The class of tfds that builds one configuration of the data set `name`."""
    text, subset = tfds.features.Text(), dataset.subsets[config]
    kinds = {INTEGER: tfds.features.Scalar(np.int64), TEXTS: tfds.features.Sequence(text)}
    features = {name: kinds.get(kind, text) for name, kind in subset.columns.items()}
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.ShardBasedBuilder):
            VERSION = tfds.core.Version(VERSION)
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config),)
            code_path = None  # nothing beside this code, such as checksums of downloads, is of use to tfds

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=dataset.about,
                    features=tfds.features.FeaturesDict(features),
                    homepage=f"https://huggingface.co/datasets/{dataset.repository}",
                    license=dataset.licence,
                    disable_shuffling=True,
                    metadata=tfds.core.MetadataDict(repository=dataset.repository, revision=revision),
                )

            def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list]:
                shards = {}
                for split, number in counts.items():
                    numbered = enumerate(rows(files[split], subset.columns))  # each shard goes on where one ended
                    shard = functools.partial(itertools.islice, numbered, SHARD_ROWS)
                    shards[split] = [shard] * -(-number // SHARD_ROWS)
                return shards

    Builder.name = name
    return Builder


def patterns(dataset: Published, config: str, split: str) -> list[str]:
    """Where a split may lie in a copy of the repository; the first that is there counts."""
    plain = (".parquet", ".jsonl", ".json")
    names = [f"{config}/{split}{ending}" for ending in ("-*-of-*.parquet", *plain)]
    if len(dataset.subsets[config].rows) == 1:
        names += [f"{config}{ending}" for ending in plain]
    if len(dataset.subsets) == 1:
        names += [f"data/{split}-*-of-*.parquet", *(f"{split}{ending}" for ending in plain)]
    return names


def find(root: Path, dataset: Published, config: str, split: str) -> list[Path]:
    """The files of a split under `root`, in the order of their rows."""
    searched = patterns(dataset, config, split)
    files = next((there for pattern in searched if (there := sorted(root.glob(pattern)))), [])
    if not files:
        raise DataError(f"{root}: no file of {config}:{split}; expected one of {', '.join(searched)}.")
    shards = [match.groups() for file in files if (match := _SHARD.search(file.name))]
    if shards and {int(index) for index, _ in shards} != set(range(int(shards[0][1]))):
        raise DataError(f"{files[0].parent}: {len(files)} of {int(shards[0][1])} files of {config}:{split} are there.")
    return files


def rows(files: Sequence[Path], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of the files, with those columns alone."""
    for file in files:
        for number, row in enumerate(_parquet(file, columns) if file.suffix == ".parquet" else _json(file), start=1):
            checked = {}
            for name, kind in columns.items():
                if name not in row:
                    raise DataError(f"{file}:{number}: there is no column {name}; the columns are {', '.join(row)}.")
                value = "" if row[name] is None and kind == TEXT_OR_NULL else row[name]
                if not is_kind(value, kind):
                    raise DataError(f"{file}:{number}: {name} is a {type(value).__name__}; expected {kind}.")
                checked[name] = value
            yield checked


def is_kind(value: object, kind: str) -> bool:
    """Whether a value is of the kind of its column; half of a surrogate pair is no text."""
    if kind == INTEGER:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind == TEXTS:
        return isinstance(value, list) and all(is_kind(item, TEXT) for item in value)
    return isinstance(value, str) and not sources.has_surrogate(value)


def _parquet(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    parquet = sources.import_optional(str(file), "pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as table:
            names = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=256, columns=names):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read as parquet; download it again.") from error


def _json(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, or of one JSON list."""
    if not next(sources.text_lines(file), "").lstrip().startswith("["):
        yield from (item for item, _ in sources.json_lines(file, "a JSON object"))
        return
    try:
        items = json.loads("".join(sources.text_lines(file)))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON ({error.msg}, column {error.colno}).") from None
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise DataError(f"{file}:{number}: expected a JSON object, not a {type(item).__name__}.")
        yield item


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
    settings = ("source", "revision", "data_dir", "accept_counts", "overwrite")
    print(build(options.name, **{name: getattr(options, name) for name in settings}))
    return 0
