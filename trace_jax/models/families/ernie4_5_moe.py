"""ERNIE-4.5-MoE: softmax router with correction, neighbouring pairs turn, biases by choice."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import MULTI_TOKEN, Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 500_000.0,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def dense_layers(reader: ConfigReader) -> list[int]:
    """Layers outside of start..end, and all but every `moe_layer_interval`-th."""
    layers = range(reader.integer("num_hidden_layers"))
    first, last = reader.integer("moe_layer_start_index"), reader.integer("moe_layer_end_index")
    last, interval = layers[-1] if last == -1 else last, reader.integer("moe_layer_interval")
    return [layer for layer in layers if not first <= layer <= last or (layer + 1) % interval]


def config(reader: ConfigReader) -> ModelConfig:
    head_size, bias = fields.head_size(reader), reader.boolean("use_bias", null=False)
    return ModelConfig(
        **fields.sizes(reader),
        **fields.experts(reader, count="moe_num_experts", width="moe_intermediate_size", per_token="moe_k"),
        **fields.shared(reader, "moe_num_shared_experts"),
        **fields.attention_bias(reader, "use_bias"),
        **fields.dense(reader, dense_layers(reader)),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        mlp_bias=bias,
        head_bias=bias,
        router_correction=True,
        normalize_minimum=reader.number("moe_norm_min"),
        rope_interleaved=True,
    )


FAMILY = Family(
    model_type="ernie4_5_moe",
    title="ERNIE-4.5-MoE",
    published="ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.DENSE,
        names.ROUTER,
        names.correction(
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
            layout="1 e -> e",
        ),
        names.QWEN_EXPERTS,
        names.SHARED,
    ),
    ignored={r"^model\.mtp_": MULTI_TOKEN},
)
