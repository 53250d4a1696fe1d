"""Texts continued: prompts in, what a model writes after them out, cut at an end token or a stop string."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trace_jax.io.progress import progress
from trace_jax.models.generate import generate
from trace_jax.models.model import Model, TextCodec
from trace_jax.models.sharding import pad

_CONTEXT = 8  # tokens of the prompt that a decoder gets to see, for the space before the first new word


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model wrote after one prompt."""

    text: str  # without the prompt, special tokens and the stop string
    tokens: np.ndarray  # i32 [n], without the end token; with those of the stop string
    finished: str  # "eos", "stop" or "length"


def generate_text(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[Generated]:
    """Continues each prompt until an end token of the model, one of the strings `stop`, or `max_new_tokens`.

    The model's BOS token is put before a prompt that doesn't start with it; special tokens written in a prompt (the
    marks of a chat template) are read as such. A prompt's result does not depend on the other prompts.

    Args:
      mesh, temperature, top_k, top_p, seed: see `generate`; a prompt's draws depend on its place in `prompts`.

    Raises:
      ValueError: a model without tokenizer, an empty prompt without BOS, an empty stop string, or see `generate`.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; expected a sequence of texts, such as [text].")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; texts can't be read. Use generate with token ids.")
    bos, ids = model.special.bos, []
    encodings = TextCodec.of(model).marked.encode_batch(list(prompts), add_special_tokens=False)
    for number, encoding in enumerate(encodings):
        ids.append(encoding.ids if bos is None or encoding.ids[:1] == [bos] else [bos, *encoding.ids])
        if not ids[-1]:
            raise ValueError(f"prompt {number} is empty and the model has no BOS token; there is nothing to continue.")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return continue_tokens(
        model, ids, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size, mesh=mesh, **sampling
    )


def continue_tokens(
    model: Model,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    ends: Sequence[int] | None = None,
    apart: bool = False,
    batch_size: int = 16,
    mesh: Mesh | None = None,
    **sampling: Any,
) -> list[Generated]:
    """`generate_text` for prompts that are token ids already, none of them empty: nothing is put before them.

    Args:
      ends: tokens that end a text; the model's unless given.
      apart: what is written is read without its prompt, and a special token's text can be a stop string, as in
        lm-eval's class for transformers.
      sampling: temperature, top_k, top_p and seed of `generate`.

    Raises:
      ValueError: an empty stop string, a model with a guide, or see `generate`.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is {stop!r}; expected a sequence of texts that are not empty.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    params, ends = model.unguided("generation"), model.special.eos if ends is None else tuple(ends)
    results: dict[int, Generated] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with progress("generating", len(ids) * max_new_tokens, unit="token") as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            writers = [_Writer(model.tokenizer, () if apart else ids[row][-_CONTEXT:], stop, apart) for row in rows]

            def watch(tokens, done, start=start, writers=writers):
                advance(start * max_new_tokens + tokens.size, "")
                return np.array([bool(d) or w.stops(t) for w, t, d in zip(writers, tokens, done, strict=True)])

            tokens = generate(
                params,
                model.config,
                pad([ids[row] for row in rows]),
                lengths=np.array([len(ids[row]) for row in rows]),
                max_new_tokens=max_new_tokens,
                eos_ids=ends,
                rows=rows,
                watch=watch,
                mesh=mesh,
                **sampling,
            )
            results |= {row: w.finish(t, ends) for row, w, t in zip(rows, writers, tokens, strict=True)}
    return [results[row] for row in range(len(ids))]


class _Writer:
    """Turns the new tokens of one prompt into text."""

    def __init__(self, tokenizer, context: Sequence[int], stop: Sequence[str], special: bool):
        self._tokenizer, self._context, self._stop, self._special = tokenizer, list(context), stop, special
        self._skip = len(self._text(np.zeros(0, np.int32))) if self._context else 0

    def _text(self, tokens: np.ndarray, *, special: bool = False) -> str:
        return self._tokenizer.decode([*self._context, *tokens.tolist()], skip_special_tokens=not special)

    def stops(self, tokens: np.ndarray) -> bool:
        """Whether there is a stop string in the text of `tokens`."""
        text = self._text(tokens, special=self._special)[self._skip :] if self._stop else ""
        return any(s in text for s in self._stop)

    def finish(self, tokens: np.ndarray, ends: Sequence[int]) -> Generated:
        """The tokens up to an end token or to the one that completes a stop string, and their text without it."""
        places = np.flatnonzero(np.isin(tokens, ends))
        tokens, why = (tokens[: places[0]], "eos") if len(places) else (tokens, "length")
        if self.stops(tokens):
            first = bisect.bisect_left(range(len(tokens)), True, key=lambda n: self.stops(tokens[:n]))
            tokens, why = tokens[:first], "stop"
        text = self._text(tokens)[self._skip :]
        return Generated(text[: min([len(text), *(text.find(s) for s in self._stop if s in text)])], tokens, why)
