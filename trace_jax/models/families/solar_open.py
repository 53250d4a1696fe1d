"""Solar-Open: DeepSeek-V3's router on plain grouped attention; every layer has experts."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 196608,
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "moe_intermediate_size": 1280,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "head_dim": 128,
}


def config(reader: ConfigReader) -> ModelConfig:
    reader.expect("first_k_dense_replace", 0)
    reader.expect("use_qk_norm", False)
    head_size = fields.head_size(reader)
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="n_routed_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "n_shared_experts"),
        **fields.attention_bias(reader, kind="qkv"),
        **fields.corrected_router(reader),
        **fields.dense(reader, ()),
        **rotary_fields(reader, head_size),
        head_size=head_size,
    )


FAMILY = Family(
    model_type="solar_open",
    title="Solar-Open",
    published="Solar-Open-100B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(names.PRE_NORMS, names.GROUPED, *names.CORRECTED_EXPERTS),
)
