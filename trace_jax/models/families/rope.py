"""Rotary settings of config.json as `Rope`. Formulas: transformers' modeling_rope_utils.

Two spellings are read: transformers 5 has everything in `rope_parameters`; published files have `rope_theta`,
`rope_scaling` and `partial_rotary_factor` beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.models.config import Rope
from trace_jax.models.families.reader import ConfigReader, unsupported

STATIC = ("default", "linear", "llama3", "yarn")  # kinds whose frequencies don't depend on the length of the text
_LONG_CONTEXT = ("llama3", "longrope", "yarn")
_KNOWN_KEYS = """
rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast
beta_slow short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate short_mscale
long_mscale alpha max_position_embeddings
"""
_KNOWN = frozenset(_KNOWN_KEYS.split())


def rope_settings(reader: ConfigReader, kinds: tuple[str, ...] = (), partial: float = 1.0) -> dict[str, dict[str, Any]]:
    """Settings in the spelling of transformers 5, by kind of layer; `kinds` are those that may differ.

    Layers share one entry, "", unless config.json nests its settings by kind of layer. `partial` is the rotary factor
    of files that have none.
    """
    given = reader.mapping("rope_scaling") or reader.mapping("rope_parameters")
    shared = {
        "rope_theta": reader.number("rope_theta", null=10_000.0),
        "partial_rotary_factor": reader.number("partial_rotary_factor", null=partial),
    }
    original = reader.integer("original_max_position_embeddings", null=None)
    longest = reader.integer("max_position_embeddings", null=None)
    nested = {kind: given[kind] for kind in kinds if given.get(kind)}
    found = {}
    for kind, entry in (nested or {"": given}).items():
        entry = {key: value for key, value in entry.items() if value is not None}
        if unknown := sorted(set(entry) - _KNOWN):
            raise unsupported("rope_parameters", unknown[0], tuple(sorted(_KNOWN)))
        entry = {**shared, **entry, "max_position_embeddings": longest}
        entry["rope_type"] = entry.get("rope_type", entry.get("type", "default"))
        if nested:
            # transformers reads `truncate` beside the nested settings, not inside them.
            entry["truncate"] = given.get("truncate", True)
        if entry["rope_type"] in _LONG_CONTEXT:
            if original is not None and not nested:
                entry["original_max_position_embeddings"] = original
            entry.setdefault("original_max_position_embeddings", longest)
        found[kind] = entry
    return found


def derive_rope(settings: Mapping[str, Any], width: int, supported: tuple[str, ...] = STATIC) -> Rope:
    """The rotary embedding of `width` dimensions that one entry of `rope_settings` describes."""
    kind = settings["rope_type"]
    if kind == "dynamic" and "dynamic" in supported and not settings.get("alpha"):
        raise ConfigError("config.json: rope_type is dynamic without alpha; supported: dynamic with a fixed alpha.")
    if kind not in supported:
        raise unsupported("rope_type", kind, supported)
    try:
        return _KINDS[kind](settings, float(settings["rope_theta"]), width)
    except KeyError as missing:
        raise ConfigError(f"config.json: rope_parameters lack {missing} for rope_type {kind}.") from None


def rotary_fields(
    reader: ConfigReader, head_size: int, *, supported: tuple[str, ...] = STATIC, partial: float | None = None
) -> dict[str, Any]:
    """The fields `ropes` and `rotary_size` where all layers share one rotary embedding.

    Args:
      partial: in a family that lets only the first part of a head turn, the part where config.json doesn't say.
    """
    settings = rope_settings(reader, partial=partial or 1.0)[""]
    if partial is None:
        _expect_whole(settings)
    width = int(head_size * settings["partial_rotary_factor"])
    return {"ropes": (derive_rope(settings, width, supported),), "rotary_size": 0 if width == head_size else width}


def rotary_fields_by_kind(reader: ConfigReader, head_size: int, kind_of_layer: tuple[str, ...]) -> dict[str, Any]:
    """The fields `ropes` and `layer_ropes` where layers of different kinds have different rotary embeddings."""
    kinds = tuple(sorted(set(kind_of_layer)))
    settings = rope_settings(reader, kinds)
    for entry in settings.values():
        _expect_whole(entry)
    if "" in settings:
        return {"ropes": (derive_rope(settings[""], head_size),)}
    if missing := [kind for kind in kinds if kind not in settings]:
        raise ConfigError(f"config.json: rope_parameters lack {missing[0]}, which layer_types names.")
    layers = {"layer_ropes": tuple(kinds.index(kind) for kind in kind_of_layer)} if len(kinds) > 1 else {}
    return {"ropes": tuple(derive_rope(settings[kind], head_size) for kind in kinds), **layers}


def latent_fields(reader: ConfigReader, head_size: int, width: int) -> dict[str, Any]:
    """The rotary fields of latent attention, whose last `width` dimensions turn, and the scale of its scores.

    With yarn's `mscale_all_dim` the scores are multiplied by mscale^2.
    """
    settings = rope_settings(reader)[""]
    _expect_whole(settings)
    rope, scale = derive_rope(settings, width), 0.0
    if settings["rope_type"] != "default" and settings.get("mscale_all_dim"):
        scale = head_size**-0.5 * _mscale(_factor(settings), settings["mscale_all_dim"]) ** 2
    return {"ropes": (rope,), "rotary_size": width, "attention_scale": scale}


def _expect_whole(settings: Mapping[str, Any]) -> None:
    if settings["partial_rotary_factor"] != 1:
        raise unsupported("partial_rotary_factor", settings["partial_rotary_factor"], (1.0,))


# Below, one function per kind: (settings, theta, width) -> Rope. Pair i of `width` / 2 has frequency
# theta^(-2i/width) / divisors[i].


def _frequencies(theta: float, width: int) -> np.ndarray:
    return theta ** (-np.arange(0, width, 2) / width)


def _rope(theta: float, divisors, **others) -> Rope:
    return Rope(theta=theta, divisors=tuple(float(divisor) for divisor in divisors), **others)


def _default(settings, theta, width):
    return Rope(theta=theta)


def _linear(settings, theta, width):
    return _rope(theta, [settings["factor"]] * (width // 2))


def _alpha(settings, theta, width):
    """Hunyuan: labelled "dynamic", but a fixed alpha changes the base once and for all."""
    return Rope(theta=theta * settings["alpha"] ** (width / (width - 2)))


def _longrope(settings, theta, width):
    """Phi-3.5-MoE as transformers computes it: always the short factors; only the amplitude knows of long texts."""
    return _rope(
        theta,
        settings["short_factor"],
        amplitude=float(settings["short_mscale"]),
        long_amplitude=float(settings["long_mscale"]),
        original_length=settings["original_max_position_embeddings"],
    )


def _llama3(settings, theta, width):
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * _frequencies(theta, width) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: unchanged, 0: divided by the factor
    return _rope(theta, 1 / ((1 - kept) / factor + kept))


def _yarn(settings, theta, width):
    """YaRN, arXiv 2309.00071: slow pairs are interpolated, fast ones kept, with a ramp between."""
    original = settings["original_max_position_embeddings"]
    factor = _factor(settings)

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(settings.get("beta_fast") or 32)
    last = pair_that_turns(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0.0, 1.0)
    return _rope(theta, 1 / (ramp / factor + 1 - ramp), amplitude=_yarn_amplitude(settings, factor))


def _factor(settings: Mapping[str, Any]) -> float:
    return settings.get("factor") or settings["max_position_embeddings"] / settings["original_max_position_embeddings"]


def _yarn_amplitude(settings: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in settings:
        return float(settings["attention_factor"])
    one, all_dimensions = settings.get("mscale"), settings.get("mscale_all_dim")
    if one and all_dimensions:
        return _mscale(factor, one) / _mscale(factor, all_dimensions)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_KINDS = {
    "default": _default,
    "dynamic": _alpha,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
