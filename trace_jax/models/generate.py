"""Decoding with a cache, greedily or sampled: the prompt is read at once, then tokens are written in compiled chunks.

Between chunks the host may look (`watch`), to show progress or to stop rows. Batch, prompt and cache are padded to few
sizes, so that few programs are compiled. Texts are cut at an end token or a stop string.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.io.progress import progress
from trace_jax.models.architecture import ModelConfig, abstract_params, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.layers import Cache, init_cache
from trace_jax.models.model import Model, TextCodec
from trace_jax.models.sharding import decoding_params, decoding_specs, pad
from trace_jax.parallel.mesh import BATCH_AXES, TENSOR, place, row_shards, sum_over, to_host

CHUNK = 16  # tokens written between two looks of the host
_PIECE = 512  # tokens of a prompt read at once: bounds the memory of attention scores
_CONTEXT = 8  # tokens of the prompt that a decoder gets to see, for the space before the first new word
_ROWS = P(BATCH_AXES)
_SETTINGS = {"eos": P(), "temperature": P(), "top_k": P(), "top_p": P(), "keys": _ROWS}


def generate(
    params: dict,
    config: ModelConfig,
    prompt: np.ndarray | jax.Array,
    *,
    lengths: np.ndarray | jax.Array | None = None,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    watch: Callable[[np.ndarray, np.ndarray], np.ndarray | None] | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The next tokens of every prompt.

    Args:
      prompt: i32 [B, P], each row's prompt at its left end.
      lengths: i32 [B], tokens of each prompt, 1 to P (default P); what follows in the row is ignored.
      eos_ids: a row that produced one of them is done.
      temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
      top_k, top_p: draw among the `top_k` likeliest (0: all), and among the fewest that have `top_p` of their mass.
      seed, rows: the draws of a row depend on the seed and its number (default: its place in the batch), nothing else.
      watch: called with all tokens so far i32 [B, n] and the rows that are done bool [B]; the rows of the answer
        bool [B] are done from here on.
      mesh: devices that share rows and parameters; None: the default device.

    Returns:
      i32 [B, max_new_tokens]. A row that is done is filled with its last token.

    Example:
      >>> prompt = np.array([tokenizer.encode("House 1 has").ids], np.int32)
      >>> tj.generate(model.params, model.config, prompt, max_new_tokens=4).shape
      (1, 4)
    """
    lengths = _check(prompt, lengths, max_new_tokens, temperature, top_k, top_p, rows)
    ends = np.arange(lengths.max()) + (lengths - lengths.max())[:, None]  # prompts go to the right end of their rows
    prompt = np.where(ends >= 0, np.take_along_axis(np.asarray(prompt, np.int32), np.maximum(ends, 0), axis=1), 0)
    config.check_tokens(prompt, "prompts")
    B, size = len(prompt), _padded_rows(len(prompt), mesh)
    kind = "greedy" if temperature == 0 else "filtered" if top_k or top_p < 1 else "drawn"
    numbers = np.pad(np.asarray(range(B) if rows is None else rows, np.int32), (0, size - B))
    empty, read, write = _compiled(config, kind, mesh)
    params = params if mesh is None else decoding_params(params, config, mesh)
    # Beyond these lengths a rotary embedding has another amplitude for all tokens of a text: they are read again.
    long = [rope.original_length for rope in config.ropes if rope.long_amplitude]

    def placed(arrays: Any, specs: Any = _ROWS) -> Any:
        return arrays if mesh is None else place(arrays, mesh, specs)

    def start(texts, lengths, room: int):
        """(last tokens i32 [size], cache that holds all tokens before them and has `room` for more). Padding stands
        before a text and is of another document: never read nor counted in positions, while all rows write their n-th
        new token in one place of the cache.
        """
        longest = texts.shape[1] - 1
        piece = _PIECE if longest >= _PIECE and not long else padded_size(longest + 1)
        width = max(1, -(-longest // piece)) * piece
        padded = np.pad(texts, ((0, size - B), (width - longest, 0)))
        places = np.arange(width) - width + lengths[:, None] - 1
        places = np.pad(places, ((0, size - B), (0, 0)), constant_values=-1)
        # Padding stands where the last token stands: the amplitude of some embeddings depends on the largest position.
        positions = np.where(places < 0, longest, places).astype(np.int32)
        cache = empty(size, padded_size(width + room))
        for first in range(0, width, piece):
            part = slice(first, first + piece)
            cache = read(params, *placed((padded[:, part], places[:, part] >= 0, positions[:, part])), cache)
        return padded[:, -1], cache

    settings = {
        "eos": np.asarray(eos_ids, np.int32).reshape(-1),
        "temperature": np.float32(temperature),
        "top_k": np.int32(top_k or config.vocab_size),
        "top_p": np.float32(top_p),
        "keys": jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers),
    }
    settings = placed(settings, _SETTINGS)
    tokens, done, n = np.zeros((B, max_new_tokens), np.int32), np.arange(size) >= B, 0
    again = {length + 1 - prompt.shape[1] for length in long}
    stretches = [*sorted(n for n in again if 0 < n < max_new_tokens), max_new_tokens]
    last, cache = start(prompt, lengths, max_new_tokens)
    while n < max_new_tokens and not done.all():
        if n == stretches[0]:
            stretches.pop(0)
            last, cache = start(np.concatenate([prompt, tokens[:, :n]], axis=1), lengths + n, max_new_tokens - n)
        count = min(CHUNK, stretches[0] - n)
        numbers = placed((np.int32(n), np.int32(count)), P())
        written, last, done, cache = write(params, settings, *placed((last, done)), *numbers, cache)
        tokens[:, n : n + count] = to_host(written)[:B, :count]
        n, done = n + count, np.array(to_host(done))
        if watch is not None and (stopped := watch(tokens[:, :n], done[:B])) is not None:
            done[:B] |= stopped
    tokens[:, n:] = tokens[:, n - 1 : n]
    return tokens


def padded_size(n: int, *, least: int = 16, steps: int = 4) -> int:
    """The next of few sizes: powers of two and `steps` - 1 sizes between each two of them."""
    if n <= least:
        return least
    step = max(1, (1 << ((n - 1).bit_length() - 1)) // steps)
    return -(-n // step) * step


def _padded_rows(rows: int, mesh: Mesh | None) -> int:
    """The next of few sizes that the devices of a mesh share evenly."""
    shards = 1 if mesh is None else row_shards(mesh)
    return -(-padded_size(rows, least=1, steps=8) // shards) * shards


def _check(prompt, lengths, max_new_tokens, temperature, top_k, top_p, rows) -> np.ndarray:
    """Lengths i64 [B], or a ValueError that says what is wrong."""
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt has shape {prompt.shape}; expected [B, P] with B >= 1 and P >= 1.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (the likeliest token) or more.")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; expected 0 (all) or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected more than 0 and at most 1.")
    B, P = prompt.shape
    lengths = np.full(B, P) if lengths is None else np.asarray(lengths)
    for name, numbers in (("lengths", lengths), ("rows", rows)):
        if numbers is not None and np.shape(numbers) != (B,):
            raise ValueError(f"{name} has shape {np.shape(numbers)}; expected one per prompt, {(B,)}.")
    if lengths.min() < 1 or lengths.max() > P:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}; expected 1 to {P}, the width of prompt.")
    return lengths.astype(np.int64)


def _cache_specs(config: ModelConfig, mesh: Mesh) -> Cache:
    """How a cache lies on a mesh."""
    devices, grouped = mesh.shape[TENSOR], config.attention == "grouped"
    split = grouped and devices > 1 and config.num_kv_heads % devices == 0
    heads = P(None, BATCH_AXES, TENSOR) if split else P(None, BATCH_AXES)
    specs: Any = heads, heads if grouped else None, _ROWS, _ROWS, P()
    return Cache(*specs)


@lru_cache(maxsize=32)
def _compiled(config: ModelConfig, kind: str, mesh: Mesh | None):
    """(empty, read, write), jitted."""

    def read(params, tokens, real, positions, cache):
        return forward(params, config, tokens, mask=real, positions=positions, collect=(), cache=cache).cache

    def write(params, settings, last, done, n, count, cache):
        """(up to CHUNK tokens i32 [B, CHUNK], the last of them, rows that are done, cache); fewer when all rows are."""

        def unfinished(state):
            i, _, _, done, _ = state
            return (i < count) & (sum_over(jnp.sum(~done, dtype=jnp.int32), *BATCH_AXES) > 0)

        def step(state):
            i, tokens, last, done, cache = state
            output = forward(params, config, last[:, None], cache=cache)
            assert output.logits is not None
            last = jnp.where(done, last, _choose(output.logits[:, 0], kind, settings, n + i))
            done = done | jnp.any(last[:, None] == settings["eos"][None, :], axis=1)
            # Filled to the end: a row that is done holds its last token, also where the loop ends early.
            later = jnp.arange(CHUNK, dtype=jnp.int32)[None, :] >= i
            return i + 1, jnp.where(later, last[:, None], tokens), last, done, output.cache

        tokens = jnp.broadcast_to(last[:, None], (len(last), CHUNK))
        return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), tokens, last, done, cache))[1:]

    empty, stored = partial(init_cache, config), None
    if mesh is not None:
        params, cache = unflatten(decoding_specs(config, mesh)), _cache_specs(config, mesh)
        read = jax.shard_map(read, mesh=mesh, in_specs=(params, _ROWS, _ROWS, _ROWS, cache), out_specs=cache)
        inputs = (params, _SETTINGS, _ROWS, _ROWS, P(), P(), cache)
        write = jax.shard_map(write, mesh=mesh, in_specs=inputs, out_specs=(_ROWS, _ROWS, _ROWS, cache))
        stored = jax.tree.map(partial(NamedSharding, mesh), cache)
    # In one program no two arrays of the cache share memory: donation needs that.
    empty = jax.jit(empty, static_argnums=(0, 1), out_shardings=stored)
    return empty, jax.jit(read, donate_argnums=4), jax.jit(write, donate_argnums=6)


def greedy_step(config: ModelConfig, mesh: Mesh, rows: int, length: int) -> tuple[Any, tuple]:
    """(the compiled function that writes tokens greedily, its inputs as shapes on `mesh`), with a cache for `length`
    tokens of each of `rows` rows, padded as `generate` does.
    """
    size = _padded_rows(rows, mesh)

    def inputs():
        number, real, keys = jnp.int32(0), jnp.float32(0), jax.random.split(jax.random.key(0), size)
        settings = {"eos": jnp.zeros(1, jnp.int32), "temperature": real, "top_k": number, "top_p": real, "keys": keys}
        last, done = jnp.zeros(size, jnp.int32), jnp.zeros(size, bool)
        return settings, last, done, number, number, init_cache(config, size, padded_size(length))

    def shape(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(shape, abstract_params(config), unflatten(decoding_specs(config, mesh)))
    specs = (_SETTINGS, _ROWS, _ROWS, P(), P(), _cache_specs(config, mesh))
    return _compiled(config, "greedy", mesh)[2], (params, *jax.tree.map(shape, jax.eval_shape(inputs), specs))


def _choose(logits: jax.Array, kind: str, settings: dict, n: jax.Array) -> jax.Array:
    """The n-th new token i32 [B] of logits f32 [B, V]."""
    place = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    if kind != "greedy":
        logits = logits / settings["temperature"]
        if kind == "filtered":  # to the `top_k` likeliest, and the fewest of them with `top_p` of their mass
            ordered, among = jnp.sort(logits, axis=-1, descending=True), place < settings["top_k"]
            probability = jax.nn.softmax(jnp.where(among, ordered, -jnp.inf), axis=-1)
            among = among & (jnp.cumsum(probability, axis=-1) - probability < settings["top_p"])
            least = jnp.min(jnp.where(among, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(settings["keys"], n)
        logits = logits + jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    # The first of the largest. Quicker than argmax, which XLA doesn't vectorise on CPUs.
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, place, logits.shape[1] - 1), axis=-1)


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

    Example:
      >>> [written] = tj.generate_text(model, ["House 1 has"], max_new_tokens=4)
      >>> written.finished, len(written.tokens)
      ('length', 4)
    """
    bos = model.special.bos
    encodings = TextCodec.of(model).marked.encode_batch(list(prompts), add_special_tokens=False)
    ids = [e.ids if bos is None or e.ids[:1] == [bos] else [bos, *e.ids] for e in encodings]
    if [] in ids:
        raise ValueError(f"prompt {ids.index([])} is empty and the model has no BOS token; nothing can be continued.")
    return continue_tokens(
        model, ids, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size, mesh=mesh,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip


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
    """`generate_text` for prompts that are token ids, none of them empty: nothing is put before them. `ends` are the
    tokens that end a text (default: the model's). `apart`: what is written is read without its prompt, and a special
    token's text can be a stop string, as in lm-eval's class for transformers.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is {stop!r}; expected a sequence of texts that are not empty.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    params, decode = model.unguided("generation"), model.tokenizer.decode
    ends = model.special.eos if ends is None else tuple(ends)

    def text(row: int, tokens: np.ndarray, special: bool = False) -> str:
        """What new tokens of a row add to the text of its prompt."""
        before, read = [] if apart else list(ids[row][-_CONTEXT:]), partial(decode, skip_special_tokens=not special)
        return read([*before, *tokens.tolist()])[len(read(before)) :]

    def stops(row: int, tokens: np.ndarray) -> bool:
        written = text(row, tokens, special=apart) if stop else ""
        return any(s in written for s in stop)

    def finish(row: int, tokens: np.ndarray) -> Generated:
        """The tokens up to an end token or to the one that completes a stop string, and their text without it."""
        places = np.flatnonzero(np.isin(tokens, ends))
        tokens, why = (tokens[: places[0]], "eos") if len(places) else (tokens, "length")
        if stops(row, tokens):
            first = bisect.bisect_left(range(len(tokens)), True, key=lambda n: stops(row, tokens[:n]))
            tokens, why = tokens[:first], "stop"
        written = text(row, tokens)
        return Generated(written[: min([len(written), *(written.find(s) for s in stop if s in written)])], tokens, why)

    results: dict[int, Generated] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with progress("generating", len(ids) * max_new_tokens, unit="token") as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]

            def watch(tokens, done, start=start, rows=rows):
                advance(start * max_new_tokens + tokens.size, "")
                return np.array([bool(d) or stops(row, t) for row, t, d in zip(rows, tokens, done, strict=True)])

            prompts = [ids[row] for row in rows]
            tokens = generate(
                params, model.config, pad(prompts), lengths=np.array([len(prompt) for prompt in prompts]),
                max_new_tokens=max_new_tokens, eos_ids=ends, rows=rows, watch=watch, mesh=mesh, **sampling,
            )  # fmt: skip
            results |= {row: finish(row, t) for row, t in zip(rows, tokens, strict=True)}
    return [results[row] for row in range(len(ids))]
