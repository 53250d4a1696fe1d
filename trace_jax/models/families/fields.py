"""Groups of config.json fields that families share, each as keyword arguments of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.families.reader import ConfigReader

SLIDING, FULL = "sliding_attention", "full_attention"


def sizes(reader: ConfigReader) -> dict[str, Any]:
    """What every family has."""
    reader.expect("hidden_act", "silu", "swish")  # two names of one function
    heads = reader.integer("num_attention_heads")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "num_layers": reader.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.integer("num_key_value_heads", null=heads),
        "norm_epsilon": reader.number("rms_norm_eps"),
        "tie_embeddings": reader.boolean("tie_word_embeddings", null=False),
    }


def head_size(reader: ConfigReader) -> int:
    return reader.integer("head_dim", null=reader.integer("hidden_size") // reader.integer("num_attention_heads"))


def attention_bias(reader: ConfigReader, key: str = "attention_bias", kind: str = "all") -> dict[str, Any]:
    return {"attention_bias": kind if reader.boolean(key, null=False) else "none"}


def experts(reader: ConfigReader, *, count: str, width: str, per_token: str = "num_experts_per_tok") -> dict[str, Any]:
    """Number and width of routed experts; `count`, `width` and `per_token` are the family's keys."""
    return {
        "num_experts": reader.integer(count, "num_experts", "num_local_experts"),
        "experts_per_token": reader.integer(per_token, "num_experts_per_tok"),
        "expert_hidden_size": reader.integer(width),
    }


def shared(reader: ConfigReader, key: str) -> dict[str, Any]:
    """`key` shared experts, each as wide as a routed one, which is one expert of their joint width."""
    count = reader.integer(key, null=0)
    return {"shared_hidden_size": count * reader.integer("moe_intermediate_size")}


def dense(reader: ConfigReader, layers: Iterable[int]) -> dict[str, Any]:
    layers = tuple(layers)
    width = reader.integer("intermediate_size", null=0)
    return {"dense_layers": layers, "dense_hidden_size": width} if layers else {}


def leading_dense(reader: ConfigReader, first: int = 0) -> dict[str, Any]:
    """Dense layers by `mlp_layer_types`, else DeepSeek's rule: the first `first_k_dense_replace` are dense, and after
    them all but every `moe_layer_freq`-th. `first` is for files that have neither key."""
    kinds = reader.items("mlp_layer_types", allowed=("dense", "sparse"))
    first = reader.integer("first_k_dense_replace", null=first)
    every = reader.integer("moe_layer_freq", null=1)
    if kinds is not None:
        return dense(reader, (layer for layer, kind in enumerate(kinds) if kind == "dense"))
    layers = range(reader.integer("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer < first or layer % every))


def sparse_step(reader: ConfigReader) -> dict[str, Any]:
    """Qwen's rule: layers in `mlp_only_layers` are dense, and all but every `decoder_sparse_step`-th."""
    only, step = reader.items("mlp_only_layers") or (), reader.integer("decoder_sparse_step")
    layers = range(reader.integer("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer in only or (layer + 1) % step))


def sliding_layers(reader: ConfigReader, otherwise: Iterable[bool]) -> tuple[bool, ...]:
    """Whether each layer slides: by `layer_types`, or `otherwise` where that is absent."""
    kinds = reader.items("layer_types", allowed=(SLIDING, FULL))
    return tuple(otherwise) if kinds is None else tuple(kind == SLIDING for kind in kinds)


def windows(reader: ConfigReader, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """`sliding_window` on the layers that slide."""
    size = reader.integer("sliding_window", null=0)
    if any(sliding) and size < 1:
        raise ConfigError("config.json: layer_types has sliding_attention; sliding_window must then be at least 1.")
    return {"windows": tuple(size if slides else 0 for slides in sliding)} if any(sliding) else {}


def rope_where(layers: tuple[bool, ...]) -> dict[str, Any]:
    """Layers without a rotary embedding (NoPE) are those where `layers` is False."""
    return {} if all(layers) else {"layer_ropes": tuple(0 if turns else -1 for turns in layers)}


def corrected_router(reader: ConfigReader) -> dict[str, Any]:
    """DeepSeek-V3's router: sigmoid, a correction that chooses, groups by their two best, renormalised, scaled."""
    reader.expect("scoring_func", "sigmoid", "noaux_tc")
    reader.expect("topk_method", "noaux_tc")
    return {
        "router_score": "sigmoid",
        "router_correction": True,
        "num_groups": reader.integer("n_group", null=1),
        "groups_per_token": reader.integer("topk_group", null=1),
        "group_score": "top2",
        "normalize_top_k": reader.boolean("norm_topk_prob", null=False),
        "normalize_minimum": 1e-20,
        "routing_scale": reader.number("routed_scaling_factor"),
    }
