"""The families whose checkpoints can be read, and the shapes of published models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.families.fields import ConfigReader
from trace_jax.models.families.switches import FAMILIES, Family

ALIASES = {"kimi_k2": "deepseek_v3"}  # published under another model_type
# config.json by name, so that a run can be planned and checked before anything is downloaded: that of the repository of
# the Hugging Face hub in `_name_or_path`, typed in by hand, without what the family's defaults already say. The 2 x 64
# factors of Phi's rotary embedding are ones, which have the right length. A run reads its checkpoint's own file.
PUBLISHED: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
# What decides which parameters there are, how large, and how many experts a token chooses.
_SHAPE = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "num_experts",
    "experts_per_token", "expert_hidden_size", "shared_hidden_size", "tie_embeddings", "router_bias",
    "router_correction", "expert_bias", "mlp_bias", "shared_gate", "dense_layers", "dense_hidden_size", "attention",
    "value_size", "latent_size", "query_latent_size", "rotary_width", "attention_bias", "attention_gate", "sinks",
    "qk_norm", "norm", "norm_placement", "moe_output_norm", "head_bias",
)  # fmt: skip


def family_of(config_json: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json; a `model_type` that isn't supported is a ConfigError."""
    name = config_json.get("model_type")
    model_type = ALIASES.get(str(name), str(name))
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {name!r}; supported: {', '.join(sorted({*FAMILIES, *ALIASES}))}."
        )
    return FAMILIES[model_type]


def model_config(config_json: Mapping[str, Any], *, dtype: str) -> ModelConfig:
    """What a parsed config.json describes. `dtype` is that of weights and activations, whatever the file says."""
    family = family_of(config_json)
    return ModelConfig(**family.switches(ConfigReader(config_json, family.model_type)), dtype=dtype)


def unread_keys(config_json: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a config.json that its family doesn't read and that aren't known to be harmless."""
    family = family_of(config_json)
    reader = ConfigReader(config_json, family.model_type)
    family.switches(reader)
    return reader.unread()


def shape_differences(model: ModelConfig, expected: ModelConfig) -> list[str]:
    """Fields of the shape in which two models differ, each as "field is A, expected B"."""
    pairs = ((field, getattr(model, field), getattr(expected, field)) for field in _SHAPE)
    return [f"{field} is {ours!r}, expected {theirs!r}" for field, ours, theirs in pairs if ours != theirs]
