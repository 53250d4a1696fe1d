"""Decoding with a cache, greedily or sampled: the prompt is read at once, then tokens are written in compiled chunks.

Between chunks the host may look (`watch`), to show progress or to stop rows. Batch, prompt and cache are padded to few
sizes, so that few programs are compiled.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.models.arrays import unflatten
from trace_jax.models.attention import Cache, init_cache
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.sharding import param_specs, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, TENSOR, place, row_shards, sum_over, to_host

CHUNK = 16  # tokens written between two looks of the host
_PIECE = 512  # tokens of a prompt read at once: bounds the memory of attention scores
_SHORTEST = 16

Watch = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


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
    watch: Watch | None = None,
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
    """
    lengths = _check(prompt, lengths, max_new_tokens, temperature, top_k, top_p, rows)
    prompt = _right_aligned(np.asarray(prompt, np.int32), lengths)
    B, size = len(prompt), _padded_rows(len(prompt), mesh)
    kind = "greedy" if temperature == 0 else "filtered" if top_k or top_p < 1 else "drawn"
    numbers = np.zeros(size, np.int32)
    numbers[:B] = np.arange(B) if rows is None else rows
    settings = {
        "eos": np.asarray(eos_ids, np.int32).reshape(-1),
        "temperature": np.float32(temperature),
        "top_k": np.int32(top_k or config.vocab_size),
        "top_p": np.float32(top_p),
        "keys": jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers),
    }
    tokens, done = np.zeros((B, max_new_tokens), np.int32), np.arange(size) >= B
    n, ends = 0, _stretches(config, prompt.shape[1], max_new_tokens)
    programs = _Programs(params, config, kind, mesh)
    last, cache = programs.start(prompt, lengths, size, max_new_tokens)
    while n < max_new_tokens and not done.all():
        if n == ends[0]:
            ends.pop(0)
            whole = np.concatenate([prompt, tokens[:, :n]], axis=1)
            last, cache = programs.start(whole, lengths + n, size, max_new_tokens - n)
        count = min(CHUNK, ends[0] - n)
        written, last, done, cache = programs.write(settings, last, done, n, count, cache)
        tokens[:, n : n + count] = to_host(written)[:B, :count]
        n, done = n + count, np.array(to_host(done))
        if watch is not None and (stopped := watch(tokens[:, :n], done[:B])) is not None:
            done[:B] |= stopped
    tokens[:, n:] = tokens[:, n - 1 : n]
    return tokens


def padded_size(n: int, *, least: int = _SHORTEST, steps: int = 4) -> int:
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
    for name, given in (("lengths", lengths), ("rows", rows)):
        if given is not None and np.shape(given) != (B,):
            raise ValueError(f"{name} has shape {np.shape(given)}; expected one per prompt, {(B,)}.")
    if lengths.min() < 1 or lengths.max() > P:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}; expected 1 to {P}, the width of prompt.")
    return lengths.astype(np.int64)


def _right_aligned(prompt: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """i32 [B, longest prompt], each prompt at the right end of its row."""
    places = np.arange(lengths.max()) + (lengths - lengths.max())[:, None]
    return np.where(places >= 0, np.take_along_axis(prompt, np.maximum(places, 0), axis=1), 0)


def _long_lengths(config: ModelConfig) -> list[int]:
    """Lengths beyond which a rotary embedding has another amplitude, for all tokens of a text."""
    return [rope.original_length for rope in config.ropes if rope.long_amplitude]


def _stretches(config: ModelConfig, longest: int, max_new_tokens: int) -> list[int]:
    """Numbers of new tokens after which all tokens must be read again, and `max_new_tokens`."""
    switches = {length + 1 - longest for length in _long_lengths(config)}
    return [*sorted(n for n in switches if 0 < n < max_new_tokens), max_new_tokens]


class _Programs:
    """The compiled parts of decoding, on the default device or on every device of a mesh."""

    def __init__(self, params, config: ModelConfig, kind: str, mesh: Mesh | None):
        self._config, self._mesh = config, mesh
        self._params = params if mesh is None else placed_params(params, config, mesh)
        self._empty, self._read, self._write = _compiled(config, kind, mesh)

    def start(self, prompt, lengths, size: int, room: int):
        """(last tokens i32 [size], cache that holds all tokens before them and has `room` for more), of padded prompts.

        Padding stands before a prompt and is of another document, so it is never read nor counted in positions, and all
        rows write their n-th new token in one place of the cache.
        """
        B, longest = len(prompt), prompt.shape[1] - 1
        in_pieces = longest >= _PIECE and not _long_lengths(self._config)
        width = -(-longest // _PIECE) * _PIECE if in_pieces else padded_size(longest + 1)
        piece = _PIECE if in_pieces else width
        rows = ((0, size - B), (0, 0))
        padded = np.pad(prompt, ((0, size - B), (width - longest, 0)))
        places = np.pad(np.arange(width) - width + lengths[:, None] - 1, rows, constant_values=-1)
        # Padding stands where the last token stands: the amplitude of some embeddings depends on the largest position.
        positions = np.where(places < 0, longest, places).astype(np.int32)
        cache = self._empty(size, padded_size(width + room))
        for start in range(0, width, piece):
            part = slice(start, start + piece)
            arrays = self._placed((padded[:, part], places[:, part] >= 0, positions[:, part]), P(BATCH_AXES))
            cache = self._read(self._params, *arrays, cache)
        return padded[:, -1], cache

    def write(self, settings: dict, last, done, n: int, count: int, cache: Cache):
        """(up to CHUNK tokens i32 [B, CHUNK], the last of them, rows that are done, cache)."""
        settings = {name: self._placed(value, _SETTINGS[name]) for name, value in settings.items()}
        rows, numbers = self._placed((last, done), P(BATCH_AXES)), self._placed((np.int32(n), np.int32(count)), P())
        return self._write(self._params, settings, *rows, *numbers, cache)

    def _placed(self, arrays: Any, spec: P) -> Any:
        return arrays if self._mesh is None else place(arrays, self._mesh, spec)


_SETTINGS = {"eos": P(), "temperature": P(), "top_k": P(), "top_p": P(), "keys": P(BATCH_AXES)}


def _cache_specs(config: ModelConfig, mesh: Mesh) -> Cache:
    """How a cache lies on a mesh."""
    devices = mesh.shape[TENSOR]
    split = config.attention == "grouped" and devices > 1 and config.num_kv_heads % devices == 0
    heads = P(None, BATCH_AXES, None, TENSOR) if split else P(None, BATCH_AXES)
    kept: Any = (heads, heads if config.attention == "grouped" else None, P(BATCH_AXES), P(BATCH_AXES), P())
    return Cache(*kept)


@lru_cache(maxsize=32)
def _compiled(config: ModelConfig, kind: str, mesh: Mesh | None):
    """(empty, read, write), jitted."""
    read, write = partial(_read, config), partial(_write, config, kind)
    empty, stored = partial(init_cache, config), None
    if mesh is not None:
        params, cache, rows = unflatten(param_specs(config, mesh)), _cache_specs(config, mesh), P(BATCH_AXES)
        read = jax.shard_map(read, mesh=mesh, in_specs=(params, rows, rows, rows, cache), out_specs=cache)
        inputs = (params, _SETTINGS, rows, rows, P(), P(), cache)
        write = jax.shard_map(write, mesh=mesh, in_specs=inputs, out_specs=(rows, rows, rows, cache))
        stored = jax.tree.map(partial(NamedSharding, mesh), cache)
    # In one program no two arrays of the cache share memory: donation needs that.
    empty = jax.jit(empty, static_argnums=(0, 1), out_shardings=stored)
    return empty, jax.jit(read, donate_argnums=4), jax.jit(write, donate_argnums=6)


def greedy_step(config: ModelConfig, mesh: Mesh, rows: int, length: int) -> tuple[Any, tuple]:
    """(the compiled function that writes tokens greedily, its inputs after the parameters as shapes on `mesh`).

    The cache holds `length` tokens of each of `rows` rows, padded as `generate` does.
    """
    size = _padded_rows(rows, mesh)

    def inputs():
        number, real, keys = jnp.int32(0), jnp.float32(0), jax.random.split(jax.random.key(0), size)
        settings = {"eos": jnp.zeros(1, jnp.int32), "temperature": real, "top_k": number, "top_p": real, "keys": keys}
        last, done = jnp.zeros(size, jnp.int32), jnp.zeros(size, bool)
        return settings, last, done, number, number, init_cache(config, size, padded_size(length))

    specs = (_SETTINGS, P(BATCH_AXES), P(BATCH_AXES), P(), P(), _cache_specs(config, mesh))
    shapes = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        jax.eval_shape(inputs), specs,
    )  # fmt: skip
    return _compiled(config, "greedy", mesh)[2], shapes


def _read(config: ModelConfig, params, tokens, real, positions, cache):
    return forward(params, config, tokens, mask=real, positions=positions, collect=(), cache=cache).cache


def _write(config: ModelConfig, kind: str, params, settings, last, done, n, count, cache):
    """(up to CHUNK tokens i32 [B, CHUNK], the last of them, rows that are done, cache); fewer when all rows are."""
    tokens = jnp.broadcast_to(last[:, None], (len(last), CHUNK))

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

    state = jnp.zeros((), jnp.int32), tokens, last, done, cache
    return jax.lax.while_loop(unfinished, step, state)[1:]


def _choose(logits: jax.Array, kind: str, settings: dict, n: jax.Array) -> jax.Array:
    """The n-th new token i32 [B] of logits f32 [B, V]."""
    if kind != "greedy":
        logits = logits / settings["temperature"]
        if kind == "filtered":
            logits = filter_logits(logits, settings["top_k"], settings["top_p"])
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(settings["keys"], n)
        logits = logits + jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    # The first of the largest. Quicker than argmax, which XLA doesn't vectorise on CPUs.
    place = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, place, logits.shape[1] - 1), axis=-1)


def filter_logits(logits: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Logits [B, V], minus infinity outside the `top_k` likeliest and the fewest of them with `top_p` of their mass."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    among = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] < top_k
    probability = jax.nn.softmax(jnp.where(among, ordered, -jnp.inf), axis=-1)
    kept = among & (jnp.cumsum(probability, axis=-1) - probability < top_p)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
