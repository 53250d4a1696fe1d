"""AFMoE (Trinity): norms before and after each part, gated attention; only sliding layers have a rotary embedding."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 200192,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 32,
    "num_dense_layers": 1,
    "num_attention_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_shared_experts": 2,
    "route_scale": 1.0,
    "global_attn_every_n_layers": 4,
    "sliding_window": 1024,
}


def config(reader: ConfigReader) -> ModelConfig:
    reader.expect("score_func", "sigmoid")
    reader.expect("route_norm", True)
    reader.expect("n_group", 1)
    reader.expect("num_expert_groups", 1)
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    every = reader.integer("global_attn_every_n_layers")
    sliding = fields.sliding_layers(reader, ((layer + 1) % every != 0 for layer in range(sizes["num_layers"])))
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "num_shared_experts"),
        **fields.attention_bias(reader),
        **fields.dense(reader, range(reader.integer("num_dense_layers", null=0))),
        **fields.windows(reader, sliding),
        **fields.rope_where(sliding),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        attention_gate=True,
        norm_placement="both",
        qk_norm="head",
        router_score="sigmoid",
        router_correction=True,
        normalize_minimum=1e-20,
        routing_scale=reader.number("route_scale"),
        embedding_scale=sizes["hidden_size"] ** 0.5 if reader.boolean("mup_enabled", null=False) else 1.0,
    )


FAMILY = Family(
    model_type="afmoe",
    title="AFMoE",
    published="Trinity-Nano, Trinity-Mini",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.norms(
            attention_norm="input_layernorm",
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_mlp_layernorm",
            mlp_post_norm="post_mlp_layernorm",
        ),
        names.GROUPED,
        names.HEAD_NORMS,
        names.block(("attention_gate", "(h c) d -> d h c", "self_attn.gate_proj.weight")),
        names.DENSE,
        names.router("mlp.router.gate"),
        names.correction("mlp.expert_bias"),
        names.QWEN_EXPERTS,
        names.SHARED,
    ),
)
