"""DeepSeek-V2: latent attention, softmax router that may choose from the groups with the best expert."""

import dataclasses

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import deepseek_v3, fields
from trace_jax.models.families.reader import ConfigReader

DEFAULTS = {
    **deepseek_v3.DEFAULTS,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "topk_method": "greedy",
}


def config(reader: ConfigReader) -> ModelConfig:
    reader.expect("scoring_func", "softmax")
    reader.boolean("norm_topk_prob", null=False)  # has no effect in transformers either
    method = reader.expect("topk_method", "greedy", "group_limited_greedy")
    groups, chosen = reader.integer("n_group", null=1), reader.integer("topk_group", null=1)
    return ModelConfig(
        **deepseek_v3.latent(reader),
        **fields.leading_dense(reader),
        mlp_bias=reader.boolean("mlp_bias", null=False),
        num_groups=1 if method == "greedy" else groups,
        groups_per_token=1 if method == "greedy" else chosen,
        normalize_top_k=False,
        routing_scale=reader.number("routed_scaling_factor"),
        rope_interleaved=True,
    )


FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="deepseek_v2",
    title="DeepSeek-V2",
    published="DeepSeek-V2, -V2-Lite, -V2.5, -Coder-V2",
    defaults=DEFAULTS,
    config=config,
    ignored={},
)
