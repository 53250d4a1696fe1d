"""What the package knows of a published model family: how to read its config.json and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    `defaults` are the values that transformers' configuration class gives to absent keys. `ignored` maps regular
    expressions of tensor names that may stay unread to the reason. A name that `stored` asks for is never ignored.
    """

    model_type: str
    title: str
    config: Callable[[ConfigReader], ModelConfig]
    stored: Callable[[ModelConfig], tuple[Stored, ...]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    published: str = ""  # checkpoints of the family, for docs/models.md

    def __post_init__(self):
        object.__setattr__(self, "ignored", {**COMMON_IGNORED, **self.ignored})
