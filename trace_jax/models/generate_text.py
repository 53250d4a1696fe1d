"""Texts continued: prompts in, what a model writes after them out, cut at an end token or a stop string."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from trace_jax.io.progress import progress
from trace_jax.models.generate import generate
from trace_jax.models.model import Model

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
    return continue_tokens(
        model,
        _encode(model, prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        batch_size=batch_size,
        mesh=mesh,
    )


def continue_tokens(
    model: Model,
    ids: Sequence[Sequence[int]],
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
    """The same for prompts that are token ids already, none of them empty: nothing is put before them.

    Raises:
      ValueError: an empty stop string, a model with a guide, or see `generate`.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is {stop!r}; expected a sequence of texts that are not empty.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    params = model.unguided("generation")
    results: dict[int, Generated] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with progress("generating", len(ids) * max_new_tokens, unit="token") as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            writers = [_Writer(model, ids[row], stop) for row in rows]

            def watch(tokens, done, start=start, writers=writers):
                advance(start * max_new_tokens + tokens.size, "")
                return np.array([bool(d) or w.stops(t) for w, t, d in zip(writers, tokens, done, strict=True)])

            prompt = np.zeros((len(rows), max(len(ids[row]) for row in rows)), np.int32)
            for place, row in enumerate(rows):
                prompt[place, : len(ids[row])] = ids[row]
            tokens = generate(
                params,
                model.config,
                prompt,
                lengths=np.array([len(ids[row]) for row in rows]),
                max_new_tokens=max_new_tokens,
                eos_ids=model.special.eos,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                rows=rows,
                watch=watch,
                mesh=mesh,
            )
            results |= {row: w.finish(t) for row, w, t in zip(rows, writers, tokens, strict=True)}
    return [results[row] for row in range(len(ids))]


def _encode(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; expected a sequence of texts, such as [text].")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; texts can't be read. Use generate with token ids.")
    model.tokenizer.encode_special_tokens = False
    bos, ids = model.special.bos, []
    for number, encoding in enumerate(model.tokenizer.encode_batch(list(prompts), add_special_tokens=False)):
        ids.append(encoding.ids if bos is None or encoding.ids[:1] == [bos] else [bos, *encoding.ids])
        if not ids[-1]:
            raise ValueError(f"prompt {number} is empty and the model has no BOS token; there is nothing to continue.")
    return ids


class _Writer:
    """Turns the new tokens of one prompt into text."""

    def __init__(self, model: Model, prompt: Sequence[int], stop: Sequence[str]):
        self._decode, self._eos, self._stop = model.tokenizer.decode, model.special.eos, stop
        self._context = list(prompt[-_CONTEXT:])
        self._skip = len(self._decode(self._context))

    def _text(self, tokens: np.ndarray) -> str:
        return self._decode([*self._context, *tokens.tolist()])[self._skip :]

    def stops(self, tokens: np.ndarray) -> bool:
        """Whether there is a stop string in the text of `tokens`."""
        text = self._text(tokens) if self._stop else ""
        return any(s in text for s in self._stop)

    def finish(self, tokens: np.ndarray) -> Generated:
        ends = np.flatnonzero(np.isin(tokens, self._eos))
        tokens, finished = (tokens[: ends[0]], "eos") if len(ends) else (tokens, "length")
        if self.stops(tokens):
            first = bisect.bisect_left(range(len(tokens)), True, key=lambda n: self.stops(tokens[:n]))
            tokens, finished = tokens[:first], "stop"
        text = self._text(tokens)
        return Generated(text[: min([len(text), *(text.find(s) for s in self._stop if s in text)])], tokens, finished)
