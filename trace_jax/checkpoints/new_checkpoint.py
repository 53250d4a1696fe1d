"""What a checkpoint needs that has no source to copy it from: config.json of a `mixtral`, and tokenizer files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.config import ModelConfig
from trace_jax.models.families import model_config
from trace_jax.models.model import Model, SpecialTokens


def mixtral_config_json(config: ModelConfig, special: SpecialTokens) -> dict[str, Any]:
    """config.json of a model trained here.

    Raises:
      ConfigError: the model has a switch that Mixtral doesn't have; the message names it.
    """
    windows = set(config.windows)
    fields = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.ropes[0].theta,
        "sliding_window": max(windows, default=0) or None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": special.bos,
        "eos_token_id": list(special.eos),
        "pad_token_id": special.pad,
    }
    read = dataclasses.replace(model_config(fields, dtype=config.dtype), grouped_matmul=config.grouped_matmul)
    other = [
        f"{field.name} = {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(read, field.name)
    ]
    if other:
        raise ConfigError(
            f"a model that was not imported is exported as a mixtral, which can't express {', '.join(other)}."
        )
    return fields


def write_tokenizer(model: Model, directory: Path) -> None:
    """tokenizer.json and the little that transformers wants besides; nothing for a model without a tokenizer."""
    if model.tokenizer is None:
        return
    model.tokenizer.save(str(directory / "tokenizer.json"))
    ids = {"bos": model.special.bos, "eos": next(iter(model.special.eos), None), "pad": model.special.pad}
    tokens = {f"{kind}_token": model.tokenizer.id_to_token(token) for kind, token in ids.items() if token is not None}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens}, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
