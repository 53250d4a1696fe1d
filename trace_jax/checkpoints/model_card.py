"""What an exported checkpoint says of itself: README.md, and config.json of a model that was trained here."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.families import model_config
from trace_jax.models.model import SpecialTokens


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


def readme(card: ModelCard | None, *, base_model: str | None, licence: Mapping[str, str], note: str) -> str:
    """The text of README.md. `note` says how the files differ from the source's."""
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
    lines += ["## Files", "", note, ""]
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
    path, keys = directory / "README.md", ("license", "license_name", "license_link")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    front = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    pairs = [line.partition(":") for line in front[1].splitlines()] if front else []
    return {key: value.strip().strip("'\"") for key, _, value in pairs if key in keys and value.strip()}


def base_model_of(directory: Path, config_json: Mapping[str, Any]) -> str:
    """The name of a checkpoint: of its hub repository where the path or config.json tells it, else its directory's."""
    cached = next((part for part in directory.absolute().parts if part.startswith("models--")), None)
    if cached:
        return cached.removeprefix("models--").replace("--", "/")
    return str(config_json.get("_name_or_path") or directory.absolute().name)


def mixtral_config_json(config: ModelConfig, special: SpecialTokens) -> dict[str, Any]:
    """config.json of a model trained here.

    Raises:
      ConfigError: the model has a switch that Mixtral doesn't have; the message names it.
    """
    windows = set(config.windows)
    fields = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.ropes[0].theta,
        "sliding_window": max(windows, default=0) or None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": special.bos,
        "eos_token_id": list(special.eos),
        "pad_token_id": special.pad,
    }
    read = dataclasses.replace(model_config(fields, dtype=config.dtype), grouped_matmul=config.grouped_matmul)
    names = [field.name for field in dataclasses.fields(config)]
    if other := [f"{n} = {getattr(config, n)!r}" for n in names if getattr(config, n) != getattr(read, n)]:
        raise ConfigError(
            f"a model that was not imported is exported as a mixtral, which can't express {', '.join(other)}."
        )
    return fields
