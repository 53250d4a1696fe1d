"""GPT-OSS: attention sinks, windows on every other layer, biases, clamped and interleaved experts, MXFP4 on disk."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    sliding = fields.sliding_layers(reader, (layer % 2 == 0 for layer in range(sizes["num_layers"])))
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_local_experts", width="intermediate_size"),
        **fields.attention_bias(reader),
        **fields.windows(reader, sliding),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        router_score="softmax_top_k",
        normalize_top_k=False,
        router_bias=True,
        expert_bias=True,
        sinks=True,
        activation="clamped_swiglu",
        swiglu_alpha=reader.number("swiglu_alpha"),
        swiglu_limit=reader.number("swiglu_limit"),
    )


# Gate and up stand in alternate columns. MXFP4 packs along the input axis, which is the last one there.
EXPERTS = (
    *names.moe(
        ("experts/gate_up", "e (f g) d -> e d g f", "mlp.experts.gate_up_proj"),
        ("experts/down", "e d f -> e f d", "mlp.experts.down_proj"),
        storage="mxfp4",
    ),
    *names.moe(
        ("experts/gate_up", "e d (f g) -> e d g f", "mlp.experts.gate_up_proj"),
        ("experts/down", "e f d -> e f d", "mlp.experts.down_proj"),
        ("experts/gate_up_bias", "e (f g) -> e g f", "mlp.experts.gate_up_proj_bias"),
        ("experts/down_bias", "e d -> e d", "mlp.experts.down_proj_bias"),
    ),
)

FAMILY = Family(
    model_type="gpt_oss",
    title="GPT-OSS",
    published="gpt-oss-20b, gpt-oss-120b",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.block(("sinks", "h -> h", "self_attn.sinks")),
        names.router("mlp.router"),
        names.moe(("router_bias", "e -> e", "mlp.router.bias")),
        EXPERTS,
    ),
)
