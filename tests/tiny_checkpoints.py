"""Tiny random checkpoints of every family, made by transformers' own classes, with every switch of the family on.

Whatever a class starts at zeros or ones (norms, biases, sinks, corrections) is random here: a port that ignored it
would be seen. Sizes are such that windows, long-context factors and groups act on texts of `LENGTH` tokens.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

LENGTH = 24
LAYOUTS = ("original", "fused")
KIMI = "kimi_k2"

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
_EIGHT = {"num_local_experts": 8, "head_dim": 16}
_SHARED = {"num_experts": 8, "moe_intermediate_size": 24, "num_shared_experts": 2, "head_dim": 16}
_ROUTED = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
_LATENT = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "attention_bias": True,
    "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4.0, "beta_slow": 1.0},
}
_CORRECTED = {**_ROUTED, "norm_topk_prob": True, "head_dim": 16}
_GRANITE = {
    "num_local_experts": 8,
    "attention_bias": True,
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
}
_KINDS = ["sliding_attention", "full_attention"]

# What differs from _COMMON, by model_type.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_EIGHT, "sliding_window": 5},
    "olmoe": {
        "num_experts": 8, "clip_qkv": 1.2, "attention_bias": True, "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    },
    "flex_olmo": {"num_experts": 8, "attention_bias": True, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1],
        "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "norm_topk_prob": True,
    },
    "qwen3_moe": {
        **_EIGHT, "moe_intermediate_size": 24, "attention_bias": True, "decoder_sparse_step": 2,
        "norm_topk_prob": True, "rope_parameters": _YARN,
    },
    "granitemoe": _GRANITE,
    "granitemoeshared": {**_GRANITE, "shared_intermediate_size": 28, "tie_word_embeddings": True},
    "hunyuan_v1_moe": {
        "num_experts": 8, "moe_topk": 3, "head_dim": 16, "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 1.0, "alpha": 20.0},
    },
    "mellum": {
        **_EIGHT, "moe_intermediate_size": 24, "attention_bias": True, "sliding_window": 6, "layer_types": _KINDS,
        "mlp_layer_types": ["sparse", "dense"],
        "rope_parameters": {"full_attention": {**_YARN, "truncate": False},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
    },
    "minimax_m2": {
        **_EIGHT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "dots1": {
        **_CORRECTED, "attention_bias": True, "first_k_dense_replace": 1, "sliding_window": 5, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "glm4_moe": {**_CORRECTED, "attention_bias": True, "first_k_dense_replace": 1, "use_qk_norm": True},
    "solar_open": {**_CORRECTED, "attention_bias": True, "rope_parameters": _YARN},
    "exaone_moe": {
        **_SHARED, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "norm_topk_prob": True,
        "sliding_window": 5, "sliding_window_pattern": 2, "layer_types": _KINDS, "first_k_dense_replace": 1,
    },
    "hy_v3": {**_SHARED, "attention_bias": True, "mlp_bias": True, "router_scaling_factor": 1.7},
    "afmoe": {
        **_SHARED, "attention_bias": True, "num_dense_layers": 1, "sliding_window": 6,
        "global_attn_every_n_layers": 2, "mup_enabled": True, "route_scale": 1.7,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_norm_min": 0.7, "use_bias": True,
    },
    "gpt_oss": {
        **_EIGHT, "sliding_window": 5, "layer_types": _KINDS, "swiglu_alpha": 1.5, "swiglu_limit": 0.9,
        "rope_parameters": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    },
    "deepseek_v2": {
        **_LATENT, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1, "mlp_bias": True,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 1},
    KIMI: {
        **_LATENT, "first_k_dense_replace": 1, "q_lora_rank": None, "rope_interleave": False, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": False, "attention_bias": False, "routed_scaling_factor": 0.8,
    },
    "glm4_moe_lite": {**_LATENT, "v_head_dim": 14, "q_lora_rank": 24, "mlp_layer_types": ["dense", "sparse"]},
    "axk1": {**_LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "phimoe": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.3, "attention_bias": True,
        "lm_head_bias": True, "sliding_window": 7,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.3, 1.9, 2.2, 3.0, 4.0],
            "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5], "short_mscale": 1.1, "long_mscale": 1.4,
            "original_max_position_embeddings": 16,
        },
    },
}  # fmt: skip
MODEL_TYPES = tuple(CONFIGS)


def fields_of(model_type: str) -> dict[str, Any]:
    """What config.json says of a family's tiny model, beside the class's defaults."""
    return copy.deepcopy({**_COMMON, **CONFIGS[model_type]})


def build(model_type: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny model of the family in float32, eager attention, evaluation mode. `changes` are config.json's fields.

    Ordinary values everywhere: logits with a standard deviation of about 1 to 3, routing that is not near-tied.
    """
    fields = {**fields_of(model_type), **changes}
    config = transformers.AutoConfig.for_model("deepseek_v3" if model_type == KIMI else model_type, **fields)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    generator, tied = torch.Generator().manual_seed(seed), config.tie_word_embeddings
    for name, tensor in sorted(model.state_dict().items()):
        if not (tied and name == "lm_head.weight"):
            scale = 0.3 if tied and "embed_tokens" in name else _scale(name, tensor)
            is_norm = "norm" in name and name.endswith("weight")
            tensor.normal_(generator=generator).mul_(scale).add_(float(is_norm))
    return model


def _scale(name: str, tensor: torch.Tensor) -> float:
    if "correction_bias" in name or "expert_bias" in name:
        return 0.15
    if "norm" in name and name.endswith("weight"):
        return 0.3
    if name.endswith("bias"):
        return 0.2
    if tensor.ndim == 1 or "embed_tokens" in name:  # sinks, embeddings
        return 1.0
    is_router = name.endswith(("gate.weight", "router.weight", "wg.weight"))
    return (2.0 if is_router else 1.5 if name == "lm_head.weight" else 1.2) / math.sqrt(tensor.shape[-1])


def save(model: Any, model_type: str, directory: Path, *, layout: str = "original", legacy: bool = False) -> Path:
    """Saves `model` in one of `LAYOUTS`; `legacy` spells config.json as transformers 4 did."""
    model.save_pretrained(directory, save_original_format=layout == "original")
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    fields = {**(legacy_spelling(fields) if legacy else fields), "model_type": model_type}
    path.write_text(json.dumps(fields, indent=2))
    return directory


def legacy_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 spelt it. Settings nested by kind of layer have no old spelling."""
    fields = dict(fields)
    fields["torch_dtype"] = fields.pop("dtype", "float32")
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" in rope:
        del fields["rope_parameters"]
        fields["rope_theta"] = rope.pop("rope_theta")
        part = rope.pop("partial_rotary_factor", None)
        if part is not None and fields["model_type"] == "minimax_m2":
            fields["rotary_dim"] = int(part * fields["head_dim"])
        elif part is not None:
            fields["partial_rotary_factor"] = part
        kind = rope.pop("rope_type")
        fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if fields["model_type"] == "qwen3_moe":
        fields["num_experts"] = fields.pop("num_local_experts")
    if fields["model_type"] in ("qwen2_moe", "exaone_moe", "afmoe"):
        fields.pop("layer_types")
    if fields["model_type"] == "hunyuan_v1_moe":
        fields["moe_topk"] = [fields["moe_topk"]] * fields["num_hidden_layers"]
    if fields["model_type"] in ("glm4_moe_lite", "axk1", "exaone_moe", "hy_v3"):
        fields["first_k_dense_replace"] = fields.pop("mlp_layer_types").count("dense")
    return fields
