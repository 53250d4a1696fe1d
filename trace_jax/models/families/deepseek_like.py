"""Families whose router chooses by a corrected score, or whose attention is latent: DeepSeek and its kin."""

from trace_jax.models.families import fields, names
from trace_jax.models.families.family import EXTRA_LAYERS, MULTI_TOKEN, Switches, family
from trace_jax.models.families.reader import ConfigReader, unsupported
from trace_jax.models.families.rope import latent_rotary


@family(
    "minimax_m2",
    "MiniMax-M2",
    "MiniMax-M2, MiniMax-M2.1",
    names.PLAIN,
    names.FULL_NORMS,
    names.router("block_sparse_moe.gate", "mlp.gate"),
    names.correction("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
    names.MIXTRAL_EXPERTS,
    ignored={r"^(model\.)?mtp\.": MULTI_TOKEN},
)
def minimax_m2(reader: ConfigReader) -> Switches:
    reader.expect("scoring_func", "sigmoid")
    reader.expect("use_qk_norm", True)
    reader.expect("qk_norm_type", "per_layer")
    reader.expect("use_routing_bias", True)
    reader.expect("shared_intermediate_size", 0)
    reader.folded("rotary_dim")
    return {
        **fields.grouped(reader, "intermediate_size", partial=True),
        "qk_norm": "full",
        "router_score": "sigmoid",
        "router_correction": True,
    }


def _corrected(reader: ConfigReader, *, bias: str = "none", partial: bool = False) -> Switches:
    """Grouped-query attention with DeepSeek-V3's experts."""
    return {
        **fields.grouped(reader, bias=bias, partial=partial),
        **fields.shared(reader),
        **fields.corrected_router(reader),
    }


HEADS = names.PLAIN + names.HEAD_NORMS


@family("dots1", "dots.llm1", "dots.llm1", HEADS, names.DEEPSEEK_EXPERTS)
def dots1(reader: ConfigReader) -> Switches:
    return {
        **_corrected(reader, bias="all"),
        **fields.leading_dense(reader),
        **fields.windows(reader),
        "qk_norm": "head",
    }


@family(
    "glm4_moe",
    "GLM-4-MoE",
    "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    HEADS,
    names.DEEPSEEK_EXPERTS,
    ignored=EXTRA_LAYERS,
)
def glm4_moe(reader: ConfigReader) -> Switches:
    return {
        **_corrected(reader, bias="qkv", partial=True),
        **fields.leading_dense(reader),
        "qk_norm": "head" if reader.boolean("use_qk_norm", null=False) else "none",
    }


@family("solar_open", "Solar-Open", "Solar-Open-100B", names.PLAIN, names.DEEPSEEK_EXPERTS)
def solar_open(reader: ConfigReader) -> Switches:
    reader.expect("first_k_dense_replace", 0)
    reader.expect("use_qk_norm", False)
    reader.folded("intermediate_size")  # of dense layers, which it hasn't
    return _corrected(reader, bias="qkv")


@family(
    "exaone_moe",
    "EXAONE-MoE",
    "K-EXAONE-236B-A23B",
    HEADS,
    names.correction("mlp.e_score_correction_bias"),
    names.DEEPSEEK_EXPERTS,
    ignored={r"^mtp\.": MULTI_TOKEN},
)
def exaone_moe(reader: ConfigReader) -> Switches:
    return {
        **_corrected(reader),
        **fields.leading_dense(reader),
        **fields.windows(reader),
        **fields.rope_where_sliding(reader),
        "qk_norm": "head",
    }


@family(
    "hy_v3",
    "HY-V3",
    "Hy3-preview",
    HEADS,
    names.DENSE,
    names.router("mlp.router.gate", "mlp.gate"),
    names.correction("mlp.expert_bias", "mlp.e_score_correction_bias"),
    names.QWEN_EXPERTS,
    names.shared("mlp.shared_mlp"),
    names.SHARED,
    ignored=EXTRA_LAYERS,
)
def hy_v3(reader: ConfigReader) -> Switches:
    reader.boolean("enable_moe_fp32_combine", null=True)  # concerns rounding below float32 only
    reader.expect("qk_norm", True)
    reader.expect("route_norm", True)
    reader.expect("moe_router_use_sigmoid", True)
    reader.expect("moe_router_enable_expert_bias", True)
    return {
        **fields.grouped(reader, bias="all"),
        **fields.shared(reader),
        **fields.leading_dense(reader),
        "mlp_bias": reader.boolean("mlp_bias", null=False),
        "qk_norm": "head",
        "router_score": "sigmoid",
        "router_correction": True,
        "normalize_minimum": 1e-20,
        "routing_scale": reader.number("router_scaling_factor"),
    }


@family(
    "afmoe",
    "AFMoE",
    "Trinity-Nano, Trinity-Mini",
    names.norms(
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_mlp_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    ),
    names.GROUPED,
    names.HEAD_NORMS,
    names.block(("attention_gate", "(h c) d -> d h c", "self_attn.gate_proj.weight")),
    names.DENSE,
    names.router("mlp.router.gate"),
    names.correction("mlp.expert_bias"),
    names.QWEN_EXPERTS,
    names.SHARED,
)
def afmoe(reader: ConfigReader) -> Switches:
    reader.expect("score_func", "sigmoid")
    reader.expect("route_norm", True)
    reader.expect("n_group", 1)
    reader.expect("num_expert_groups", 1)
    return {
        **fields.grouped(reader, bias="all"),
        **fields.shared(reader),
        **fields.dense(reader, range(reader.integer("num_dense_layers", null=0))),
        **fields.windows(reader),
        **fields.rope_where_sliding(reader),
        "attention_gate": True,
        "norm_placement": "both",
        "qk_norm": "head",
        "router_score": "sigmoid",
        "router_correction": True,
        "normalize_minimum": 1e-20,
        "routing_scale": reader.number("route_scale"),
        "embedding_scale": reader.integer("hidden_size") ** 0.5 if reader.boolean("mup_enabled", null=False) else 1.0,
    }


@family(
    "ernie4_5_moe",
    "ERNIE-4.5-MoE",
    "ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B",
    names.PLAIN,
    names.DENSE,
    names.ROUTER,
    names.correction(
        "mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias", layout="1 e -> e"
    ),
    names.QWEN_EXPERTS,
    names.SHARED,
    ignored={r"^model\.mtp_": MULTI_TOKEN},
)
def ernie4_5_moe(reader: ConfigReader) -> Switches:
    bias = reader.boolean("use_bias", null=False)
    first, last = reader.integer("moe_layer_start_index"), reader.integer("moe_layer_end_index")
    interval, layers = reader.integer("moe_layer_interval"), range(reader.integer("num_hidden_layers"))
    return {
        **fields.grouped(reader),
        **fields.shared(reader),
        **fields.attention_bias(reader, "all", key="use_bias"),
        **fields.dense(reader, (at for at in layers if not first <= at <= last or (at + 1) % interval)),
        "mlp_bias": bias,
        "head_bias": bias,
        "router_correction": True,
        "normalize_minimum": reader.number("moe_norm_min"),
        "rope_interleaved": True,
    }


def _latent(reader: ConfigReader) -> Switches:
    """What families with latent attention and DeepSeek's experts share."""
    sizes = fields.sizes(reader)
    if sizes["num_kv_heads"] != sizes["num_heads"]:
        raise unsupported("num_key_value_heads", sizes["num_kv_heads"], (sizes["num_heads"],))
    rotary_size = reader.integer("qk_rope_head_dim")
    head_size = reader.integer("qk_nope_head_dim") + rotary_size
    reader.expect("head_dim", rotary_size, head_size)
    reader.expect("qk_head_dim", head_size)
    return {
        **sizes,
        **fields.experts(reader),
        **fields.shared(reader),
        **fields.attention_bias(reader, "all"),
        **fields.leading_dense(reader),
        **latent_rotary(reader, head_size, rotary_size),
        "attention": "latent",
        "head_size": head_size,
        "value_size": reader.integer("v_head_dim"),
        "latent_size": reader.integer("kv_lora_rank"),
        "query_latent_size": reader.integer("q_lora_rank", null=0),
    }


LATENT = names.PRE_NORMS + names.LATENT + names.DEEPSEEK_EXPERTS


@family("deepseek_v2", "DeepSeek-V2", "DeepSeek-V2, -V2-Lite, -V2.5, -Coder-V2", LATENT)
def deepseek_v2(reader: ConfigReader) -> Switches:
    reader.expect("scoring_func", "softmax")
    reader.folded("norm_topk_prob")  # has no effect in transformers either
    grouped = reader.expect("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    groups, chosen = reader.integer("n_group", null=1), reader.integer("topk_group", null=1)
    return {
        **_latent(reader),
        "mlp_bias": reader.boolean("mlp_bias", null=False),
        "num_groups": groups if grouped else 1,
        "groups_per_token": chosen if grouped else 1,
        "normalize_top_k": False,
        "routing_scale": reader.number("routed_scaling_factor"),
        "rope_interleaved": True,
    }


@family(
    "deepseek_v3", "DeepSeek-V3", "DeepSeek-V3, -R1 and -V3.1, Kimi-K2, Moonlight-16B-A3B", LATENT, ignored=EXTRA_LAYERS
)
@family("glm4_moe_lite", "GLM-4-MoE-lite", "GLM-4.7-Flash", LATENT, ignored=EXTRA_LAYERS)
def deepseek_v3(reader: ConfigReader) -> Switches:
    interleaved = reader.boolean("rope_interleave", null=False)
    return {**_latent(reader), **fields.corrected_router(reader), "rope_interleaved": interleaved}


@family(
    "axk1",
    "A.X-K1",
    "A.X-K1",
    LATENT,
    names.moe(
        ("moe_output_norm", "d -> d", "post_mlp_layernorm.weight"),
        ("moe_output_norm", "d -> d", "mlp.post_mlp_layernorm.weight"),
    ),
    ignored={r"^model\.layers\.0\.(mlp\.)?post_mlp_layernorm\.": "a norm of experts in a layer that has none"},
)
def axk1(reader: ConfigReader) -> Switches:
    return {**deepseek_v3(reader), "moe_output_norm": True}
