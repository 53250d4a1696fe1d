"""README.md of an exported checkpoint: what was done to the model, and what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a reader of the checkpoint should know.

    Args:
      unlearned: what the model was made to forget, in a sentence.
      method: name of the method.
      settings: its settings, by name.
      measured: rows of a table, all with the same columns.
    """

    unlearned: str
    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measured: Sequence[Mapping[str, Any]] = ()


_LICENCE_KEYS = ("license", "license_name", "license_link")


def readme(card: ModelCard | None, *, base_model: str | None, licence: Mapping[str, str], notes: Sequence[str]) -> str:
    """The text of README.md. `notes` are sentences about how the files differ from the source's."""
    front: dict[str, Any] = {**licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if base_model:
        front["base_model"] = base_model
    if card:
        front["tags"] = ["unlearning", "trace_jax"]
    name = base_model or "a model trained by trace_jax"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    if card:
        lines += [f"# {name}, unlearned", "", card.unlearned, "", f"Method: {card.method}, by trace_jax.", ""]
        lines += _table([{"setting": key, "value": value} for key, value in card.settings.items()], "Settings")
        lines += _table(card.measured, "Measured")
    else:
        lines += [f"# {name}", "", "Written by trace_jax; nothing is recorded about how it was made.", ""]
    lines += ["## Files", "", *notes, ""]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> list[str]:
    if not rows:
        return []
    columns = list(rows[0])
    cells = [[str(row.get(column, "")).replace("|", "\\|").replace("\n", " ") for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return [f"## {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""]


def licence_of(directory: Path) -> dict[str, str]:
    """The licence fields in the front matter of a checkpoint's README.md; none if it has none."""
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = {}
    lines = text.splitlines()
    if lines[:1] == ["---"] and "---" in lines[1:]:
        for line in lines[1 : lines.index("---", 1)]:
            key, _, value = line.partition(":")
            if key in _LICENCE_KEYS and value.strip():
                found[key] = value.strip().strip("'\"")
    return found


def base_model_of(directory: Path, config_json: Mapping[str, Any]) -> str:
    """The name of a checkpoint: of its hub repository where the path or config.json tells it, else its directory's."""
    cached = next((part for part in directory.absolute().parts if part.startswith("models--")), None)
    if cached:
        return cached.removeprefix("models--").replace("--", "/")
    return str(config_json.get("_name_or_path") or directory.absolute().name)
