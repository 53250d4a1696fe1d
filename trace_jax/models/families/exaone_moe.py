"""EXAONE-MoE: DeepSeek-V3's router; layers that see everything have no rotary embedding."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import MULTI_TOKEN, Family
from trace_jax.models.families.reader import ConfigReader
from trace_jax.models.families.rope import rotary_fields

DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}


def sliding_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """By `layer_types`; in files without it, all but every `sliding_window_pattern`-th layer."""
    kinds = fields.sliding_layers(reader, ())
    if kinds:
        return kinds
    if reader.integer("sliding_window", null=None) is None:
        return (False,) * num_layers
    pattern = reader.integer("sliding_window_pattern")
    return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))


def config(reader: ConfigReader) -> ModelConfig:
    head_size = fields.head_size(reader)
    sizes = fields.sizes(reader)
    sliding = sliding_layers(reader, sizes["num_layers"])
    has_window = reader.integer("sliding_window", null=None) is not None
    return ModelConfig(
        **sizes,
        **fields.experts(reader, count="num_experts", width="moe_intermediate_size"),
        **fields.shared(reader, "num_shared_experts"),
        **fields.corrected_router(reader),
        **fields.leading_dense(reader),
        **fields.windows(reader, sliding),
        **(fields.rope_where(sliding) if has_window else {}),
        **rotary_fields(reader, head_size),
        head_size=head_size,
        qk_norm="head",
    )


FAMILY = Family(
    model_type="exaone_moe",
    title="EXAONE-MoE",
    published="K-EXAONE-236B-A23B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.HEAD_NORMS,
        names.correction("mlp.e_score_correction_bias"),
        *names.CORRECTED_EXPERTS,
    ),
    ignored={r"^mtp\.": MULTI_TOKEN},
)
