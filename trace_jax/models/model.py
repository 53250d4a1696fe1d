"""A model in the hand: configuration, parameters and tokenizer together."""

from __future__ import annotations

import dataclasses
from typing import Any

from trace_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """`params` is a plain nested dict of arrays; `tokenizer` is a `tokenizers.Tokenizer` (or None)."""

    config: ModelConfig
    params: Any
    tokenizer: Any = None

    def replace(self, **changes) -> Model:
        return dataclasses.replace(self, **changes)
