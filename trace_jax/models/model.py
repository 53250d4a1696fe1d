"""A model in the hand: configuration, parameters and tokenizer together."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

from trace_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning: what a text starts with (None: nothing), what ends it, what fills a row."""

    bos: int | None = 1
    eos: tuple[int, ...] = (2,)
    pad: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that a model was imported from; `imported`: the array of every parameter as it came, by path."""

    directory: Path
    model_type: str
    imported: Mapping[str, ref] = dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Model:
    """`params` is a plain nested dict of arrays; `tokenizer` is a `tokenizers.Tokenizer` (or None).

    `guide`: parameters of a model of the same shape whose routing is forced on this one when it is scored by
    likelihood: every token uses the experts that the guide chooses for it.
    """

    config: ModelConfig
    params: Any
    tokenizer: Any = None
    special: SpecialTokens = SpecialTokens()
    source: Source | None = None
    guide: Any = None

    def replace(self, **changes) -> "Model":
        return dataclasses.replace(self, **changes)

    def unguided(self, task: str) -> Any:
        """`params`, for a `task` that would not follow a guide. Raises ValueError if there is one."""
        if self.guide is not None:
            raise ValueError(
                f"the model has a guide, whose routing is forced on it, and {task} can't be; only scores by likelihood "
                "can. Use model.replace(guide=None) to go without."
            )
        return self.params
