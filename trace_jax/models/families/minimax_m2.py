"""MiniMax-M2: sigmoid router with correction, RMSNorm of all queries and keys, the first part of a head turns."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import MULTI_TOKEN, Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
}


def config(reader: ConfigReader) -> ModelConfig:
    reader.expect("scoring_func", "sigmoid")
    reader.expect("use_qk_norm", True)
    reader.expect("qk_norm_type", "per_layer")
    reader.expect("use_routing_bias", True)
    reader.expect("shared_intermediate_size", 0)
    head_size = fields.head_size(reader)
    part = reader.integer("rotary_dim", null=head_size) / head_size
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="num_local_experts", width="intermediate_size"),
        **rotary_fields(reader, head_size, partial=part),
        head_size=head_size,
        qk_norm="full",
        router_score="sigmoid",
        router_correction=True,
    )


FAMILY = Family(
    model_type="minimax_m2",
    title="MiniMax-M2",
    published="MiniMax-M2, MiniMax-M2.1",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.FULL_NORMS,
        names.router("block_sparse_moe.gate", "mlp.gate"),
        names.correction("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        names.MIXTRAL_EXPERTS,
    ),
    ignored={r"^(model\.)?mtp\.": MULTI_TOKEN},
)
