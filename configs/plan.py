"""Shapes of published models, for `plan`: what unlearning from them takes on which machine. No weights are needed.

Command:   python -m trace_jax.main plan --config configs/plan.py:mixtral-8x7b --topology v5p:2x2x4
Variants:  olmoe-1b-7b, qwen1.5-moe-a2.7b, deepseek-v2-lite, mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b
Hardware:  none: a laptop compiles for the machine that is named. Minutes per program and GBs of memory.
Result:    docs/scaling.md, "Planning".
"""

import ml_collections

from trace_jax.config import ConfigError, as_dict
from trace_jax.models.families import model_config

# What their config.json files say, where the family's defaults (trace_jax/models/families) are others.
MODELS = {
    "olmoe-1b-7b": {"model_type": "olmoe", "intermediate_size": 1024},
    "qwen1.5-moe-a2.7b": {"model_type": "qwen2_moe"},
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "mixtral-8x7b": {"model_type": "mixtral", "rope_theta": 1e6},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
    },
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
}


def get_config(variant: str = "olmoe-1b-7b") -> ml_collections.ConfigDict:
    """What trains is what configs/huggingface.py trains: the down projections of all experts."""
    config = ml_collections.ConfigDict()
    if variant not in MODELS:
        raise ConfigError(f"{variant!r} is no model of configs/plan.py; known: {', '.join(MODELS)}.")
    config.name = variant
    config.model = as_dict(model_config(MODELS[variant], dtype="bfloat16"))
    config.data = {"row_length": 512}
    config.unlearning = {
        "nll_ceiling": 6.0,
        "trainable": "down_projections",
        "forget_batch_size": 16,
        "retain_batch_size": 16,
    }
    config.evaluation = {"batch_size": 32}
    config.parallel = {"remat": "layer", "expert_buffer": 2.0}
    return config
