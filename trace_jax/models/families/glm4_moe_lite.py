"""GLM-4-MoE-lite: DeepSeek-V3 of other sizes."""

import dataclasses

from trace_jax.models.families import deepseek_v3

DEFAULTS = {
    **deepseek_v3.DEFAULTS,
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "q_lora_rank": 768,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
}

FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="glm4_moe_lite",
    title="GLM-4-MoE-lite",
    published="GLM-4.7-Flash",
    defaults=DEFAULTS,
)
