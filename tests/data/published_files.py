"""Files in the published schemas, with made-up rows: as `hf download` lays them out."""

import hashlib

import pyarrow
import pyarrow.parquet

from tests.tiny import write_lines
from trace_jax.data.published import INTEGER, PUBLISHED, TEXTS

COMMIT = "0123456789" * 4


def made_up(columns, count, tag):
    """`count` rows with a value of the right kind in every column, told apart by their numbers."""

    def value(name, kind, number):
        values = {INTEGER: number % 4, TEXTS: [f"{name} {number} {i}" for i in range(4)]}
        return values.get(kind, f"{tag} {name} {number} é")

    return [{name: value(name, kind, number) for name, kind in columns.items()} for number in range(count)]


def write_parquet(path, rows, shards=1):
    """Rows in parquet files as the hub names them; `path` is DIRECTORY/SPLIT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    for shard in range(shards):
        table = pyarrow.Table.from_pylist(rows[shard * size : (shard + 1) * size])
        pyarrow.parquet.write_table(table, path.with_name(f"{path.name}-{shard:05d}-of-{shards:05d}.parquet"))


def download(root, name, *, counts=None, commit=None):
    """A copy of a repository of the table; returns its rows per configuration and split.

    `counts`: (config, split) -> other numbers of rows than the table's. `commit`: what `hf download` notes of a file.
    """
    dataset, written = PUBLISHED[name], {}
    for config, subset in dataset.subsets.items():
        for split, expected in subset.rows.items():
            rows = made_up(subset.columns, (counts or {}).get((config, split), expected or 3), f"{config} {split}")
            written[config, split] = rows
            if name == "tofu":
                write_lines(root / f"{config}.json", rows)
            elif config == "default":
                write_parquet(root / "data" / split, rows, shards=2)
            else:
                write_parquet(root / config / split, rows)
    for file in [file for file in root.rglob("*") if commit and file.is_file()]:
        note = root / ".cache" / "huggingface" / "download" / f"{file.relative_to(root)}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        etag = hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".parquet" else COMMIT
        note.write_text(f"{commit}\n{etag}\n1712656091.123\n")
    return written
