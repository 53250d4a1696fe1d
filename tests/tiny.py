"""One tiny world for every test that needs a forward pass: a shape, parameters, rows, a tokenizer.

Rooms vary switches (`dataclasses.replace(tiny.CONFIG, router_bias=True)`), not sizes: compiled programs are shared so.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import Tokenizer, models, pre_tokenizers

from trace_jax.data.rows import Rows
from trace_jax.io.files import read_lines
from trace_jax.models.architecture import ModelConfig, init_params, parameter_specs
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    num_experts=4,
    experts_per_token=2,
    expert_hidden_size=8,
)
LENGTH = 12


@functools.cache
def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> Model:
    """Random parameters, larger than at initialisation, so that routing is decided."""
    return Model(config, jax.tree.map(lambda x: x * 2.0, init_params(config, jax.random.key(seed))))


def with_router(model: Model, change) -> Model:
    """The model with `change(router)` in the place of its routers [L, D, E]."""
    layers = {**model.params["layers"], "router": change(model.params["layers"]["router"])}
    return model.replace(params={**model.params, "layers": layers})


def random_params(config: ModelConfig, seed: int = 0, noise: float = 0.1) -> dict:
    """As at the start of training, with noise on all, so that no bias is zero and no norm one. Compiles nothing."""
    rng = np.random.default_rng(seed)

    def one(spec):
        start = 1.0 if spec.scale is None else spec.scale * rng.standard_normal(spec.shape)
        return jnp.asarray(start + noise * rng.standard_normal(spec.shape), spec.dtype)

    return jax.tree.map(one, parameter_specs(config))


def mesh_of(data: int, expert: int, tensor: int) -> jax.sharding.Mesh:
    """A mesh of as many devices as these sizes take."""
    return make_mesh(jax.devices()[: data * expert * tensor], data=data, expert=expert, tensor=tensor)


def spread(config: ModelConfig, rules: dict) -> dict:
    """Shardings of parameters over 2 x 2 devices. `rules`: axis of an array -> "data", "expert" or both; the first axis
    of an array that a mesh axis would cut is cut."""
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(spec):
        names = [rules.get(axis) for axis in spec.axes]
        return NamedSharding(mesh, PartitionSpec(*(n if n not in names[:k] else None for k, n in enumerate(names))))

    return jax.tree.map(sharding, parameter_specs(config))


def make_rows(count: int, *, seed: int = 0, length: int = LENGTH, vocab_size: int = CONFIG.vocab_size) -> Rows:
    """Rows of unequal length with padding at the end; every third holds two documents and is a neighbour."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocab_size, (count, length)).astype(np.int32)
    segments = np.ones((count, length), np.int32)
    for row in range(count):
        segments[row, rng.integers(length // 2, length + 1) :] = 0
        if row % 3 == 0:
            segments[row, length // 3 :] *= 2
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    valid = np.pad(same, ((0, 0), (0, 1)))
    return Rows(np.where(segments > 0, tokens, 0), segments, valid, (np.arange(count) % 3 == 0).astype(np.int32))


def make_tokenizer(vocab_size: int = CONFIG.vocab_size) -> Tokenizer:
    """Every id is a word of its own, w0 to w63."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_lines(path, rows) -> str:
    """Writes a JSON Lines file and the folders above it. Returns its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def history(directory) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what a clock decides."""
    return timeless(read_lines(directory / "metrics.jsonl"))


def timeless(rows: list[dict]) -> list[dict]:
    """Rows of a run's history, without what a clock decides."""
    of_clock = ("time", "tokens_per_second", "checksum")  # the last is of the others
    return [{n: value for n, value in row.items() if n not in of_clock} for row in rows]
