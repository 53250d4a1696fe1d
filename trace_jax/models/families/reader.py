"""Reading config.json: as transformers' class completes it, typed, with a record of what was read."""

import copy
import os
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
# What transformers' class would act on beyond the model's shape.
_KEPT_BACK = {"model_type", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype"}


def complete(config_json: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers' class of the `model_type` reads it: old spellings in the new one, rotary settings
    in `rope_parameters`, absent keys with the class's value, kinds of layers by the class's rule.

    transformers is imported here, late, and no code of a checkpoint ever runs. A `model_type` that the installed
    transformers doesn't know has the values of the file and `defaults`.

    Raises:
      ConfigError: transformers refuses a value.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing concerns nobody here
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return {**defaults, **config_json}
    fields = copy.deepcopy({key: value for key, value in config_json.items() if key not in _KEPT_BACK})
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of rotary settings that it reads nevertheless
    try:
        return transformers.AutoConfig.for_model(model_type, **fields).to_dict()
    except Exception as error:  # its classes raise many kinds
        raise ConfigError(f"config.json: transformers refuses it: {' '.join(str(error).split())}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


class ConfigReader:
    """Reads the fields of one completed config.json. A wrong type or a missing key is a `ConfigError` that names it.

    A method that takes several keys reads the first that is there: spellings of one field. `null` is the value for a
    field that is null or absent.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values, self._read = values, set()

    def integer(self, *keys: str, null: Any = _REQUIRED) -> Any:
        return self._field(keys, null, "a whole number", int)

    def number(self, *keys: str, null: Any = _REQUIRED) -> Any:
        value = self._field(keys, null, "a number", (int, float))
        return float(value) if isinstance(value, int) else value

    def boolean(self, *keys: str, null: Any = _REQUIRED) -> Any:
        return self._field(keys, null, "true or false", bool)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """The object at `key`; null and absent are empty."""
        return self._field((key,), {}, "an object", Mapping)

    def items(self, key: str, allowed: tuple | None = None) -> tuple | None:
        """The list at `key`, each item one of `allowed` where that is given; None if null or absent."""
        value = self._field((key,), None, "a list", (list, tuple))
        for item in value or ():
            if allowed is not None and item not in allowed:
                raise unsupported(key, item, allowed)
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

    def folded(self, *keys: str) -> None:
        """Notes keys that transformers' class has turned into others."""
        self._read.update(keys)

    def unread(self, config_json: Mapping[str, Any]) -> tuple[str, ...]:
        """Keys of the file that nobody looked at and that aren't known to be harmless.

        One that the class no longer has stands in another's place: an old spelling.
        """
        return tuple(sorted(set(config_json) & set(self._values) - self._read - HARMLESS))

    def _lookup(self, keys: tuple[str, ...]) -> Any:
        self._read.update(keys)
        return next((self._values[key] for key in keys if key in self._values), None)

    def _field(self, keys: tuple[str, ...], null: Any, expected: str, types: Any) -> Any:
        value, key = self._lookup(keys), next((key for key in keys if key in self._values), keys[0])
        if value is None and null is not _REQUIRED:
            return null
        if value is None:
            raise ConfigError(
                f"config.json: {key} is {'null' if key in self._values else 'missing'}; expected {expected}."
            )
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ConfigError(f"config.json: {key} is {value!r}; expected {expected}.")
        return value


def unsupported(key: str, value: Any, supported: tuple) -> ConfigError:
    """The error for a value that the code doesn't implement."""
    return ConfigError(f"config.json: {key} is {value!r}; supported: {', '.join(map(str, supported))}.")
