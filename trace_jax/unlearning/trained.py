"""What trains: split off from a model before the first step, and merged into it after the last.

A parameter trains as it is, under its own path; by the rows of a few experts, PATH/rows; or by two low-rank factors,
PATH/lora_a and PATH/lora_b. Gradients and optimizer state exist for these arrays alone, in float32.

Rows: every layer has as many as the layer with the most selected experts; a layer with fewer is filled up with rows
that belong nowhere. Factors (LoRA, 2106.09685): the weights W stay as they are, W + (alpha / rank) a b computes. a
starts at N(0, 1/inputs) and b at zero, so the first step sees the original model. Sums are rounded to the type of W one
layer at a time, as the merged checkpoint is: what was trained is what is exported.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ArraySpec, ModelConfig, flat_specs, low_rank
from trace_jax.models.sharding import Delta, expert_rows, merged, param_shardings, param_specs, put_rows
from trace_jax.parallel.mesh import EXPERT, spec_axes, storage_spec, sum_over

Flat = dict[str, Any]  # arrays by path
_ROWS, _A, _B = "rows", "lora_a", "lora_b"


def is_of_experts(path: str) -> bool:
    """Whether a parameter [L, E, ...] holds all experts, of which some rows may train alone."""
    return path.startswith("layers/experts/")


def rows_path(path: str) -> str:
    """Where the rows of the experts' parameter at `path` stand among what trains."""
    return f"{path}/{_ROWS}"


def selected_index(selected: np.ndarray) -> np.ndarray:
    """i32 [L, N]: the selected experts of each layer of bool [L, E], filled up with E."""
    number = int(selected.sum(axis=1).max())
    order = np.argsort(~selected, axis=1, kind="stable")[:, :number].astype(np.int32)
    return np.where(np.take_along_axis(selected, order, axis=1), order, np.int32(selected.shape[1]))


# --- declarations


def factors(model: ModelConfig, paths: Iterable[str], rank: int) -> dict[str, ArraySpec]:
    """Declarations of the low-rank factors of the parameters at `paths`, by path."""
    declared, result = flat_specs(model), {}
    for path in sorted(paths):
        try:
            a, b = low_rank(declared[path], rank)
        except ConfigError as error:
            raise ConfigError(f"trainable.rank: {path}: {error} Lower unlearning.trainable.rank.") from None
        result |= {f"{path}/{_A}": a, f"{path}/{_B}": b}
    return result


def declarations(model: ModelConfig, trained: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """The declaration of everything that trains (arrays or shapes by path)."""
    declared, result = flat_specs(model), {}
    for path, leaf in trained.items():
        parameter, _, part = path.rpartition("/")
        if part == _ROWS:
            result[path] = expert_rows(declared[parameter], leaf.shape[1])
        elif part in (_A, _B):
            pair = low_rank(declared[parameter], trained[f"{parameter}/{_A}"].shape[-1])
            result[path] = pair[part == _B]
        else:
            result[path] = declared[path]
    return result


def trained_specs(model: ModelConfig, trained: Mapping[str, Any], mesh: Mesh) -> dict[str, P]:
    """How what trains is stored on `mesh`."""
    return {path: storage_spec(s.shape, s.axes, mesh.shape) for path, s in declarations(model, trained).items()}


# --- split, compute, merge


@functools.partial(jax.jit, static_argnames=("paths", "model", "mesh", "rank"))
def split(
    original: Flat, paths: tuple[str, ...], model: ModelConfig, mesh: Mesh, *, index=None, rank=None, seed=0
) -> Flat:
    """What trains, as it is before the first step.

    Args:
      original: all parameters by path, on the mesh. paths: those of which anything trains.
      index: i32 [L, N], the experts that train where not all do (`selected_index`).
      rank: of low-rank factors of all `paths`, drawn with `seed` and the parameter's name.
    """
    if rank is not None:
        key, own = jax.random.key(seed), factors(model, paths, rank)
        return {p: spec.initialize(jax.random.fold_in(key, zlib.crc32(p.encode()))) for p, spec in own.items()}

    def cut(array, index):
        here = array.shape[1]
        own = index - _first_expert(array, model)
        inside = (own >= 0) & (own < here)
        rows = jax.vmap(lambda experts, places: experts[places])(array, jnp.where(inside, own, 0))
        rows = jnp.where(inside.reshape(*index.shape, *(1,) * (array.ndim - 2)), rows, 0)
        return sum_over(rows, EXPERT) if here < model.num_experts else rows

    specs, result = param_specs(model, mesh), {}
    for path in paths:
        if index is None or not is_of_experts(path):
            result[path] = original[path]
        else:
            sides = {"in_specs": (specs[path], P()), "out_specs": _on_all_experts(specs[path])}
            result[rows_path(path)] = jax.shard_map(cut, mesh=mesh, **sides)(original[path], index)
    return result


def current_params(trained: Flat, original: Mapping[str, Any], index: Any = None, scale: Any = None) -> Flat:
    """All parameters of the model that trains: plain arrays, and `Delta` where a part of one trains.

    Args:
      original: arrays (or their shapes, where whole arrays train) by path.
      index: i32 [L, N], of rows. scale: f32 [], alpha / rank of low-rank factors.
    """
    changed: Flat = {}
    for path, leaf in trained.items():
        parameter, _, part = path.rpartition("/")
        if part == _ROWS:
            array = original[parameter]
            changed[parameter] = Delta(array, rows=leaf.astype(array.dtype), index=index)
        elif part == _A:
            array, b = original[parameter], trained[f"{parameter}/{_B}"]
            changed[parameter] = Delta(array, a=(scale * leaf).astype(array.dtype), b=b.astype(array.dtype))
        elif part != _B:
            changed[path] = leaf.astype(original[path].dtype)
    return {**original, **changed}


def merge(
    original: Flat, trained: Flat, model: ModelConfig, mesh: Mesh, *, index=None, scale=None, subtract: float = 0.0
) -> Flat:
    """Parameters of an ordinary model: `original` with what trained in its place.

    Args:
      index, scale: as for `current_params`.
      subtract: with s > 0, original - s (trained - original) instead, in float32: a task vector is subtracted.
    """
    if subtract and scale is not None:
        scale = -subtract * scale
    elif subtract:
        paths = tuple(path.removesuffix(f"/{_ROWS}") for path in trained)
        first = split(original, paths, model, mesh, index=index)
        trained = {
            path: first[path].astype(jnp.float32) * (1.0 + subtract) - subtract * leaf for path, leaf in trained.items()
        }
    current = current_params(trained, original, index, scale)
    deltas = {path: leaf for path, leaf in current.items() if isinstance(leaf, Delta)}
    return {**current, **(_merged(deltas, model=model, mesh=mesh) if deltas else {})}


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _merged(deltas: dict[str, Delta], *, model: ModelConfig, mesh: Mesh) -> Flat:
    """Plain arrays, stored as parameters are."""
    specs = param_specs(model, mesh)

    def put(array, rows, index):
        return jax.vmap(functools.partial(put_rows, first=_first_expert(array, model)))(array, rows, index)

    def one(leaf: Delta, spec: P):
        if leaf.index is None:
            return jax.lax.map(lambda layer: merged(layer.array, layer.a, layer.b), leaf)
        in_specs = (spec, _on_all_experts(spec), P())
        return jax.shard_map(put, mesh=mesh, in_specs=in_specs, out_specs=spec)(leaf.array, leaf.rows, leaf.index)

    result, shardings = {path: one(leaf, specs[path]) for path, leaf in deltas.items()}, param_shardings(model, mesh)
    return jax.lax.with_sharding_constraint(result, {path: shardings[path] for path in result})


def _first_expert(array: jax.Array, model: ModelConfig) -> jax.Array | int:
    """The first expert of a device's part of an array."""
    return jax.lax.axis_index(EXPERT) * array.shape[1] if array.shape[1] < model.num_experts else 0


def _on_all_experts(spec: P) -> P:
    """The spec of rows that lie as their array does, but on every device of "expert"."""
    return P(*(None if d == 1 and EXPERT in spec_axes(spec, d) else entry for d, entry in enumerate(spec)))
