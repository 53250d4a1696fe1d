"""Mellum: Qwen3-MoE whose full and sliding layers have rotary embeddings of their own."""

import dataclasses

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, qwen3_moe
from trace_jax.models.families.family import MULTI_TOKEN
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields_by_kind

DEFAULTS = {
    "vocab_size": 98304,
    "hidden_size": 2304,
    "intermediate_size": 7168,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "sliding_window": 1024,
    "moe_intermediate_size": 896,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": True,
    "head_dim": 128,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    sliding = fields.sliding_layers(reader, (False,) * sizes["num_layers"])
    kinds = tuple(fields.SLIDING if slides else fields.FULL for slides in sliding)
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_experts", width="moe_intermediate_size"),
        **fields.attention_bias(reader),
        **fields.leading_dense(reader),
        **fields.windows(reader, sliding),
        **rotary_fields_by_kind(reader, head_size, kinds),
        head_size=head_size,
        qk_norm="head",
        normalize_top_k=reader.boolean("norm_topk_prob", null=False),
    )


FAMILY = dataclasses.replace(
    qwen3_moe.FAMILY,
    model_type="mellum",
    title="Mellum 2",
    published="Mellum2-12B-A2.5B",
    defaults=DEFAULTS,
    config=config,
    ignored={r"^mtp\.": MULTI_TOKEN},
)
