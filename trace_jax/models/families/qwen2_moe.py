"""Qwen2-MoE: biases of queries, keys and values, and a shared expert behind a sigmoid gate."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader, unsupported
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "qkv_bias": True,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    slides, last = reader.boolean("use_sliding_window", null=False), reader.integer("max_window_layers")
    sliding = fields.sliding_layers(
        reader, (slides and layer % 2 == 0 and layer < last for layer in range(sizes["num_layers"]))
    )
    if any(sliding) and not slides:
        raise unsupported("use_sliding_window", slides, (True,))
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_experts", width="moe_intermediate_size"),
        **fields.attention_bias(reader, "qkv_bias", kind="qkv"),
        **fields.sparse_step(reader),
        **fields.windows(reader, sliding),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        shared_hidden_size=reader.integer("shared_expert_intermediate_size"),
        shared_gate=True,
        normalize_top_k=reader.boolean("norm_topk_prob", null=False),
    )


FAMILY = Family(
    model_type="qwen2_moe",
    title="Qwen2-MoE",
    published="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.DENSE,
        names.ROUTER,
        names.QWEN_EXPERTS,
        names.shared("mlp.shared_expert"),
        names.moe(("shared/gate", "1 d -> d", "mlp.shared_expert_gate.weight")),
    ),
)
