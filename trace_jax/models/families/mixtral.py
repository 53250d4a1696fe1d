"""Mixtral: softmax over all experts, always renormalised; a window on all layers or none."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    slides = reader.integer("sliding_window", null=None) is not None
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_local_experts", width="intermediate_size"),
        **fields.windows(reader, (slides,) * sizes["num_layers"]),
        **rotary_fields(reader, head_size),
        head_size=head_size,
    )


FAMILY = Family(
    model_type="mixtral",
    title="Mixtral",
    published="Mixtral-8x7B, Mixtral-8x22B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.router("block_sparse_moe.gate", "mlp.gate"),
        names.MIXTRAL_EXPERTS,
    ),
)
