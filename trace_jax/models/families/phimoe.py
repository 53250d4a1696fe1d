"""Phi-3.5-MoE: sparse mixer, LayerNorm with bias, rotary embedding with long-context factors."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 16,
    "router_jitter_noise": 0.01,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    slides = reader.integer("sliding_window", null=None) is not None
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_local_experts", width="intermediate_size"),
        **fields.attention_bias(reader),
        **fields.windows(reader, (slides,) * sizes["num_layers"]),
        **rotary_fields(reader, head_size, supported=("default", "longrope")),
        head_size=head_size,
        norm="layer",
        head_bias=reader.boolean("lm_head_bias", null=False),
        router_score="sparsemixer",
        normalize_top_k=False,
        router_jitter=reader.number("router_jitter_noise"),
    )


FAMILY = Family(
    model_type="phimoe",
    title="Phi-3.5-MoE",
    published="Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.router("block_sparse_moe.gate", "mlp.router"),
        names.MIXTRAL_EXPERTS,
    ),
)
