"""Groups of config.json fields that families share, each as fields of `ModelConfig`."""

from collections.abc import Iterable

from trace_jax.config import ConfigError
from trace_jax.models.families.family import Switches
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import STATIC, rotary

SLIDING, FULL = "sliding_attention", "full_attention"


def sizes(reader: ConfigReader) -> Switches:
    """What every family has."""
    reader.expect("hidden_act", "silu", "swish")  # two names of one function
    heads, width = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        "num_layers": reader.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.integer("num_key_value_heads", null=heads),
        "head_size": reader.integer("head_dim", null=width // heads),
        "norm_epsilon": reader.number("rms_norm_eps"),
        "tie_embeddings": reader.boolean("tie_word_embeddings", null=False),
    }


def attention_bias(reader: ConfigReader, kind: str, key: str = "attention_bias") -> Switches:
    return {"attention_bias": kind if reader.boolean(key, null=False) else "none"}


def experts(reader: ConfigReader, width: str = "moe_intermediate_size") -> Switches:
    """Number and width of routed experts; `width` is the family's key."""
    return {
        "num_experts": reader.integer("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts"),
        "experts_per_token": reader.integer("moe_k", "num_experts_per_tok"),
        "expert_hidden_size": reader.integer(width),
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
    count = reader.integer("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", null=0)
    return {"shared_hidden_size": count * reader.integer("moe_intermediate_size")}


def normalized(reader: ConfigReader) -> Switches:
    return {"normalize_top_k": reader.boolean("norm_topk_prob", null=False)}


def dense(reader: ConfigReader, layers: Iterable[int]) -> Switches:
    layers = tuple(layers)
    width = reader.integer("intermediate_size", null=0)
    return {"dense_layers": layers, "dense_hidden_size": width} if layers else {}


def leading_dense(reader: ConfigReader) -> Switches:
    """Dense layers by `mlp_layer_types`, else DeepSeek's rule: the first `first_k_dense_replace` are dense, and after
    them all but every `moe_layer_freq`-th."""
    kinds = reader.items("mlp_layer_types", allowed=("dense", "sparse"))
    first, every = reader.integer("first_k_dense_replace", null=0), reader.integer("moe_layer_freq", null=1)
    if kinds is not None:
        return dense(reader, (layer for layer, kind in enumerate(kinds) if kind == "dense"))
    layers = range(reader.integer("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer < first or layer % every))


def sparse_step(reader: ConfigReader) -> Switches:
    """Qwen's rule: layers in `mlp_only_layers` are dense, and all but every `decoder_sparse_step`-th."""
    only, step = reader.items("mlp_only_layers") or (), reader.integer("decoder_sparse_step")
    layers = range(reader.integer("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer in only or (layer + 1) % step))


def layer_kinds(reader: ConfigReader) -> tuple[str, ...]:
    """Each layer's `layer_types`; in families without them all slide if there is a `sliding_window`."""
    reader.folded("use_sliding_window", "global_attn_every_n_layers")
    kinds = reader.items("layer_types", allowed=(SLIDING, FULL))
    if kinds is None:
        kind = FULL if reader.integer("sliding_window", null=None) is None else SLIDING
        kinds = (kind,) * reader.integer("num_hidden_layers")
    return kinds


def windows(reader: ConfigReader) -> Switches:
    """`sliding_window` on the layers that slide."""
    slides = tuple(kind == SLIDING for kind in layer_kinds(reader))
    size = reader.integer("sliding_window", null=0)
    if any(slides) and size < 1:
        raise ConfigError("config.json: layer_types has sliding_attention; sliding_window must then be at least 1.")
    return {"windows": tuple(size * slide for slide in slides)} if any(slides) else {}


def rope_where_sliding(reader: ConfigReader) -> Switches:
    """Layers that see everything have no rotary embedding (NoPE)."""
    kinds = layer_kinds(reader)
    return {"layer_ropes": tuple(0 if kind == SLIDING else -1 for kind in kinds)} if FULL in kinds else {}


def corrected_router(reader: ConfigReader) -> Switches:
    """DeepSeek-V3's router: sigmoid, a correction that chooses, groups by their two best, renormalised, scaled."""
    reader.expect("scoring_func", "sigmoid", "noaux_tc")
    reader.expect("topk_method", "noaux_tc")
    return {
        "router_score": "sigmoid",
        "router_correction": True,
        "num_groups": reader.integer("n_group", null=1),
        "groups_per_token": reader.integer("topk_group", null=1),
        "group_score": "top2",
        **normalized(reader),
        "normalize_minimum": 1e-20,
        "routing_scale": reader.number("routed_scaling_factor"),
    }
