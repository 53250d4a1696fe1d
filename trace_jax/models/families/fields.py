"""Groups of config.json fields that families share, each as fields of `ModelConfig`.

Formulas of rotary embeddings: transformers' modeling_rope_utils.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.models.architecture import Rope
from trace_jax.models.families.family import ConfigReader, Switches, unsupported

SLIDING, FULL = "sliding_attention", "full_attention"
STATIC = ("default", "linear", "llama3", "yarn")  # rotary kinds whose frequencies don't depend on the text's length
_ROPE_KEYS = """
rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast
beta_slow short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate short_mscale
long_mscale alpha
"""


def sizes(reader: ConfigReader) -> Switches:
    """What every family has."""
    reader.expect(hidden_act=("silu", "swish"))  # two names of one function
    heads, width = reader.value("num_attention_heads"), reader.value("hidden_size")
    return {
        "vocab_size": reader.value("vocab_size"),
        "hidden_size": width,
        "num_layers": reader.value("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.value("num_key_value_heads", null=heads),
        "head_size": reader.value("head_dim", null=width // heads),
        "norm_epsilon": reader.value("rms_norm_eps"),
        "tie_embeddings": reader.value("tie_word_embeddings", null=False),
    }


def attention_bias(reader: ConfigReader, kind: str, key: str = "attention_bias") -> Switches:
    return {"attention_bias": kind if reader.value(key, null=False) else "none"}


def experts(reader: ConfigReader, width: str = "moe_intermediate_size") -> Switches:
    """Number and width of routed experts; `width` is the family's key."""
    return {
        "num_experts": reader.value("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts"),
        "experts_per_token": reader.value("moe_k", "num_experts_per_tok"),
        "expert_hidden_size": reader.value(width),
    }


def grouped(
    reader: ConfigReader,
    width: str = "moe_intermediate_size",
    *,
    bias: str = "none",
    ropes: tuple[str, ...] = STATIC,
    partial: bool = False,
) -> Switches:
    """Grouped-query attention and routed experts.

    Args:
      width: key of an expert's hidden width.
      bias: the projections that have biases if `attention_bias` says so; none: the family hasn't that key.
      ropes, partial: of `rotary`.
    """
    switches = sizes(reader)
    return {
        **switches,
        **experts(reader, width),
        **({} if bias == "none" else attention_bias(reader, bias)),
        **rotary(reader, switches["head_size"], supported=ropes, partial=partial),
    }


def shared(reader: ConfigReader) -> Switches:
    """Shared experts, each as wide as a routed one, which are one expert of their joint width."""
    count = reader.value("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", null=0)
    return {"shared_hidden_size": count * reader.value("moe_intermediate_size")}


def dense(reader: ConfigReader, layers: Iterable[int]) -> Switches:
    layers, width = tuple(layers), reader.value("intermediate_size", null=0)
    return {"dense_layers": layers, "dense_hidden_size": width} if layers else {}


def leading_dense(reader: ConfigReader) -> Switches:
    """Dense layers by `mlp_layer_types`, else DeepSeek's rule: the first `first_k_dense_replace` are dense, and after
    them all but every `moe_layer_freq`-th."""
    kinds = reader.kinds("mlp_layer_types", "dense", "sparse")
    first, every = reader.value("first_k_dense_replace", null=0), reader.value("moe_layer_freq", null=1)
    if kinds is not None:
        return dense(reader, (layer for layer, kind in enumerate(kinds) if kind == "dense"))
    layers = range(reader.value("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer < first or layer % every))


def sparse_step(reader: ConfigReader) -> Switches:
    """Qwen's rule: layers in `mlp_only_layers` are dense, and all but every `decoder_sparse_step`-th."""
    only, step = reader.value("mlp_only_layers", null=()), reader.value("decoder_sparse_step")
    layers = range(reader.value("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer in only or (layer + 1) % step))


def layer_kinds(reader: ConfigReader) -> tuple[str, ...]:
    """Each layer's `layer_types`; in families without them all slide if there is a `sliding_window`."""
    reader.folded("use_sliding_window", "global_attn_every_n_layers")
    kinds = reader.kinds("layer_types", SLIDING, FULL)
    if kinds is None:
        kind = FULL if reader.value("sliding_window", null=None) is None else SLIDING
        kinds = (kind,) * reader.value("num_hidden_layers")
    return kinds


def windows(reader: ConfigReader) -> Switches:
    """`sliding_window` on the layers that slide."""
    slides, size = [kind == SLIDING for kind in layer_kinds(reader)], reader.value("sliding_window", null=0)
    if any(slides) and size < 1:
        raise ConfigError("config.json: layer_types has sliding_attention; sliding_window must then be at least 1.")
    return {"windows": tuple(size * slide for slide in slides)} if any(slides) else {}


def rope_where_sliding(reader: ConfigReader) -> Switches:
    """Layers that see everything have no rotary embedding (NoPE)."""
    kinds = layer_kinds(reader)
    return {"layer_ropes": tuple(0 if kind == SLIDING else -1 for kind in kinds)} if FULL in kinds else {}


def sigmoid_router(reader: ConfigReader, scale: str) -> Switches:
    """A sigmoid, a correction that only chooses, weights renormalised and multiplied by the field `scale`."""
    return {
        "router_score": "sigmoid",
        "router_correction": True,
        "normalize_minimum": 1e-20,
        "routing_scale": reader.value(scale),
    }


def corrected_router(reader: ConfigReader) -> Switches:
    """DeepSeek-V3's router: groups by their two best, renormalised if the field says so."""
    reader.expect(scoring_func=("sigmoid", "noaux_tc"), topk_method="noaux_tc")
    return {
        **sigmoid_router(reader, "routed_scaling_factor"),
        "normalize_top_k": reader.value("norm_topk_prob", null=False),
        "num_groups": reader.value("n_group", null=1),
        "groups_per_token": reader.value("topk_group", null=1),
        "group_score": "top2",
    }


# --- rotary embeddings


def rotary(
    reader: ConfigReader, head_size: int, *, supported: tuple[str, ...] = STATIC, partial: bool = False
) -> Switches:
    """The fields `ropes` and `rotary_size` where all layers share one rotary embedding.

    Args:
      partial: whether the family may let only the first part of a head turn.
    """
    settings = _settings(reader, partial=partial)
    width = int(head_size * settings.get("partial_rotary_factor", 1))
    return {"ropes": (_rope(settings, width, supported),), "rotary_size": 0 if width == head_size else width}


def rotary_by_kind(reader: ConfigReader, head_size: int) -> Switches:
    """The fields `ropes` and `layer_ropes` where layers of different kinds have different rotary embeddings."""
    kinds = layer_kinds(reader)
    rope_of = {kind: _rope(_settings(reader, kind), head_size) for kind in sorted(set(kinds))}
    ropes = tuple(dict.fromkeys(rope_of.values()))
    layers = {"layer_ropes": tuple(ropes.index(rope_of[kind]) for kind in kinds)} if len(ropes) > 1 else {}
    return {"ropes": ropes, **layers}


def latent_rotary(reader: ConfigReader, head_size: int, width: int) -> Switches:
    """The rotary fields of latent attention, whose last `width` dimensions turn, and the scale of its scores.

    With yarn's `mscale_all_dim` the scores are multiplied by mscale^2.
    """
    settings, scale = _settings(reader), 0.0
    if settings["rope_type"] != "default" and settings.get("mscale_all_dim"):
        scale = head_size**-0.5 * _mscale(_factor(settings), settings["mscale_all_dim"]) ** 2
    return {"ropes": (_rope(settings, width),), "rotary_size": width, "attention_scale": scale}


def _settings(reader: ConfigReader, kind: str = "", partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`, or what is nested in them for a `kind` of layer; `partial`: part of a head may turn."""
    parameters = reader.value("rope_parameters", null={})
    entry = parameters.get(kind, parameters)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json: rope_parameters is {parameters}; expected an object for {kind}.")
    settings = {key: value for key, value in entry.items() if value is not None}
    if unknown := sorted(set(settings) - set(_ROPE_KEYS.split())):
        raise unsupported("rope_parameters", unknown[0], tuple(sorted(_ROPE_KEYS.split())))
    original = reader.value("original_max_position_embeddings", null=None)
    if entry is not parameters:
        # transformers reads `truncate` beside the nested settings, not inside them.
        settings["truncate"] = parameters.get("truncate", True)
    elif original is not None:
        settings["original_max_position_embeddings"] = original
    if settings.get("partial_rotary_factor", 1) != 1 and not partial:
        raise unsupported("partial_rotary_factor", settings["partial_rotary_factor"], (1.0,))
    return {**settings, "max_position_embeddings": reader.value("max_position_embeddings", null=None)}


def _rope(settings: Mapping[str, Any], width: int, supported: tuple[str, ...] = STATIC) -> Rope:
    """The rotary embedding of `width` dimensions: pair i has frequency theta^(-2i/width) / divisors[i]."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "dynamic" and "dynamic" in supported and not settings.get("alpha"):
        raise ConfigError("config.json: rope_type is dynamic without alpha; supported: dynamic with a fixed alpha.")
    if kind not in supported:
        raise unsupported("rope_type", kind, supported)
    try:
        theta = float(settings["rope_theta"])
        if kind == "dynamic":  # HunYuan: labelled so, but a fixed alpha changes the base once and for all
            theta *= settings["alpha"] ** (width / (width - 2))
        divisors, others = _scaling(kind, settings, theta, width)
    except KeyError as missing:
        raise ConfigError(f"config.json: rope_parameters lack {missing} for rope_type {kind}.") from None
    return Rope(theta=theta, divisors=tuple(float(divisor) for divisor in divisors), **others)


def _scaling(kind: str, settings: Mapping[str, Any], theta: float, width: int) -> tuple[Iterable, dict[str, Any]]:
    """(divisors, amplitudes and lengths) of a `Rope`."""
    if kind in ("default", "dynamic"):
        return (), {}
    if kind == "linear":
        return [settings["factor"]] * (width // 2), {}
    if kind == "longrope":  # Phi-3.5-MoE as transformers computes it: only the amplitude knows of long texts
        return settings["short_factor"], {
            "amplitude": settings["short_mscale"],
            "long_amplitude": settings["long_mscale"],
            "original_length": settings["original_max_position_embeddings"],
        }
    original, factor = settings["original_max_position_embeddings"], _factor(settings)
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = original * theta ** (-np.arange(0, width, 2) / width) / (2 * math.pi)
        unchanged = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: divided by the factor
        return 1 / ((1 - unchanged) / factor + unchanged), {}
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
    return 1 / (ramp / factor + 1 - ramp), {"amplitude": amplitude}


def _factor(settings: Mapping[str, Any]) -> float:
    return settings.get("factor") or settings["max_position_embeddings"] / settings["original_max_position_embeddings"]


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
