"""FlexOlmo: OLMoE whose norms stand after attention and experts instead of before."""

import dataclasses

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import names, olmoe
from trace_jax.models.families.reader import ConfigReader

DEFAULTS = {
    **olmoe.DEFAULTS,
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500_000.0,
    "num_experts_per_tok": 5,
    "num_experts": 7,
}


def config(reader: ConfigReader) -> ModelConfig:
    return dataclasses.replace(olmoe.config(reader), norm_placement="post", clip_qkv=0.0)


FAMILY = dataclasses.replace(
    olmoe.FAMILY,
    model_type="flex_olmo",
    title="FlexOlmo",
    published="FlexOlmo-7x7B-1T",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
        names.GROUPED,
        names.FULL_NORMS,
        names.ROUTER,
        names.QWEN_EXPERTS,
    ),
)
