"""The families whose checkpoints can be read, and the shapes of published models.

A family is a function that reads its switches from config.json, entered with its tensors into `FAMILIES`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.families import fields
from trace_jax.models.families.fields import ConfigReader, Group, Switches
from trace_jax.models.families.tensors import TENSORS, Table, moe, norm

ALIASES = {"kimi_k2": "deepseek_v3"}  # published under another model_type
# config.json by name, so that a run can be planned and checked before anything is downloaded: that of the repository of
# the Hugging Face hub in `_name_or_path`, typed in by hand, without what the family's defaults already say. The 2 x 64
# factors of Phi's rotary embedding are ones, which have the right length. A run reads its checkpoint's own file.
PUBLISHED: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
MULTI_TOKEN = "multi-token prediction, which the model itself doesn't use"
# Layers that follow the network's own; "beyond" must be one of the next `num_nextn_predict_layers` numbers.
EXTRA_LAYERS = {r"^model\.layers\.(?P<beyond>\d+)\.": MULTI_TOKEN}
_IGNORED = {
    r"\.inv_freq$": "rotary frequencies follow from config.json",
    r"^lm_head\.weight$": "the output head is the embedding (tie_word_embeddings)",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Of `tensors` a configuration has a part (biases, dense layers). `ignored` maps regular expressions of tensor names
    that may stay unread to the reason; a tensor that fills a parameter is never ignored.
    """

    model_type: str
    title: str
    published: str  # checkpoints of the family, for docs/models.md
    switches: Group
    tensors: Table
    ignored: Mapping[str, str]


FAMILIES: dict[str, Family] = {}


def family(
    model_type: str, title: str, published: str, *tensors: Table, ignored: Mapping[str, str] = {}
) -> Callable[[Group], Group]:
    """Enters a function as that of a family. `tensors`: names that others use for something else."""

    def register(switches: Group) -> Group:
        own = sum(tensors, ()) + TENSORS
        FAMILIES[model_type] = Family(model_type, title, published, switches, own, {**_IGNORED, **ignored})
        return switches

    return register


# --- a router that chooses by a corrected score, or latent attention: DeepSeek and its kin


@family("minimax_m2", "MiniMax-M2", "MiniMax-M2, MiniMax-M2.1", ignored={r"^(model\.)?mtp\.": MULTI_TOKEN})
def minimax_m2(reader: ConfigReader) -> Switches:
    reader.expect(scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer")
    reader.expect(use_routing_bias=True, shared_intermediate_size=0)
    reader.ignore("rotary_dim")
    router = {"router_score": "sigmoid", "router_correction": True}
    return fields.grouped(reader, width="intermediate_size", partial=True, qk_norm="full", **router)


def _corrected(reader: ConfigReader, *groups: Group, **settings: Any) -> Switches:
    """Grouped-query attention with DeepSeek-V3's experts."""
    return fields.grouped(reader, fields.shared, fields.corrected_router, *groups, **settings)


@family("dots1", "dots.llm1", "dots.llm1")
def dots1(reader: ConfigReader) -> Switches:
    return _corrected(reader, fields.leading_dense, fields.windows, bias="all", qk_norm="head")


@family("glm4_moe", "GLM-4-MoE", "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7", ignored=EXTRA_LAYERS)
def glm4_moe(reader: ConfigReader) -> Switches:
    qk_norm = "head" if reader.value("use_qk_norm", null=False) else "none"
    return _corrected(reader, fields.leading_dense, bias="qkv", partial=True, qk_norm=qk_norm)


@family("solar_open", "Solar-Open", "Solar-Open-100B")
def solar_open(reader: ConfigReader) -> Switches:
    reader.expect(first_k_dense_replace=0, use_qk_norm=False)
    reader.ignore("intermediate_size")  # of dense layers, which it hasn't
    return _corrected(reader, bias="qkv")


@family("exaone_moe", "EXAONE-MoE", "K-EXAONE-236B-A23B", ignored={r"^mtp\.": MULTI_TOKEN})
def exaone_moe(reader: ConfigReader) -> Switches:
    groups = fields.leading_dense, fields.windows, fields.rope_where_sliding
    return _corrected(reader, *groups, qk_norm="head")


@family("hy_v3", "HY-V3", "Hy3-preview", ignored=EXTRA_LAYERS)
def hy_v3(reader: ConfigReader) -> Switches:
    reader.ignore("enable_moe_fp32_combine")  # concerns rounding below float32 only
    reader.expect(qk_norm=True, route_norm=True, moe_router_use_sigmoid=True, moe_router_enable_expert_bias=True)
    switches: Switches = fields.sigmoid_router(reader, "router_scaling_factor") | {"qk_norm": "head"}
    mlp_bias = reader.value("mlp_bias", null=False)
    return fields.grouped(reader, fields.shared, fields.leading_dense, bias="all", mlp_bias=mlp_bias, **switches)


@family("afmoe", "AFMoE", "Trinity-Nano, Trinity-Mini", norm("mlp_norm", "pre_mlp_layernorm"))
def afmoe(reader: ConfigReader) -> Switches:
    reader.expect(score_func="sigmoid", route_norm=True, n_group=1, num_expert_groups=1)
    dense = fields.dense(reader, range(reader.value("num_dense_layers", null=0)))
    scale = reader.value("hidden_size") ** 0.5 if reader.value("mup_enabled", null=False) else 1.0
    switches = {"attention_gate": True, "norm_placement": "both", "qk_norm": "head", "embedding_scale": scale}
    switches |= dense | fields.sigmoid_router(reader, "route_scale")
    groups = fields.shared, fields.windows, fields.rope_where_sliding
    return fields.grouped(reader, *groups, bias="all", **switches)


@family(
    "ernie4_5_moe", "ERNIE-4.5-MoE", "ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B", ignored={r"^model\.mtp_": MULTI_TOKEN}
)
def ernie4_5_moe(reader: ConfigReader) -> Switches:
    bias = reader.value("use_bias", null=False)
    first, last = reader.value("moe_layer_start_index"), reader.value("moe_layer_end_index")
    interval, layers = reader.value("moe_layer_interval"), range(reader.value("num_hidden_layers"))
    switches = fields.dense(reader, (at for at in layers if not first <= at <= last or (at + 1) % interval))
    switches |= {"attention_bias": "all" if bias else "none", "mlp_bias": bias, "head_bias": bias}
    switches |= {"router_correction": True, "normalize_minimum": reader.value("moe_norm_min")}
    return fields.grouped(reader, fields.shared, rope_interleaved=True, **switches)


def _latent(reader: ConfigReader, *groups: Group, **switches: Any) -> Switches:
    """Latent attention and DeepSeek's experts."""
    sizes, rotary_size = fields.sizes(reader), reader.value("qk_rope_head_dim")
    head_size = reader.value("qk_nope_head_dim") + rotary_size
    reader.expect(num_key_value_heads=sizes["num_heads"], head_dim=(rotary_size, head_size), qk_head_dim=head_size)
    base = sizes | fields.attention_bias(reader, "all") | fields.latent_rotary(reader, head_size, rotary_size)
    base |= reader.values(value_size="v_head_dim", latent_size="kv_lora_rank")
    base |= {"attention": "latent", "head_size": head_size, "query_latent_size": reader.value("q_lora_rank", null=0)}
    return fields.join(reader, base, fields.experts, fields.shared, fields.leading_dense, *groups, **switches)


@family("deepseek_v2", "DeepSeek-V2", "DeepSeek-V2, -V2-Lite, -V2.5, -Coder-V2")
def deepseek_v2(reader: ConfigReader) -> Switches:
    reader.expect(scoring_func="softmax", topk_method=("greedy", "group_limited_greedy"))
    reader.ignore("norm_topk_prob")  # has no effect in transformers either
    switches = {"normalize_top_k": False, "rope_interleaved": True, "mlp_bias": reader.value("mlp_bias", null=False)}
    switches |= reader.values(routing_scale="routed_scaling_factor")
    groups, grouped = fields.expert_groups(reader), reader.value("topk_method", null="") == "group_limited_greedy"
    return _latent(reader, **switches, **(groups if grouped else {}))


@family("deepseek_v3", "DeepSeek-V3", "DeepSeek-V3, -R1 and -V3.1, Kimi-K2, Moonlight-16B-A3B", ignored=EXTRA_LAYERS)
@family("glm4_moe_lite", "GLM-4-MoE-lite", "GLM-4.7-Flash", ignored=EXTRA_LAYERS)
def deepseek_v3(reader: ConfigReader) -> Switches:
    return _latent(reader, fields.corrected_router, rope_interleaved=reader.value("rope_interleave", null=False))


@family(
    "axk1",
    "A.X-K1",
    "A.X-K1",
    ignored={r"^model\.layers\.0\.(mlp\.)?post_mlp_layernorm\.": "a norm of experts in a layer that has none"},
)
def axk1(reader: ConfigReader) -> Switches:
    return {**deepseek_v3(reader), "moe_output_norm": True}


# --- a router that scores by softmax: Mixtral and its kin

SOFTMAX_OF_CHOSEN = {"router_score": "softmax_top_k", "normalize_top_k": False}


@family("mixtral", "Mixtral", "Mixtral-8x7B, Mixtral-8x22B")
def mixtral(reader: ConfigReader) -> Switches:
    return fields.grouped(reader, fields.windows, width="intermediate_size")


@family("olmoe", "OLMoE", "OLMoE-1B-7B-0924, OLMoE-1B-7B-0125")
def olmoe(reader: ConfigReader) -> Switches:
    switches: Switches = {"qk_norm": "full", "clip_qkv": reader.value("clip_qkv", null=0.0)}
    return fields.grouped(reader, fields.normalized, width="intermediate_size", bias="all", **switches)


@family("flex_olmo", "FlexOlmo", "FlexOlmo-7x7B-1T")
def flex_olmo(reader: ConfigReader) -> Switches:
    return {**olmoe(reader), "norm_placement": "post", "clip_qkv": 0.0}


@family("qwen2_moe", "Qwen2-MoE", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B")
def qwen2_moe(reader: ConfigReader) -> Switches:
    switches: Switches = fields.attention_bias(reader, "qkv", key="qkv_bias") | {"shared_gate": True}
    switches |= reader.values(shared_hidden_size="shared_expert_intermediate_size")
    return fields.grouped(reader, fields.sparse_step, fields.windows, fields.normalized, **switches)


@family("qwen3_moe", "Qwen3-MoE", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder")
def qwen3_moe(reader: ConfigReader) -> Switches:
    groups = fields.sparse_step, fields.windows, fields.normalized
    return fields.grouped(reader, *groups, bias="all", qk_norm="head")


@family("mellum", "Mellum 2", "Mellum2-12B-A2.5B", ignored={r"^mtp\.": MULTI_TOKEN})
def mellum(reader: ConfigReader) -> Switches:
    base = fields.sizes(reader) | fields.attention_bias(reader, "all")
    base |= fields.rotary_by_kind(reader, base["head_size"])
    groups = fields.experts, fields.leading_dense, fields.windows, fields.normalized
    return fields.join(reader, base, *groups, qk_norm="head")


@family("granitemoe", "Granite-MoE", "granite-3.0 and -3.1 1b-a400m and 3b-a800m, PowerMoE-3b")
def granitemoe(reader: ConfigReader) -> Switches:
    scales = reader.values(attention_scale="attention_multiplier", embedding_scale="embedding_multiplier")
    scales |= reader.values(residual_scale="residual_multiplier", logits_divisor="logits_scaling")
    return fields.grouped(reader, width="intermediate_size", bias="all", **SOFTMAX_OF_CHOSEN, **scales)


@family("granitemoeshared", "Granite-MoE-shared", "moe-7b-1b-active-shared-experts")
def granitemoeshared(reader: ConfigReader) -> Switches:
    return granitemoe(reader) | reader.values(shared_hidden_size="shared_intermediate_size")


@family("hunyuan_v1_moe", "HunYuan-V1-MoE", "Hunyuan-A13B")
def hunyuan_v1_moe(reader: ConfigReader) -> Switches:
    base, width = fields.sizes(reader), reader.value("intermediate_size")
    # transformers' class knows no other values.
    reader.expect(use_cla=False, use_qk_norm=True, num_shared_expert=1, moe_intermediate_size=width)
    reader.expect(attention_head_dim=base["head_size"])
    base |= fields.rotary(reader, base["head_size"], supported=(*fields.STATIC, "dynamic"))
    base |= {"expert_hidden_size": width, "shared_hidden_size": width, "qk_norm": "head_after_rope"}
    base |= {"num_experts": reader.number("num_experts", "num_local_experts")}
    base |= {"experts_per_token": reader.number("moe_topk", "num_experts_per_tok")}
    return base | fields.attention_bias(reader, "all")


@family("phimoe", "Phi-3.5-MoE", "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE")
def phimoe(reader: ConfigReader) -> Switches:
    switches: Switches = reader.values(router_jitter="router_jitter_noise") | {"router_score": "sparsemixer"}
    switches |= {"normalize_top_k": False, "norm": "layer", "head_bias": reader.value("lm_head_bias", null=False)}
    ropes = "default", "longrope"
    return fields.grouped(reader, fields.windows, width="intermediate_size", bias="all", ropes=ropes, **switches)


# Gate and up stand in alternate columns. MXFP4 packs along the input axis, which is the last one there.
GPT_OSS_EXPERTS = (
    *moe(
        ("experts/gate_up", "e (f g) d -> e d g f", "mlp.experts.gate_up_proj"),
        ("experts/down", "e d f -> e f d", "mlp.experts.down_proj"),
        storage="mxfp4",
    ),
    *moe(
        ("experts/gate_up", "e d (f g) -> e d g f", "mlp.experts.gate_up_proj"),
        ("experts/down", "e f d -> e f d", "mlp.experts.down_proj"),
        ("experts/gate_up_bias", "e (f g) -> e g f", "mlp.experts.gate_up_proj_bias"),
        ("experts/down_bias", "e d -> e d", "mlp.experts.down_proj_bias"),
    ),
)


@family("gpt_oss", "GPT-OSS", "gpt-oss-20b, gpt-oss-120b", GPT_OSS_EXPERTS)
def gpt_oss(reader: ConfigReader) -> Switches:
    switches = reader.values(swiglu_alpha="swiglu_alpha", swiglu_limit="swiglu_limit") | SOFTMAX_OF_CHOSEN
    switches |= {"activation": "clamped_swiglu", "router_bias": True, "expert_bias": True, "sinks": True}
    return fields.grouped(reader, fields.windows, width="intermediate_size", bias="all", **switches)


# --- a family's model

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
        raise fields.unsupported("model_type", name, tuple(sorted({*FAMILIES, *ALIASES})))
    return FAMILIES[model_type]


def model_config(config_json: Mapping[str, Any], *, dtype: str) -> ModelConfig:
    """What a parsed config.json describes. `dtype` is that of weights and activations, whatever the file says."""
    family = family_of(config_json)
    config = ModelConfig(**family.switches(ConfigReader(config_json, family.model_type)), dtype=dtype)
    if (experts := config.num_layers * config.num_experts) > fields.MOST_EXPERTS:
        raise ConfigError(f"config.json: it has {experts:,} experts; expected at most {fields.MOST_EXPERTS:,}.")
    return config


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
