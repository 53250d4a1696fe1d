"""The families that can be imported: one small file each, which says how their config.json and tensors read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.config import ModelConfig
from trace_jax.models.families import (
    afmoe,
    axk1,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    exaone_moe,
    flex_olmo,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_moe,
    hy_v3,
    mellum,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    solar_open,
)
from trace_jax.models.families.family import Family, Stored
from trace_jax.models.families.reader import ConfigReader

__all__ = ["ALIASES", "FAMILIES", "Family", "Stored", "family_of", "model_config", "unread_keys"]

_MODULES = (
    mixtral,
    olmoe,
    flex_olmo,
    qwen2_moe,
    qwen3_moe,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_moe,
    mellum,
    minimax_m2,
    dots1,
    glm4_moe,
    solar_open,
    exaone_moe,
    hy_v3,
    afmoe,
    ernie4_5_moe,
    gpt_oss,
    deepseek_v2,
    deepseek_v3,
    glm4_moe_lite,
    axk1,
    phimoe,
)
FAMILIES: Mapping[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
ALIASES = {"kimi_k2": "deepseek_v3"}  # published under another model_type


def family_of(config_json: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json.

    Raises:
      ConfigError: a model_type that isn't supported; the message lists those that are.
    """
    given = config_json.get("model_type")
    model_type = ALIASES.get(str(given), str(given))
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {given!r}; supported: {', '.join(sorted({*FAMILIES, *ALIASES}))}."
        )
    return FAMILIES[model_type]


def model_config(config_json: Mapping[str, Any], *, dtype: str) -> ModelConfig:
    """What a parsed config.json describes. `dtype` is that of weights and activations, whatever the file says.

    Raises:
      ConfigError: a missing key, a wrong type, or a value that isn't implemented, with what is supported.
    """
    return _read(config_json, dtype)[0]


def unread_keys(config_json: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a config.json that its family doesn't read and that aren't known to be harmless."""
    return _read(config_json, "float32")[1].unread()


def _read(config_json: Mapping[str, Any], dtype: str) -> tuple[ModelConfig, ConfigReader]:
    family = family_of(config_json)
    reader = ConfigReader(config_json, family.defaults)
    return dataclasses.replace(family.config(reader), dtype=dtype), reader
