"""docs/models.md lists the families that there are, with differences that are allowed."""

import importlib.util
from pathlib import Path

from trace_jax.models.families import ALIASES, FAMILIES

ROOT = Path(__file__).resolve().parents[3]


def script():
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "scripts" / "models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]


def test_the_committed_table_lists_the_registry():
    module = script()
    _, *rows = cells((ROOT / "docs" / "models.md").read_text().split(module.BEGIN)[1].split(module.END)[0])
    assert [row[0].strip("`") for row in rows[1:]] == [*FAMILIES, *ALIASES]
    assert all(float(difference) <= 1e-4 for row in rows[1:] for difference in row[-4:])


def test_the_table_is_written_from_the_record():
    module = script()
    record = {
        "layouts": ["original"],
        "transformers": "5.0",
        "differences": {name: 10.0**-place for place, name in enumerate(module.MEASURES, 4)},
    }
    text = module.table(dict.fromkeys([*FAMILIES, *ALIASES], record))
    first, family = cells(text)[2], next(iter(FAMILIES.values()))
    differences = ["1e-04", "1e-05", "1e-06", "1e-07"]
    assert first == [f"`{family.model_type}`", family.title, family.published, "original", *differences]
    assert text.endswith("transformers 5.0.\n")
