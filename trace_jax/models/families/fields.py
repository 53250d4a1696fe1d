"""config.json: how its fields are read, and groups of fields that families share, each as fields of `ModelConfig`.

Formulas of rotary embeddings: transformers' modeling_rope_utils.
"""

import copy
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.models.architecture import Rope

SLIDING, FULL = "sliding_attention", "full_attention"
STATIC = ("default", "linear", "llama3", "yarn")  # rotary kinds whose frequencies don't depend on the text's length
_ROPE_KEYS = """
rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast
beta_slow short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate short_mscale
long_mscale alpha
"""
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

MOST_EXPERTS = 2**18  # of all layers together, and layers: four times as many as the largest published model has

Switches = dict[str, Any]  # fields of `ModelConfig`


def complete(config_json: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """A config.json as transformers' class of the `model_type` reads it: old spellings in the new one, rotary settings
    in `rope_parameters`, absent keys with the class's value, kinds of layers by the class's rule. transformers is
    imported here, late, and no code of a checkpoint ever runs.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing concerns nobody here
    import transformers

    fields = copy.deepcopy({key: value for key, value in config_json.items() if key not in _WITHHELD})
    for key, value in fields.items():  # transformers' classes, and groups of fields below, make lists as long
        if re.search("layer|expert", key) and isinstance(value, int) and value > MOST_EXPERTS:
            raise ConfigError(f"config.json: {key} is {value:,}; expected at most {MOST_EXPERTS:,}.")
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
    their types. Of several keys the first that is there is read: spellings of one field.
    """

    def __init__(self, config_json: Mapping[str, Any], model_type: str):
        self._file, self._values, self._read = config_json, complete(config_json, model_type), set()

    def value(self, *keys: str, null: Any = _REQUIRED) -> Any:
        """The field, or `null` where it is null or absent; without a `null` that is refused."""
        self._read.update(keys)
        key = next((key for key in keys if key in self._values), keys[0])
        value = self._values.get(key)
        if value is None and null is _REQUIRED:
            raise ConfigError(f"config.json: {key} is {'null' if key in self._values else 'missing'}; it is needed.")
        return null if value is None else value

    def values(self, **keys: str) -> Switches:
        """Each switch's field, by its key."""
        return {switch: self.value(key) for switch, key in keys.items()}

    def number(self, *keys: str) -> Any:
        """The field, which published files may spell once per layer."""
        values = self.value(*keys)
        if not isinstance(values, list):
            return values
        if len(set(values)) != 1:
            raise ConfigError(f"config.json: {keys[0]} is {values}; one number for all layers is supported.")
        return values[0]

    def expect(self, **fields: Any) -> None:
        """Refuses a value, or one of a list of them, but that (or the tuple of those) that is named, null or absent."""
        for key, allowed in fields.items():
            allowed, values = allowed if isinstance(allowed, tuple) else (allowed,), self.value(key, null=())
            for value in values if isinstance(values, list | tuple) else (values,):
                if value not in allowed:
                    raise unsupported(key, value, allowed)

    def ignore(self, *keys: str) -> None:
        """Notes keys that transformers' class has turned into others, or that decide nothing."""
        self._read.update(keys)

    def unread(self) -> tuple[str, ...]:
        """Keys of the file that nobody looked at and that aren't harmless. One that the class no longer has stands in
        another's place: an old spelling.
        """
        return tuple(sorted(set(self._file) & set(self._values) - self._read - set(_HARMLESS.split())))


def unsupported(key: str, value: Any, supported: tuple) -> ConfigError:
    """The error for a value that the code doesn't implement."""
    return ConfigError(f"config.json: {key} is {value!r}; supported: {', '.join(map(str, supported))}.")


# --- groups of fields

Group = Callable[[ConfigReader], Switches]


def sizes(reader: ConfigReader) -> Switches:
    """What every family has."""
    reader.expect(hidden_act=("silu", "swish"))  # two names of one function
    heads, width = reader.value("num_attention_heads"), reader.value("hidden_size")
    return {
        **reader.values(vocab_size="vocab_size", num_layers="num_hidden_layers", norm_epsilon="rms_norm_eps"),
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": reader.value("num_key_value_heads", null=heads),
        "head_size": reader.value("head_dim", null=width // heads),
        "tie_embeddings": reader.value("tie_word_embeddings", null=False),
    }


def attention_bias(reader: ConfigReader, kind: str, key: str = "attention_bias") -> Switches:
    return {"attention_bias": kind if reader.value(key, null=False) else "none"}


def experts(reader: ConfigReader, width: str = "moe_intermediate_size") -> Switches:
    """Number and width of routed experts; `width` is the family's key."""
    return {
        "num_experts": reader.value("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts"),
        "experts_per_token": reader.value("moe_k", "num_experts_per_tok"),
        "expert_hidden_size": reader.value(width),
    }


def grouped(
    reader: ConfigReader,
    *groups: Group,
    width: str = "moe_intermediate_size",
    bias: str = "none",
    ropes: tuple[str, ...] = STATIC,
    partial: bool = False,
    **switches: Any,
) -> Switches:
    """Grouped-query attention and routed experts of the key `width`, then `groups`, then `switches`.

    `bias`: the projections that have biases if `attention_bias` says so; none: the family hasn't that key. `ropes` and
    `partial` are those of `rotary`.
    """
    base = sizes(reader) | experts(reader, width) | ({} if bias == "none" else attention_bias(reader, bias))
    base |= rotary(reader, base["head_size"], supported=ropes, partial=partial)
    return join(reader, base, *groups, **switches)


def join(reader: ConfigReader, base: Switches, *groups: Group, **switches: Any) -> Switches:
    """`base`, then what `groups` read, then `switches`."""
    for group in groups:
        base = base | group(reader)
    return base | switches


def shared(reader: ConfigReader) -> Switches:
    """Shared experts, each as wide as a routed one, which are one expert of their joint width."""
    count = reader.value("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", null=0)
    return {"shared_hidden_size": count * reader.value("moe_intermediate_size")}


def dense(reader: ConfigReader, layers: Iterable[int]) -> Switches:
    layers, width = tuple(layers), reader.value("intermediate_size", null=0)
    return {"dense_layers": layers, "dense_hidden_size": width} if layers else {}


def leading_dense(reader: ConfigReader) -> Switches:
    """Dense layers by `mlp_layer_types`, else DeepSeek's rule: the first `first_k_dense_replace` are dense, and after
    them all but every `moe_layer_freq`-th.
    """
    reader.expect(mlp_layer_types=("dense", "sparse"))
    first, every = reader.value("first_k_dense_replace", null=0), reader.value("moe_layer_freq", null=1)
    if (kinds := reader.value("mlp_layer_types", null=None)) is not None:
        return dense(reader, (layer for layer, kind in enumerate(kinds) if kind == "dense"))
    layers = range(reader.value("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer < first or layer % every))


def sparse_step(reader: ConfigReader) -> Switches:
    """Qwen's rule: layers in `mlp_only_layers` are dense, and all but every `decoder_sparse_step`-th."""
    only, step = reader.value("mlp_only_layers", null=()), reader.value("decoder_sparse_step")
    layers = range(reader.value("num_hidden_layers"))
    return dense(reader, (layer for layer in layers if layer in only or (layer + 1) % step))


def normalized(reader: ConfigReader) -> Switches:
    return {"normalize_top_k": reader.value("norm_topk_prob", null=False)}


def layer_kinds(reader: ConfigReader) -> list[str]:
    """Each layer's `layer_types`; in families without them all slide if there is a `sliding_window`."""
    reader.ignore("use_sliding_window", "global_attn_every_n_layers")
    reader.expect(layer_types=(SLIDING, FULL))
    every = FULL if reader.value("sliding_window", null=None) is None else SLIDING
    return reader.value("layer_types", null=[every] * reader.value("num_hidden_layers"))


def windows(reader: ConfigReader) -> Switches:
    """`sliding_window` on the layers that slide."""
    slides, size = [kind == SLIDING for kind in layer_kinds(reader)], reader.value("sliding_window", null=0)
    if any(slides) and size < 1:
        raise ConfigError("config.json: layer_types has sliding_attention; sliding_window must then be at least 1.")
    return {"windows": tuple(size * slide for slide in slides)} if any(slides) else {}


def rope_where_sliding(reader: ConfigReader) -> Switches:
    """Layers that see everything have no rotary embedding (NoPE)."""
    kinds = layer_kinds(reader)
    return {"layer_ropes": tuple(0 if kind == SLIDING else -1 for kind in kinds)} if FULL in kinds else {}


def sigmoid_router(reader: ConfigReader, scale: str) -> Switches:
    """A sigmoid, a correction that only chooses, weights renormalised and multiplied by the field `scale`."""
    switches = {"router_score": "sigmoid", "router_correction": True, "normalize_minimum": 1e-20}
    return switches | reader.values(routing_scale=scale)


def expert_groups(reader: ConfigReader) -> Switches:
    return {"num_groups": reader.value("n_group", null=1), "groups_per_token": reader.value("topk_group", null=1)}


def corrected_router(reader: ConfigReader) -> Switches:
    """DeepSeek-V3's router: groups by their two best, renormalised if the field says so."""
    reader.expect(scoring_func=("sigmoid", "noaux_tc"), topk_method="noaux_tc")
    router = sigmoid_router(reader, "routed_scaling_factor") | normalized(reader) | expert_groups(reader)
    return router | {"group_score": "top2"}


# --- rotary embeddings


def rotary(
    reader: ConfigReader, head_size: int, *, supported: tuple[str, ...] = STATIC, partial: bool = False
) -> Switches:
    """All layers share one rotary embedding of the kinds `supported`; `partial`: of which part of a head may turn."""
    settings = _settings(reader, partial=partial)
    width = int(head_size * settings.get("partial_rotary_factor", 1))
    return {"ropes": (_rope(settings, width, supported),), "rotary_size": 0 if width == head_size else width}


def rotary_by_kind(reader: ConfigReader, head_size: int) -> Switches:
    """Layers of different kinds have different rotary embeddings."""
    kinds = layer_kinds(reader)
    rope_of = {kind: _rope(_settings(reader, kind), head_size) for kind in sorted(set(kinds))}
    ropes = tuple(dict.fromkeys(rope_of.values()))
    layers = {"layer_ropes": tuple(ropes.index(rope_of[kind]) for kind in kinds)} if len(ropes) > 1 else {}
    return {"ropes": ropes, **layers}


def latent_rotary(reader: ConfigReader, head_size: int, width: int) -> Switches:
    """Latent attention, whose last `width` dimensions turn. yarn's `mscale_all_dim` multiplies scores by mscale^2."""
    settings, scale = _settings(reader), 0.0
    if settings["rope_type"] != "default" and settings.get("mscale_all_dim"):
        scale = head_size**-0.5 * _mscale(_factor(settings), settings["mscale_all_dim"]) ** 2
    return {"ropes": (_rope(settings, width),), "rotary_size": width, "attention_scale": scale}


def _settings(reader: ConfigReader, kind: str = "", partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`, or what is nested in them for a `kind` of layer."""
    parameters = reader.value("rope_parameters", null={})
    entry = parameters.get(kind, parameters)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json: rope_parameters is {parameters}; expected an object for {kind}.")
    settings = {key: value for key, value in entry.items() if value is not None}
    if unknown := sorted(set(settings) - set(_ROPE_KEYS.split())):
        raise unsupported("rope_parameters", unknown[0], tuple(sorted(_ROPE_KEYS.split())))
    original = reader.value("original_max_position_embeddings", null=None)
    if entry is not parameters:
        # transformers reads `truncate` beside the nested settings, not inside them.
        settings["truncate"] = parameters.get("truncate", True)
    elif original is not None:
        settings["original_max_position_embeddings"] = original
    if settings.get("partial_rotary_factor", 1) != 1 and not partial:
        raise unsupported("partial_rotary_factor", settings["partial_rotary_factor"], (1.0,))
    return {**settings, "max_position_embeddings": reader.value("max_position_embeddings", null=None)}


def _rope(settings: Mapping[str, Any], width: int, supported: tuple[str, ...] = STATIC) -> Rope:
    """The rotary embedding of `width` dimensions: pair i has frequency theta^(-2i/width) / divisors[i]."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "dynamic" and "dynamic" in supported and not settings.get("alpha"):
        raise ConfigError("config.json: rope_type is dynamic without alpha; supported: dynamic with a fixed alpha.")
    if kind not in supported:
        raise unsupported("rope_type", kind, supported)
    try:
        theta = float(settings["rope_theta"])
        if kind == "dynamic":  # HunYuan: labelled so, but a fixed alpha changes the base once and for all
            theta *= settings["alpha"] ** (width / (width - 2))
        divisors, others = _scaling(kind, settings, theta, width)
    except KeyError as missing:
        raise ConfigError(f"config.json: rope_parameters lack {missing} for rope_type {kind}.") from None
    return Rope(theta=theta, divisors=tuple(float(divisor) for divisor in divisors), **others)


def _scaling(kind: str, settings: Mapping[str, Any], theta: float, width: int) -> tuple[Iterable, dict[str, Any]]:
    """(divisors, amplitudes and lengths) of a `Rope`."""
    if kind in ("default", "dynamic"):
        return (), {}
    if kind == "linear":
        return [settings["factor"]] * (width // 2), {}
    if kind == "longrope":  # Phi-3.5-MoE as transformers computes it: only the amplitude knows of long texts
        amplitudes = {"amplitude": settings["short_mscale"], "long_amplitude": settings["long_mscale"]}
        return settings["short_factor"], {**amplitudes, "original_length": settings["original_max_position_embeddings"]}
    original, factor = settings["original_max_position_embeddings"], _factor(settings)
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = original * theta ** (-np.arange(0, width, 2) / width) / (2 * math.pi)
        unchanged = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: divided by the factor
        return 1 / ((1 - unchanged) / factor + unchanged), {}
    # YaRN, arXiv 2309.00071: slow pairs are interpolated, fast ones stay, with a ramp between.
    first, last = (
        width * math.log(original / ((settings.get(key) or turns) * 2 * math.pi)) / (2 * math.log(theta))
        for key, turns in (("beta_fast", 32), ("beta_slow", 1))
    )
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0.0, 1.0)
    amplitude = settings.get("attention_factor")
    if amplitude is None:
        amplitude = _mscale(factor, 1.0)
        if (one := settings.get("mscale")) and (all_dimensions := settings.get("mscale_all_dim")):
            amplitude = _mscale(factor, one) / _mscale(factor, all_dimensions)
    return 1 / (ramp / factor + 1 - ramp), {"amplitude": amplitude}


def _factor(settings: Mapping[str, Any]) -> float:
    return settings.get("factor") or settings["max_position_embeddings"] / settings["original_max_position_embeddings"]


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
