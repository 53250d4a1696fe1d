"""Reading config.json: typed, with the defaults of the model's class, and with a record of what was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trace_jax.config import ConfigError

_REQUIRED = object()

# Keys that say nothing about what the forward pass computes, or that only training and generation read.
_HARMLESS = """
_attn_implementation _name_or_path architectures attention_dropout attn_pdrop auto_map aux_loss_alpha bos_token_id
chunk_size_feed_forward classifier_dropout decoder_start_token_id dtype embd_pdrop eod_token_id eos_token_id ep_size
experts_per_token finetuning_task hidden_dropout hidden_dropout_prob id2label initial_context_length initializer_range
input_jitter_noise is_decoder is_encoder_decoder label2id load_balance_coeff max_position_embeddings max_window_layers
mm_token_id model_type mtp_layer_types mtp_mlp_layer_types mtp_transformer_layers num_mtp_layers num_mtp_modules
num_nextn_predict_layers output_attentions output_hidden_states output_router_logits pad_token_id prefix
pretraining_tp problem_type quantization_config resid_pdrop return_dict router_aux_loss_coef router_jitter_noise
sep_token_id seq_aux sliding_window_pattern torch_dtype transformers_version use_cache use_mtp
"""
HARMLESS = frozenset(_HARMLESS.split())


class ConfigReader:
    """Reads the fields of one config.json. A wrong type or a missing key is a `ConfigError` that names the key.

    A method that takes several keys reads the first that is given: spellings of one field. `null` is the value for a
    field that is null, or absent where the class has no default.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None):
        self._values, self._defaults, self._read = values, defaults or {}, set()

    def integer(self, *keys: str, null: Any = _REQUIRED) -> Any:
        return self._field(keys, null, "a whole number", lambda value: isinstance(value, int) and not _is_bool(value))

    def number(self, *keys: str, null: Any = _REQUIRED) -> Any:
        value = self._field(
            keys, null, "a number", lambda value: isinstance(value, (int, float)) and not _is_bool(value)
        )
        return float(value) if isinstance(value, int) else value

    def boolean(self, *keys: str, null: Any = _REQUIRED) -> Any:
        return self._field(keys, null, "true or false", _is_bool)

    def mapping(self, *keys: str) -> Mapping[str, Any]:
        """The object at `keys`; null and absent are empty."""
        return self._field(keys, {}, "an object", lambda value: isinstance(value, Mapping))

    def items(self, *keys: str, allowed: tuple | None = None) -> tuple | None:
        """The list at `keys`, each item one of `allowed` where that is given; None if null or absent."""
        value = self._field(keys, None, "a list", lambda value: isinstance(value, (list, tuple)))
        for item in value or ():
            if allowed is not None and item not in allowed:
                raise unsupported(keys[0], item, allowed)
        return None if value is None else tuple(value)

    def constant(self, *keys: str, null: Any = _REQUIRED) -> Any:
        """A whole number, or a list of it, one per layer, which must all be equal."""
        value = self._lookup(keys)
        if not isinstance(value, (list, tuple)):
            return self.integer(*keys, null=null)
        if len(set(value)) != 1 or not isinstance(value[0], int):
            raise ConfigError(f"config.json: {keys[0]} is {list(value)}; one number for all layers is supported.")
        return value[0]

    def expect(self, key: str, *allowed: Any) -> Any:
        """The value of `key`, which is one of `allowed`, or null or absent (None)."""
        value = self._lookup((key,))
        if value is not None and value not in allowed:
            raise unsupported(key, value, allowed)
        return value

    def unread(self) -> tuple[str, ...]:
        """Keys that nobody looked at and that aren't known to be harmless."""
        return tuple(sorted(set(self._values) - self._read - HARMLESS))

    def _lookup(self, keys: tuple[str, ...]) -> Any:
        self._read.update(keys)
        for source in (self._values, self._defaults):
            for key in keys:
                if key in source:
                    return source[key]
        return None

    def _field(self, keys, null, expected, is_right):
        value = self._lookup(keys)
        if value is None:
            if null is _REQUIRED:
                state = "is null" if any(key in self._values for key in keys) else "is missing"
                raise ConfigError(f"config.json: {keys[0]} {state}; expected {expected}.")
            return null
        if not is_right(value):
            raise ConfigError(f"config.json: {keys[0]} is {value!r}; expected {expected}.")
        return value


def unsupported(key: str, value: Any, supported: tuple) -> ConfigError:
    """The error for a value that the code doesn't implement."""
    return ConfigError(f"config.json: {key} is {value!r}; supported: {', '.join(map(str, supported))}.")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)
