"""The experiments that come with the package; listed without importing what runs them."""

import argparse
import ast
from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """The files of configs/ that describe an experiment, by name: in a wheel beside the code, else in its checkout."""
    package = Path(__file__).resolve().parents[1]
    found = (package / "configs", package.parent / "configs")
    files = sorted(file for directory in found for file in directory.glob("*.py"))
    return {file.stem: file for file in files if "\ndef get_config(" in file.read_text("utf-8")}


def main(options: argparse.Namespace) -> int:
    """The command `configs`."""
    for name, file in shipped_configs().items():
        about = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        print(f"{name:<18}{about.partition(chr(10))[0]}")
    return 0
