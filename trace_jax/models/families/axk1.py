"""A.X-K1: DeepSeek-V3 with a norm after the sum of routed and shared experts."""

import dataclasses

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import deepseek_v3, names
from trace_jax.models.families.reader import ConfigReader

DEFAULTS = {
    **deepseek_v3.DEFAULTS,
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 192,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 32768,
}


def config(reader: ConfigReader) -> ModelConfig:
    return dataclasses.replace(deepseek_v3.config(reader), moe_output_norm=True)


FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="axk1",
    title="A.X-K1",
    published="A.X-K1",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        *deepseek_v3.TABLES,
        names.moe(
            ("moe_output_norm", "d -> d", "post_mlp_layernorm.weight"),
            ("moe_output_norm", "d -> d", "mlp.post_mlp_layernorm.weight"),
        ),
    ),
    ignored={r"^model\.layers\.0\.(mlp\.)?post_mlp_layernorm\.": "a norm of experts in a layer that has none"},
)
