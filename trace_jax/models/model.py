"""A model in the hand: configuration, parameters and tokenizer together, and text to token ids and back as it reads it.

Three readings, each equal to what it stands for: `TextCodec.pairs` as in training, where a text is all text; `ids` as
transformers' tokenizers, which read written marks as marks; `encode` and `encode_pair` as lm-eval's class for
transformers (lm_eval/models/huggingface.py and lm_eval/api/model.py of lm-eval 0.4.13).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import ref

import jax
import numpy as np
from tokenizers import Tokenizer

from trace_jax.config import ConfigError
from trace_jax.io.files import read_json
from trace_jax.models.architecture import ModelConfig

_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # of config.json, in lm-eval's order


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning: what a text starts with (None: nothing), what ends it, what fills a row.

    Example:
      >>> tj.SpecialTokens(bos=None, eos=(50279,), pad=1).bos is None  # as OLMoE's: a text starts with the end of one
      True
    """

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

    Example:
      >>> model.params["layers"]["router"].shape  # layers, width, experts
      (2, 16, 8)
      >>> doubled = model.replace(params=jax.tree.map(lambda array: 2 * array, model.params))
      >>> bool((doubled.params["embed"] == 2 * model.params["embed"]).all())
      True
    """

    config: ModelConfig
    params: Any
    tokenizer: Any = None
    special: SpecialTokens = SpecialTokens()
    source: Source | None = None
    guide: Any = None

    def __repr__(self) -> str:
        config, size = self.config, sum(array.size for array in jax.tree.leaves(self.params))
        scale, unit = next(((s, u) for s, u in ((1e9, "B "), (1e6, "M ")) if size >= s), (1, ""))
        count = f"{size / scale:.3g} {unit}parameters" if unit else f"{size:,} parameters"
        dense = f" (+ {len(config.dense_layers)} dense)" if config.dense_layers else ""
        shape = f"{len(config.moe_layers)} layers x {config.num_experts} experts{dense}, top {config.experts_per_token}"
        return f"Model({self.source.model_type + ', ' if self.source else ''}{count}, {shape}, {config.dtype})"

    def replace(self, **changes) -> "Model":
        return dataclasses.replace(self, **changes)

    def unguided(self, task: str) -> Any:
        """`params`, for a `task` that would not follow a guide; a guide is refused."""
        if self.guide is not None:
            raise ValueError(
                f"the model has a guide, whose routing is forced on it, and {task} can't be; only scores by likelihood "
                "can. Use model.replace(guide=None) to go without."
            )
        return self.params


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A text as token ids i32 [n], without the marks around it, of which those from `first_target` carry loss."""

    tokens: np.ndarray
    first_target: int = 0


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """A tokenizer and what a model makes of it."""

    tokenizer: Tokenizer  # as in tokenizer.json
    special: SpecialTokens  # marks that packing puts around a text
    size: int  # token ids that the model knows
    directory: Path | None = None  # of the checkpoint, whose two configurations name marks and length too

    @classmethod
    def of(cls, model: Model) -> "TextCodec":
        if model.tokenizer is None:
            raise ConfigError("the model has no tokenizer (tokenizer.json); texts can't be read.")
        directory = None if model.source is None else model.source.directory
        return cls(model.tokenizer, model.special, model.config.vocab_size, directory)

    @functools.cached_property
    def literal(self) -> Tokenizer:
        """Reads a text whole and as text: "<eos>" written in it is five characters, not the end."""
        return whole_text(self.tokenizer, literal=True)

    @functools.cached_property
    def marked(self) -> Tokenizer:
        """Reads a text whole; marks that are written in it are marks."""
        return whole_text(self.tokenizer, literal=False)

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Each (text, continuation) as the tokens of running text, encoded at once, since a tokenizer may treat the
        beginning of a text otherwise. A token that holds characters of both belongs to the continuation. One that the
        model doesn't know is refused: JAX would silently read another embedding.
        """
        encodings = self.literal.encode_batch([text + more for text, more in pairs], add_special_tokens=False)
        encoded = []
        for (text, _), encoding in zip(pairs, encodings, strict=True):
            first = np.searchsorted([end for _, end in encoding.offsets], len(text), side="right")
            encoded.append(Encoded(np.asarray(encoding.ids, np.int32), int(first)))
        marks = (*start_and_end(self.special), self.special.pad)
        if (largest := max(*marks, *(int(e.tokens.max(initial=0)) for e in encoded))) >= self.size:
            numbers = f"the tokenizer gives the id {largest}, but the model knows {self.size} tokens (vocab_size)"
            raise ConfigError(f"{numbers}: it is the tokenizer of another model.")
        return encoded

    @functools.cached_property
    def start(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text: the BOS of Llama, Mixtral and DeepSeek, nothing for OLMoE and
        Qwen. One that doesn't say (such as was trained here) leaves it to the model's BOS.
        """
        if self.tokenizer.post_processor is None:
            return () if self.special.bos is None else (self.special.bos,)
        plain = self.marked.encode("a", add_special_tokens=False).ids
        marked = self.marked.encode("a", add_special_tokens=True).ids
        return tuple(marked[: next(n for n in range(len(marked) + 1) if marked[n : n + len(plain)] == plain)])

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids with the start mark, of which a text that starts with it already doesn't get a second one."""
        ids = tuple(self.marked.encode(text, add_special_tokens=False).ids)
        return ids if ids[: len(self.start)] == self.start else self.start + ids

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, without or with special tokens."""
        return self.marked.decode(list(ids), skip_special_tokens=not special)

    @functools.cached_property
    def prefix_and_end(self) -> tuple[int, int]:
        """(token before what has no context: the beginning of a text or, without one, its end; token that ends a text)
        by the tokenizer, which need not be what the model's config.json says.
        """
        bos, end = self.special.bos, next(iter(self.special.eos), self.special.bos)
        own = self._file("tokenizer_config.json")
        if "bos_token" in own:
            bos = token_id(self.tokenizer, own["bos_token"])
        if (named := token_id(self.tokenizer, own.get("eos_token"))) is not None:
            end = named
        if end is None:
            raise ConfigError("the model names neither a beginning nor an end of text (bos_token_id, eos_token_id).")
        return end if bos is None else bos, end

    @functools.cached_property
    def context_length(self) -> int:
        """Most tokens that the model reads at once: as config.json names, else tokenizer_config.json, else 2048."""
        config, own = self._file("config.json"), self._file("tokenizer_config.json")
        for value in (*(config.get(name) for name in _LENGTHS), own.get("model_max_length")):
            if value is not None and value < 10**18:  # tokenizers that name no limit say 1e30
                return int(value)
        return 2048  # as in lm-eval

    def encode(self, text: str) -> list[int]:
        """Ids with the tokenizer's marks around them, unless the text starts with the written prefix."""
        prefix = self.text(self.prefix_and_end[:1], special=True)
        return self.marked.encode(text, add_special_tokens=not text.startswith(prefix)).ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(ids of the context, ids of the continuation), read as one text, split where the context alone ends. White
        space at its end goes to the continuation. An empty context is the prefix.
        """
        if not context:
            ids, prefix = self.marked.encode(continuation, add_special_tokens=False).ids, [self.prefix_and_end[0]]
            return prefix, ids[1:] if ids[:1] == prefix else ids
        both, before = self.encode(context + continuation), self.encode(context.rstrip())
        return before, both[len(before) :]

    def _file(self, name: str) -> dict[str, Any]:
        return {} if self.directory is None else read_json(self.directory / name) or {}


def whole_text(tokenizer: Tokenizer, *, literal: bool) -> Tokenizer:
    """A copy that cuts and fills up nothing, and reads marks that are written in a text as text (`literal`) or not."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = literal
    return tokenizer


def token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    """The id of a token as tokenizer_config.json names it, by its text or by an object with its text; else None."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def start_and_end(special: SpecialTokens) -> tuple[int, int]:
    """What a text starts and ends with. Without a BOS it starts with the first EOS, as if another text came before."""
    if not special.eos:
        raise ConfigError("the checkpoint names no end of text (eos_token_id); it is needed to separate documents.")
    return special.eos[0] if special.bos is None else special.bos, special.eos[0]
