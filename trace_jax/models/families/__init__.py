"""The families that can be imported. Each is a function that reads switches from config.json, in `switches`."""

from collections.abc import Mapping
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.families import switches
from trace_jax.models.families.family import FAMILIES, ConfigReader, Family

__all__ = ["ALIASES", "FAMILIES", "Family", "family_of", "model_config", "unread_keys"]

ALIASES = {"kimi_k2": "deepseek_v3"}  # published under another model_type
assert switches  # importing it fills FAMILIES


def family_of(config_json: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json.

    Raises:
      ConfigError: a model_type that isn't supported; the message lists those that are.
    """
    name = config_json.get("model_type")
    model_type = ALIASES.get(str(name), str(name))
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {name!r}; supported: {', '.join(sorted({*FAMILIES, *ALIASES}))}."
        )
    return FAMILIES[model_type]


def model_config(config_json: Mapping[str, Any], *, dtype: str) -> ModelConfig:
    """What a parsed config.json describes. `dtype` is that of weights and activations, whatever the file says.

    Raises:
      ConfigError: a missing key, a wrong type, or a value that isn't implemented, with what is supported.
    """
    family = family_of(config_json)
    return ModelConfig(**family.switches(ConfigReader(config_json, family.model_type)), dtype=dtype)


def unread_keys(config_json: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a config.json that its family doesn't read and that aren't known to be harmless."""
    family = family_of(config_json)
    reader = ConfigReader(config_json, family.model_type)
    family.switches(reader)
    return reader.unread()
