"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, sigmoid router with correction and groups."""

from typing import Any

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import EXTRA_LAYERS, Family
from trace_jax.models.families.reader import ConfigReader, unsupported
from trace_jax.models.families.rope import latent_fields

DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
}


def latent(reader: ConfigReader) -> dict[str, Any]:
    """What families with latent attention and DeepSeek's experts share."""
    sizes = fields.sizes(reader)
    if sizes["num_kv_heads"] != sizes["num_heads"]:
        raise unsupported("num_key_value_heads", sizes["num_kv_heads"], (sizes["num_heads"],))
    rotary = reader.integer("qk_rope_head_dim")
    head_size = reader.integer("qk_nope_head_dim") + rotary
    reader.expect("head_dim", rotary, head_size)
    reader.expect("qk_head_dim", head_size)
    return {
        **sizes,
        **fields.experts(reader, count="n_routed_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "n_shared_experts"),
        **fields.attention_bias(reader),
        **latent_fields(reader, head_size, rotary),
        "attention": "latent",
        "head_size": head_size,
        "value_size": reader.integer("v_head_dim"),
        "latent_size": reader.integer("kv_lora_rank"),
        "query_latent_size": reader.integer("q_lora_rank", null=0),
    }


def config(reader: ConfigReader) -> ModelConfig:
    return ModelConfig(
        **latent(reader),
        **fields.corrected_router(reader),
        **fields.leading_dense(reader),
        rope_interleaved=reader.boolean("rope_interleave", null=False),
    )


TABLES = (names.PRE_NORMS, names.LATENT, *names.CORRECTED_EXPERTS)

FAMILY = Family(
    model_type="deepseek_v3",
    title="DeepSeek-V3",
    published="DeepSeek-V3, -R1 and -V3.1, Kimi-K2, Moonlight-16B-A3B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(*TABLES),
    ignored=EXTRA_LAYERS,
)
