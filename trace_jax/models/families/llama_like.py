"""Families with grouped-query attention whose router scores by softmax: Mixtral and its kin."""

from trace_jax.models.families import fields
from trace_jax.models.families.family import MULTI_TOKEN, ConfigReader, Switches, family, unsupported
from trace_jax.models.families.tensors import moe


@family("mixtral", "Mixtral", "Mixtral-8x7B, Mixtral-8x22B")
def mixtral(reader: ConfigReader) -> Switches:
    return {**fields.grouped(reader, "intermediate_size"), **fields.windows(reader)}


@family("olmoe", "OLMoE", "OLMoE-1B-7B-0924, OLMoE-1B-7B-0125")
def olmoe(reader: ConfigReader) -> Switches:
    return {
        **fields.grouped(reader, "intermediate_size", bias="all"),
        "normalize_top_k": reader.value("norm_topk_prob", null=False),
        "qk_norm": "full",
        "clip_qkv": reader.value("clip_qkv", null=0.0),
    }


@family("flex_olmo", "FlexOlmo", "FlexOlmo-7x7B-1T")
def flex_olmo(reader: ConfigReader) -> Switches:
    return {**olmoe(reader), "norm_placement": "post", "clip_qkv": 0.0}


@family("qwen2_moe", "Qwen2-MoE", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B")
def qwen2_moe(reader: ConfigReader) -> Switches:
    return {
        **fields.grouped(reader),
        **fields.attention_bias(reader, "qkv", key="qkv_bias"),
        **fields.sparse_step(reader),
        **fields.windows(reader),
        "normalize_top_k": reader.value("norm_topk_prob", null=False),
        "shared_hidden_size": reader.value("shared_expert_intermediate_size"),
        "shared_gate": True,
    }


@family("qwen3_moe", "Qwen3-MoE", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder")
def qwen3_moe(reader: ConfigReader) -> Switches:
    return {
        **fields.grouped(reader, bias="all"),
        **fields.sparse_step(reader),
        **fields.windows(reader),
        "normalize_top_k": reader.value("norm_topk_prob", null=False),
        "qk_norm": "head",
    }


@family("mellum", "Mellum 2", "Mellum2-12B-A2.5B", ignored={r"^mtp\.": MULTI_TOKEN})
def mellum(reader: ConfigReader) -> Switches:
    sizes = fields.sizes(reader)
    return {
        **sizes,
        **fields.experts(reader),
        **fields.attention_bias(reader, "all"),
        **fields.leading_dense(reader),
        **fields.windows(reader),
        "normalize_top_k": reader.value("norm_topk_prob", null=False),
        **fields.rotary_by_kind(reader, sizes["head_size"]),
        "qk_norm": "head",
    }


@family("granitemoe", "Granite-MoE", "granite-3.0 and -3.1 1b-a400m and 3b-a800m, PowerMoE-3b")
def granitemoe(reader: ConfigReader) -> Switches:
    return {
        **fields.grouped(reader, "intermediate_size", bias="all"),
        "router_score": "softmax_top_k",
        "normalize_top_k": False,
        "attention_scale": reader.value("attention_multiplier"),
        "embedding_scale": reader.value("embedding_multiplier"),
        "residual_scale": reader.value("residual_multiplier"),
        "logits_divisor": reader.value("logits_scaling"),
    }


@family("granitemoeshared", "Granite-MoE-shared", "moe-7b-1b-active-shared-experts")
def granitemoeshared(reader: ConfigReader) -> Switches:
    return {**granitemoe(reader), "shared_hidden_size": reader.value("shared_intermediate_size")}


@family("hunyuan_v1_moe", "HunYuan-V1-MoE", "Hunyuan-A13B")
def hunyuan_v1_moe(reader: ConfigReader) -> Switches:
    sizes, width = fields.sizes(reader), reader.value("intermediate_size")
    reader.expect(use_cla=False, use_qk_norm=True, attention_head_dim=sizes["head_size"])
    # Published files spell these per layer; the classes of transformers know no other values.
    for key, only in (("num_shared_expert", 1), ("moe_intermediate_size", width)):
        if (value := reader.constant(key, null=only)) != only:
            raise unsupported(key, value, (only,))
    return {
        **sizes,
        **fields.attention_bias(reader, "all"),
        **fields.rotary(reader, sizes["head_size"], supported=(*fields.STATIC, "dynamic")),
        "num_experts": reader.constant("num_experts", "num_local_experts"),
        "experts_per_token": reader.constant("moe_topk", "num_experts_per_tok"),
        "expert_hidden_size": width,
        "shared_hidden_size": width,
        "qk_norm": "head_after_rope",
    }


@family("phimoe", "Phi-3.5-MoE", "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE")
def phimoe(reader: ConfigReader) -> Switches:
    return {
        **fields.grouped(reader, "intermediate_size", bias="all", ropes=("default", "longrope")),
        **fields.windows(reader),
        "norm": "layer",
        "head_bias": reader.value("lm_head_bias", null=False),
        "router_score": "sparsemixer",
        "normalize_top_k": False,
        "router_jitter": reader.value("router_jitter_noise"),
    }


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
    return {
        **fields.grouped(reader, "intermediate_size", bias="all"),
        **fields.windows(reader),
        "router_score": "softmax_top_k",
        "normalize_top_k": False,
        "router_bias": True,
        "expert_bias": True,
        "sinks": True,
        "activation": "clamped_swiglu",
        "swiglu_alpha": reader.value("swiglu_alpha"),
        "swiglu_limit": reader.value("swiglu_limit"),
    }
