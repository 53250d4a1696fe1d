"""dots.llm1: DeepSeek-V3's router on grouped attention with a norm of each head; windows on the last layers."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "max_window_layers": 62,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    slides, first = reader.integer("sliding_window", null=None) is not None, reader.integer("max_window_layers")
    sliding = fields.sliding_layers(reader, (slides and layer >= first for layer in range(sizes["num_layers"])))
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="n_routed_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "n_shared_experts"),
        **fields.attention_bias(reader),
        **fields.corrected_router(reader),
        **fields.leading_dense(reader),
        **fields.windows(reader, sliding),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        qk_norm="head",
    )


FAMILY = Family(
    model_type="dots1",
    title="dots.llm1",
    published="dots.llm1",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(names.PRE_NORMS, names.GROUPED, names.HEAD_NORMS, *names.CORRECTED_EXPERTS),
)
