"""Shapes of published models, so that a run can be planned and checked before anything is downloaded.

Each is the config.json of the repository of the Hugging Face hub that `_name_or_path` names, typed in by hand: what the
family's defaults (`trace_jax.models.families`) already say is left out. A run never needs them: it reads its
checkpoint's config.json.
"""

from collections.abc import Mapping
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.families import model_config

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2409.02060, table 10.
    "olmoe-1b-7b": {"_name_or_path": "allenai/OLMoE-1B-7B-0924", "model_type": "olmoe", "intermediate_size": 1024},
    # The base model likewise.
    "qwen1.5-moe-a2.7b": {
        "_name_or_path": "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        "model_type": "qwen2_moe",
        "rope_theta": 1e6,
        "max_position_embeddings": 8192,
    },
    # arXiv 2405.04434, appendix B.
    "deepseek-v2-lite": {
        "_name_or_path": "deepseek-ai/DeepSeek-V2-Lite",
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
    # arXiv 2401.04088, table 1.
    "mixtral-8x7b": {
        "_name_or_path": "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "model_type": "mixtral",
        "rope_theta": 1e6,
    },
    # arXiv 2404.14219. The 2 x 64 published factors of its rotary embedding are not here: ones have the right length,
    # which is all that a plan or a dry run reads.
    "phi-3.5-moe": {
        "_name_or_path": "microsoft/Phi-3.5-MoE-instruct",
        "model_type": "phimoe",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 64,
            "short_factor": [1.0] * 64,
            "long_mscale": 1.243163121016122,
            "short_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
        },
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
    },
    # arXiv 2505.09388, table 2.
    "qwen3-30b-a3b": {
        "_name_or_path": "Qwen/Qwen3-30B-A3B",
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
    },
    # arXiv 2508.10925, table 1.
    "gpt-oss-20b": {
        "_name_or_path": "openai/gpt-oss-20b",
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
    },
}

# What decides which parameters there are, how large, and how many experts a token chooses.
_SHAPE = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "num_experts",
    "experts_per_token", "expert_hidden_size", "shared_hidden_size", "tie_embeddings", "router_bias",
    "router_correction", "expert_bias", "mlp_bias", "shared_gate", "dense_layers", "dense_hidden_size", "attention",
    "value_size", "latent_size", "query_latent_size", "rotary_width", "attention_bias", "attention_gate", "sinks",
    "qk_norm", "norm", "norm_placement", "moe_output_norm", "head_bias",
)  # fmt: skip


def published_config(name: str, *, dtype: str) -> ModelConfig:
    """The shape of a published model.

    Raises:
      ConfigError: a name that isn't in `PUBLISHED`; the message lists those that are.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"{name!r} is not a model whose shape is known here; known: {', '.join(PUBLISHED)}.")
    return model_config(PUBLISHED[name], dtype=dtype)


def shape_differences(model: ModelConfig, expected: ModelConfig) -> list[str]:
    """Fields of the shape in which two models differ, each as "field is A, expected B"."""
    pairs = ((field, getattr(model, field), getattr(expected, field)) for field in _SHAPE)
    return [f"{field} is {ours!r}, expected {theirs!r}" for field, ours, theirs in pairs if ours != theirs]
