"""Granite-MoE: four multipliers, top-k before softmax, experts in one tensor on disk."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="num_local_experts", width="intermediate_size"),
        **fields.attention_bias(reader),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        router_score="softmax_top_k",
        normalize_top_k=False,
        attention_scale=reader.number("attention_multiplier"),
        embedding_scale=reader.number("embedding_multiplier"),
        residual_scale=reader.number("residual_multiplier"),
        logits_divisor=reader.number("logits_scaling"),
    )


TABLES = (
    names.PRE_NORMS,
    names.GROUPED,
    names.router("block_sparse_moe.router.layer", "block_sparse_moe.router"),
    names.fused_experts("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    names.fused_experts("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
)

FAMILY = Family(
    model_type="granitemoe",
    title="Granite-MoE",
    published="granite-3.0 and -3.1 1b-a400m and 3b-a800m, PowerMoE-3b",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(*TABLES),
)
