"""Writes the table of docs/models.md from what the tests measured of each family.

pytest tests/models/families -n 2 --record-families DIR
python scripts/models_table.py DIR
"""

import json
import sys
from pathlib import Path

from trace_jax.models.families import ALIASES, FAMILIES, family_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: written by scripts/models_table.py -->\n", "<!-- end of families -->"
MEASURES = {"router_logits": "router logits", "weights": "gate weights", "layers": "hidden states", "logits": "logits"}


def table(records: dict[str, dict]) -> str:
    """Markdown: one row per model_type, in the order of the registry."""
    header = ["`model_type`", "family", "published as", "layouts", *MEASURES.values()]
    rows = [header, ["---"] * len(header)]
    for model_type in (*FAMILIES, *ALIASES):
        family, record = family_of({"model_type": model_type}), records[model_type]
        differences = [f"{record['differences'][name]:.0e}" for name in MEASURES]
        rows.append([f"`{model_type}`", family.title, family.published, ", ".join(record["layouts"]), *differences])
    (version,) = {record["transformers"] for record in records.values()}
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{lines}\nMeasured against transformers {version}.\n"


def main(directory: str) -> None:
    records = {path.stem: json.loads(path.read_text()) for path in Path(directory).glob("*.json")}
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{table(records)}{END}{after}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
