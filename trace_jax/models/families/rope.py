"""Rotary settings of config.json as `Rope`. Formulas: transformers' modeling_rope_utils."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.models.config import Rope
from trace_jax.models.families.family import Switches
from trace_jax.models.families.reader import ConfigReader, unsupported

STATIC = ("default", "linear", "llama3", "yarn")  # kinds whose frequencies don't depend on the length of the text
_NAMES = """
rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast
beta_slow short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate short_mscale
long_mscale alpha
"""
_KEYS = frozenset(_NAMES.split())


def _settings(reader: ConfigReader, kind: str = "", partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`, or what is nested in them for a `kind` of layer; `partial`: part of a head may turn."""
    parameters = reader.mapping("rope_parameters")
    entry = parameters.get(kind, parameters)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json: rope_parameters is {dict(parameters)}; expected an object for {kind}.")
    settings = {key: value for key, value in entry.items() if value is not None}
    if unknown := sorted(set(settings) - _KEYS):
        raise unsupported("rope_parameters", unknown[0], tuple(sorted(_KEYS)))
    original = reader.integer("original_max_position_embeddings", null=None)
    if entry is not parameters:
        # transformers reads `truncate` beside the nested settings, not inside them.
        settings["truncate"] = parameters.get("truncate", True)
    elif original is not None:
        settings["original_max_position_embeddings"] = original
    if settings.get("partial_rotary_factor", 1) != 1 and not partial:
        raise unsupported("partial_rotary_factor", settings["partial_rotary_factor"], (1.0,))
    return {**settings, "max_position_embeddings": reader.integer("max_position_embeddings", null=None)}


def rotary(
    reader: ConfigReader, head_size: int, *, supported: tuple[str, ...] = STATIC, partial: bool = False
) -> Switches:
    """The fields `ropes` and `rotary_size` where all layers share one rotary embedding.

    Args:
      partial: whether the family may let only the first part of a head turn.
    """
    settings = _settings(reader, partial=partial)
    width = int(head_size * settings.get("partial_rotary_factor", 1))
    return {"ropes": (_derive(settings, width, supported),), "rotary_size": 0 if width == head_size else width}


def rotary_by_kind(reader: ConfigReader, head_size: int, layer_kinds: tuple[str, ...]) -> Switches:
    """The fields `ropes` and `layer_ropes` where layers of different kinds have different rotary embeddings."""
    rope_of = {kind: _derive(_settings(reader, kind), head_size) for kind in sorted(set(layer_kinds))}
    ropes = tuple(dict.fromkeys(rope_of.values()))
    layers = {"layer_ropes": tuple(ropes.index(rope_of[kind]) for kind in layer_kinds)} if len(ropes) > 1 else {}
    return {"ropes": ropes, **layers}


def latent_rotary(reader: ConfigReader, head_size: int, width: int) -> Switches:
    """The rotary fields of latent attention, whose last `width` dimensions turn, and the scale of its scores.

    With yarn's `mscale_all_dim` the scores are multiplied by mscale^2.
    """
    settings = _settings(reader)
    rope, scale = _derive(settings, width), 0.0
    if settings["rope_type"] != "default" and settings.get("mscale_all_dim"):
        scale = head_size**-0.5 * _mscale(_factor(settings), settings["mscale_all_dim"]) ** 2
    return {"ropes": (rope,), "rotary_size": width, "attention_scale": scale}


def _derive(settings: Mapping[str, Any], width: int, supported: tuple[str, ...] = STATIC) -> Rope:
    """The rotary embedding of `width` dimensions that settings describe."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "dynamic" and "dynamic" in supported and not settings.get("alpha"):
        raise ConfigError("config.json: rope_type is dynamic without alpha; supported: dynamic with a fixed alpha.")
    if kind not in supported:
        raise unsupported("rope_type", kind, supported)
    try:
        return _formula(kind, settings, float(settings["rope_theta"]), width)
    except KeyError as missing:
        raise ConfigError(f"config.json: rope_parameters lack {missing} for rope_type {kind}.") from None


def _formula(kind: str, settings: Mapping[str, Any], theta: float, width: int) -> Rope:
    """Pair i of `width` / 2 has frequency theta^(-2i/width) / divisors[i]."""
    if kind == "default":
        return Rope(theta=theta)
    if kind == "dynamic":  # HunYuan: labelled so, but a fixed alpha changes the base once and for all
        return Rope(theta=theta * settings["alpha"] ** (width / (width - 2)))
    if kind == "linear":
        return _rope(theta, [settings["factor"]] * (width // 2))
    if kind == "longrope":  # Phi-3.5-MoE as transformers computes it: only the amplitude knows of long texts
        return _rope(
            theta,
            settings["short_factor"],
            amplitude=float(settings["short_mscale"]),
            long_amplitude=float(settings["long_mscale"]),
            original_length=settings["original_max_position_embeddings"],
        )
    original, factor = settings["original_max_position_embeddings"], _factor(settings)
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = original * theta ** (-np.arange(0, width, 2) / width) / (2 * math.pi)
        unchanged = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: divided by the factor
        return _rope(theta, 1 / ((1 - unchanged) / factor + unchanged))
    # YaRN, arXiv 2309.00071: slow pairs are interpolated, fast ones stay, with a ramp between.
    first, last = (
        width * math.log(original / ((settings.get(key) or turns) * 2 * math.pi)) / (2 * math.log(theta))
        for key, turns in (("beta_fast", 32), ("beta_slow", 1))
    )
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0.0, 1.0)
    amplitude = settings.get("attention_factor")
    if amplitude is None:
        amplitude = _mscale(factor, 1.0)
        if (one := settings.get("mscale")) and (all_dimensions := settings.get("mscale_all_dim")):
            amplitude = _mscale(factor, one) / _mscale(factor, all_dimensions)
    return _rope(theta, 1 / (ramp / factor + 1 - ramp), amplitude=float(amplitude))


def _rope(theta: float, divisors: Iterable[float], **others: Any) -> Rope:
    return Rope(theta=theta, divisors=tuple(float(divisor) for divisor in divisors), **others)


def _factor(settings: Mapping[str, Any]) -> float:
    return settings.get("factor") or settings["max_position_embeddings"] / settings["original_max_position_embeddings"]


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
