"""Continuations of texts, read and scored as lm-eval's class for transformers does it.

Source: lm_eval/models/huggingface.py and lm_eval/api/model.py of lm-eval 0.4.13. Both ways to a multiple-choice score,
lm-eval itself and the quick one along a run, go through `score_texts`, so that they agree question by question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from trace_jax.checkpoints.checkpoint import read_object
from trace_jax.config import ConfigError
from trace_jax.evaluation.likelihood import score_sequences
from trace_jax.io.progress import progress
from trace_jax.models.model import Model

_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # of config.json, in lm-eval's order
_USUAL_LENGTH = 2048  # where a model names none, as in lm-eval
_ENDLESS = 10**18  # tokenizers that name no limit say 1e30
_BATCHES = 64  # scored between two looks at the progress


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-likelihood of a continuation (sum over its tokens, nats), and whether it is what greedy decoding writes."""

    log_likelihood: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the texts for one model become tokens. Make one with `make_reader`.

    Attributes:
      tokenizer: puts marks around a text as the checkpoint's own one does.
      prefix: token that stands before what has no context: the beginning of a text or, without one, its end.
      end: token that ends a text.
      max_length: most tokens that the model reads at once.
    """

    tokenizer: Tokenizer
    prefix: int
    end: int
    max_length: int

    def encode(self, text: str) -> list[int]:
        """Ids with the tokenizer's marks around them, unless the text starts with the written prefix."""
        return self._ids(text, marks=not text.startswith(self.written(self.prefix)))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(ids of the context, ids of the continuation): both are read as one text, split where the context alone ends.

        White space at the end of the context goes to the continuation. An empty context is the prefix.
        """
        if not context:
            ids = self._ids(continuation, marks=False)
            return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])
        stripped = context.rstrip()
        whole, before = self.encode(context + continuation), self.encode(stripped)
        return before, whole[len(before) :]

    def written(self, token: int) -> str:
        """The text of a token, a special one too."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _ids(self, text: str, *, marks: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=marks).ids


def make_reader(model: Model, *, max_length: int | None = None) -> Reader:
    """The reader of a model's texts. Marks are put around them as its tokenizer.json says.

    Args:
      max_length: default: `context_length`.

    Raises:
      ConfigError: a model without tokenizer, or whose texts neither begin nor end with a token.
    """
    if model.tokenizer is None:
        raise ConfigError("the model has no tokenizer (tokenizer.json); texts can't be read.")
    bos, end = _marks(model)
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = False
    return Reader(tokenizer, end if bos is None else bos, end, max_length or context_length(model))


def _marks(model: Model) -> tuple[int | None, int]:
    """(BOS, EOS) of the tokenizer, which need not be what the model's config.json says."""
    bos, end = model.special.bos, next(iter(model.special.eos), model.special.bos)
    own = _json_of(model, "tokenizer_config.json")
    if "bos_token" in own:
        bos = _id_of(own["bos_token"], model.tokenizer)
    if own.get("eos_token") is not None:
        found = _id_of(own["eos_token"], model.tokenizer)
        end = end if found is None else found
    if end is None:
        raise ConfigError("the model names neither a beginning nor an end of text (bos_token_id, eos_token_id).")
    return bos, end


def _id_of(token: object, tokenizer: Tokenizer) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def context_length(model: Model) -> int:
    """Most tokens that a model reads at once: what config.json names, else tokenizer_config.json, else 2048."""
    config, own = _json_of(model, "config.json"), _json_of(model, "tokenizer_config.json")
    for value in (*(config.get(name) for name in _LENGTHS), own.get("model_max_length")):
        if value is not None and value < _ENDLESS:
            return int(value)
    return _USUAL_LENGTH


def _json_of(model: Model, name: str) -> dict:
    """A file of the checkpoint that the model was imported from; empty if there is none."""
    if model.source is None or not (file := model.source.directory / name).exists():
        return {}
    return read_object(file)


def score_texts(
    model: Model,
    reader: Reader,
    texts: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[Scored]:
    """Scores of each (context, continuation), in the order given."""
    pairs = [reader.encode_pair(*pair) for pair in texts]
    return score_tokens(model, pairs, max_length=reader.max_length, batch_size=batch_size, mesh=mesh)


def score_tokens(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[Scored]:
    """Scores of each (context, continuation) of token ids, in the order given.

    What the model can't read at once is cut from the left. Pairs that differ in nothing but their last token, such as
    the letters of a multiple-choice question, go through the model once.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than `max_length`.
      NonFiniteScore: the model gives NaN or infinite likelihoods.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"pair {number} has {len(context)} tokens and {len(continuation)} after them; expected at least one "
                f"each, and at most max_length = {max_length} after."
            )
        groups.setdefault((*context, *continuation)[-(max_length + 1) : -1], []).append(number)
    found: dict[int, Scored] = {}
    order, step = sorted(groups, key=len), _BATCHES * batch_size
    with progress("scoring", len(order), unit="text") as advance:
        for begin in range(0, len(order), step):
            some = {key: groups[key] for key in order[begin : begin + step]}
            found |= _score_groups(model, pairs, some, batch_size=batch_size, mesh=mesh)
            advance(min(begin + step, len(order)), "")
    return [found[number] for number in range(len(pairs))]


def _score_groups(model, pairs, groups, *, batch_size: int, mesh: Mesh | None) -> dict[int, Scored]:
    """Scores by number of the pairs that `groups` has by what they share: all but the last token."""
    lasts = [list(dict.fromkeys(pairs[number][1][-1] for number in numbers)) for numbers in groups.values()]
    longest = [max(len(pairs[number][1]) for number in numbers) for numbers in groups.values()]
    scores = score_sequences(
        model,
        [(*key, last[0]) for key, last in zip(groups, lasts, strict=True)],
        [len(key) + 1 - length for key, length in zip(groups, longest, strict=True)],
        alternatives=[last[1:] for last in lasts],
        batch_size=batch_size,
        mesh=mesh,
    )
    found = {}
    for numbers, last, length, score in zip(groups.values(), lasts, longest, scores, strict=True):
        for number in numbers:
            continuation = pairs[number][1]
            # The tokens before the last one, which all share, and the place where its own last one was scored.
            places = [*range(length - len(continuation), length - 1), length - 1 + last.index(continuation[-1])]
            total = float(score.log_prob[places].sum(dtype=np.float64))
            found[number] = Scored(total, bool(score.greedy[places].all()))
    return found
