"""GLM-4-MoE: DeepSeek-V3's router on grouped attention; half of each head turns; query and key norms by choice."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import EXTRA_LAYERS, Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="n_routed_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "n_shared_experts"),
        **fields.attention_bias(reader, kind="qkv"),
        **fields.corrected_router(reader),
        **fields.leading_dense(reader),
        **rotary_fields(reader, head_size, partial=0.5),
        head_size=head_size,
        qk_norm="head" if reader.boolean("use_qk_norm", null=False) else "none",
    )


FAMILY = Family(
    model_type="glm4_moe",
    title="GLM-4-MoE",
    published="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(names.PRE_NORMS, names.GROUPED, names.HEAD_NORMS, *names.CORRECTED_EXPERTS),
    ignored=EXTRA_LAYERS,
)
