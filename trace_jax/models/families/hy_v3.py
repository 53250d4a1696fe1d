"""HY-V3: sigmoid router with correction and scale, a norm of each head, the first layer dense."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import EXTRA_LAYERS, Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 120832,
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 11_158_840.0,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "router_scaling_factor": 2.826,
    "enable_moe_fp32_combine": True,
}


def config(reader: ConfigReader) -> ModelConfig:
    reader.boolean("enable_moe_fp32_combine", null=True)  # concerns rounding below float32 only
    reader.expect("qk_norm", True)
    reader.expect("route_norm", True)
    reader.expect("moe_router_use_sigmoid", True)
    reader.expect("moe_router_enable_expert_bias", True)
    head_size = fields.head_size(reader)
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="num_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "num_shared_experts"),
        **fields.attention_bias(reader),
        **fields.leading_dense(reader, first=1),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        mlp_bias=reader.boolean("mlp_bias", null=False),
        qk_norm="head",
        router_score="sigmoid",
        router_correction=True,
        normalize_minimum=1e-20,
        routing_scale=reader.number("router_scaling_factor"),
    )


FAMILY = Family(
    model_type="hy_v3",
    title="HY-V3",
    published="Hy3-preview",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.HEAD_NORMS,
        names.DENSE,
        names.router("mlp.router.gate", "mlp.gate"),
        names.correction("mlp.expert_bias", "mlp.e_score_correction_bias"),
        names.QWEN_EXPERTS,
        names.shared("mlp.shared_mlp"),
        names.SHARED,
    ),
    ignored=EXTRA_LAYERS,
)
