"""OLMoE: RMSNorm of all queries and keys together, then an optional clip."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
    "num_experts": 64,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="num_experts", width="intermediate_size"),
        **fields.attention_bias(reader),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        qk_norm="full",
        clip_qkv=reader.number("clip_qkv", null=0.0),
        normalize_top_k=reader.boolean("norm_topk_prob", null=False),
    )


FAMILY = Family(
    model_type="olmoe",
    title="OLMoE",
    published="OLMoE-1B-7B-0924, OLMoE-1B-7B-0125",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(names.PRE_NORMS, names.GROUPED, names.FULL_NORMS, names.ROUTER, names.QWEN_EXPERTS),
)
