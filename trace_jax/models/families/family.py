"""What the package knows of a published model family: its switches by config.json, and its tensors by name."""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from trace_jax.config import ConfigError
from trace_jax.models.families.tensors import TENSORS, Table

MULTI_TOKEN = "multi-token prediction, which the model itself doesn't use"
# Layers that follow the network's own; "beyond" must be one of the next `num_nextn_predict_layers` numbers.
EXTRA_LAYERS = {r"^model\.layers\.(?P<beyond>\d+)\.": MULTI_TOKEN}
_COMMON_IGNORED = {
    r"\.inv_freq$": "rotary frequencies follow from config.json",
    r"^lm_head\.weight$": "the output head is the embedding (tie_word_embeddings)",
}
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
# What transformers' class would act on beyond the model's shape.
_WITHHELD = {"model_type", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype"}


def complete(config_json: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """A config.json as transformers' class of the `model_type` reads it: old spellings in the new one, rotary settings
    in `rope_parameters`, absent keys with the class's value, kinds of layers by the class's rule.

    transformers is imported here, late, and no code of a checkpoint ever runs. A `model_type` that the installed
    transformers doesn't know has the values of the file.

    Raises:
      ConfigError: transformers refuses a value.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing concerns nobody here
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return dict(config_json)
    fields = copy.deepcopy({key: value for key, value in config_json.items() if key not in _WITHHELD})
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of rotary settings that it reads nevertheless
    try:
        return transformers.AutoConfig.for_model(model_type, **fields).to_dict()
    except Exception as error:  # its classes raise many kinds
        raise ConfigError(f"config.json: transformers refuses it: {' '.join(str(error).split())}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


class ConfigReader:
    """Reads the fields of one config.json, completed, and notes which. transformers' class and `ModelConfig` check
    their types. Of several keys the first that is there is read: spellings of one field."""

    def __init__(self, config_json: Mapping[str, Any], model_type: str):
        self._file, self._values, self._read = config_json, complete(config_json, model_type), set()

    def value(self, *keys: str, null: Any = _REQUIRED) -> Any:
        """The field, or `null` where it is null or absent.

        Raises:
          ConfigError: it is null or absent, and there is no value for that.
        """
        self._read.update(keys)
        key = next((key for key in keys if key in self._values), keys[0])
        value = self._values.get(key)
        if value is None and null is _REQUIRED:
            raise ConfigError(f"config.json: {key} is {'null' if key in self._values else 'missing'}; it is needed.")
        return null if value is None else value

    def constant(self, *keys: str, null: Any = _REQUIRED) -> Any:
        """The field, which may be a list of equal values, one per layer."""
        value = self.value(*keys, null=null)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ConfigError(f"config.json: {keys[0]} is {value}; one number for all layers is supported.")
        return value[0]

    def expect(self, **fields: Any) -> None:
        """Refuses values but the one (or the tuple of those) that is named, null or absent."""
        for key, allowed in fields.items():
            allowed, value = allowed if isinstance(allowed, tuple) else (allowed,), self.value(key, null=None)
            if value is not None and value not in allowed:
                raise unsupported(key, value, allowed)

    def kinds(self, key: str, *allowed: str) -> tuple[str, ...] | None:
        """The kind of each layer, one of `allowed`; None if null or absent."""
        kinds = self.value(key, null=None)
        for kind in kinds or ():
            if kind not in allowed:
                raise unsupported(key, kind, allowed)
        return None if kinds is None else tuple(kinds)

    def folded(self, *keys: str) -> None:
        """Notes keys that transformers' class has turned into others."""
        self._read.update(keys)

    def unread(self) -> tuple[str, ...]:
        """Keys of the file that nobody looked at and that aren't known to be harmless.

        One that the class no longer has stands in another's place: an old spelling.
        """
        return tuple(sorted(set(self._file) & set(self._values) - self._read - set(_HARMLESS.split())))


def unsupported(key: str, value: Any, supported: tuple) -> ConfigError:
    """The error for a value that the code doesn't implement."""
    return ConfigError(f"config.json: {key} is {value!r}; supported: {', '.join(map(str, supported))}.")


Switches = dict[str, Any]  # fields of `ModelConfig`


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Of `tensors` a configuration has a part (biases, dense layers). `ignored` maps regular expressions of tensor names
    that may stay unread to the reason; a tensor that fills a parameter is never ignored.
    """

    model_type: str
    title: str
    published: str  # checkpoints of the family, for docs/models.md
    switches: Callable[[ConfigReader], Switches]
    tensors: Table
    ignored: Mapping[str, str]


FAMILIES: dict[str, Family] = {}


def family(
    model_type: str, title: str, published: str, *tables: Table, ignored: Mapping[str, str] | None = None
) -> Callable[[Callable[[ConfigReader], Switches]], Callable[[ConfigReader], Switches]]:
    """Decorates the function that reads a family's switches, and enters the family into `FAMILIES`.

    Its `tables` come before `TENSORS`: names that others use for something else.
    """

    def register(switches: Callable[[ConfigReader], Switches]) -> Callable[[ConfigReader], Switches]:
        tensors, reasons = sum(tables, ()) + TENSORS, {**_COMMON_IGNORED, **(ignored or {})}
        FAMILIES[model_type] = Family(model_type, title, published, switches, tensors, reasons)
        return switches

    return register
