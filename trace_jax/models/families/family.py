"""What the package knows of a published model family: its switches by config.json, and its tensors by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from trace_jax.models.arrays import flat_specs
from trace_jax.models.config import ModelConfig
from trace_jax.models.families.reader import ConfigReader

MULTI_TOKEN = "multi-token prediction, which the model itself doesn't use"
# Layers that follow the network's own; "beyond" must be one of the next `num_nextn_predict_layers` numbers.
EXTRA_LAYERS = {r"^model\.layers\.(?P<beyond>\d+)\.": MULTI_TOKEN}
COMMON_IGNORED = {
    r"\.inv_freq$": "rotary frequencies follow from config.json",
    r"^lm_head\.weight$": "the output head is the embedding (tie_word_embeddings)",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter stands in a checkpoint.

    `layout` says which axes the parameter (without its "layers" axis) has on disk: "(h c) d -> d h c" is a matrix
    [H*C, D] that becomes [D, H, C]. Letters on the left that no single tensor has are enumerated by the names, leading
    and in this order: `e` where a name has {expert}, `g` (gate, up) where there are two names. An axis of size 1 that
    only exists on disk is spelt `1`. Every size follows from the parameter's `ArraySpec`.

    Several `Stored` of one path are alternatives: the first whose first tensor is in the checkpoint holds.
    """

    path: str  # "layers/experts/gate_up"
    layout: str
    names: tuple[str, ...]  # with {layer} (number in the network) and {expert}
    storage: str = "plain"  # or "mxfp4": uint8 NAME_blocks and NAME_scales, whose decoded array has the layout


Table = tuple[Stored, ...]
Switches = dict[str, Any]  # fields of `ModelConfig`


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    `ignored` maps regular expressions of tensor names that may stay unread to the reason; a name that `stored` asks
    for is never ignored. `defaults` are the values of absent keys where transformers doesn't know the `model_type`.
    """

    model_type: str
    title: str
    published: str  # checkpoints of the family, for docs/models.md
    switches: Callable[[ConfigReader], Switches]
    tensors: Table
    ignored: Mapping[str, str]
    defaults: Mapping[str, Any]

    def stored(self, config: ModelConfig) -> Table:
        """The entries of `tensors` whose parameter the configuration has: there may be more (biases, dense layers)."""
        specs = flat_specs(config)
        return tuple(entry for entry in self.tensors if entry.path in specs)


FAMILIES: dict[str, Family] = {}


def family(
    model_type: str,
    title: str,
    published: str,
    *tables: Table,
    ignored: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable[[ConfigReader], Switches]], Callable[[ConfigReader], Switches]]:
    """Decorates the function that reads a family's switches, and enters the family into `FAMILIES`."""

    def register(switches: Callable[[ConfigReader], Switches]) -> Callable[[ConfigReader], Switches]:
        tensors, reasons = sum(tables, OUTER), {**COMMON_IGNORED, **(ignored or {})}
        FAMILIES[model_type] = Family(model_type, title, published, switches, tensors, reasons, defaults or {})
        return switches

    return register


OUTER = (
    Stored("embed", "v d -> v d", ("model.embed_tokens.weight",)),
    Stored("final_norm", "d -> d", ("model.norm.weight",)),
    Stored("final_norm_bias", "d -> d", ("model.norm.bias",)),
    Stored("head", "v d -> d v", ("lm_head.weight",)),
    Stored("head_bias", "v -> v", ("lm_head.bias",)),
)
