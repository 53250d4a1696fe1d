"""HunYuan-V1-MoE: query and key norms after the rotary embedding, whose base a fixed alpha changes."""

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import fields, names
from trace_jax.models.families.family import Family
from trace_jax.models.families.reader import ConfigReader, unsupported
from trace_jax.models.families.rope import STATIC, rotary_fields

DEFAULTS = {
    "vocab_size": 290943,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "num_experts": 1,
    "moe_topk": 1,
}


def config(reader: ConfigReader) -> ModelConfig:
    head_size, width = fields.head_size(reader), reader.integer("intermediate_size")
    reader.expect("use_cla", False)
    reader.expect("use_qk_norm", True)
    reader.expect("attention_head_dim", head_size)
    # Published files spell these per layer; the classes of transformers know no other values.
    for key, only in (("num_shared_expert", 1), ("moe_intermediate_size", width)):
        if (given := reader.constant(key, null=only)) != only:
            raise unsupported(key, given, (only,))
    return ModelConfig(
        **fields.sizes(reader),
        **fields.attention_bias(reader),
        **rotary_fields(reader, head_size, supported=(*STATIC, "dynamic")),
        head_size=head_size,
        num_experts=reader.constant("num_experts", "num_local_experts"),
        experts_per_token=reader.constant("moe_topk", "num_experts_per_tok"),
        expert_hidden_size=width,
        shared_hidden_size=width,
        qk_norm="head_after_rope",
    )


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    title="HunYuan-V1-MoE",
    published="Hunyuan-A13B",
    defaults=DEFAULTS,
    config=config,
    stored=names.stored_as(
        names.PRE_NORMS,
        names.GROUPED,
        names.block(
            ("q_norm", "c -> c", "self_attn.query_layernorm.weight"),
            ("k_norm", "c -> c", "self_attn.key_layernorm.weight"),
        ),
        names.router("mlp.gate.wg"),
        names.QWEN_EXPERTS,
        names.shared("mlp.shared_mlp"),
    ),
)
