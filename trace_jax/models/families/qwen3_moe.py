"""Qwen3-MoE: RMSNorm of each query and key head, free head width, dense layers by list or step."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    slides = reader.boolean("use_sliding_window", null=False) and reader.integer("sliding_window", null=None)
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_experts", width="moe_intermediate_size"),
        **fields.attention_bias(reader),
        **fields.sparse_step(reader),
        **fields.windows(reader, (bool(slides),) * sizes["num_layers"]),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        qk_norm="head",
        normalize_top_k=reader.boolean("norm_topk_prob", null=False),
    )


FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    published="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS, names.GROUPED, names.HEAD_NORMS, names.DENSE, names.ROUTER, names.QWEN_EXPERTS
    ),
)
