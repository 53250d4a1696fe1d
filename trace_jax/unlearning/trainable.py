"""Trainable parameters: chosen by path, layer and expert, told in a table, split off from a model, merged into it.

A parameter trains as it is, under its own path; by the rows of a few experts, PATH/rows; or by two low-rank factors,
PATH/lora_a and PATH/lora_b. Gradients and optimizer state exist for these arrays alone, in float32.

Rows: every layer has as many as the layer with the most selected experts; a layer with fewer is filled up with rows
that belong nowhere. Factors (LoRA, 2106.09685): the weights W stay as they are, W + (alpha / rank) a b computes. a
starts at N(0, 1/inputs) and b at zero, so the first step sees the original model. Sums are rounded to the type of W one
layer at a time, as the merged checkpoint is: what was trained is what is exported.
"""

import fnmatch
import functools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.io.progress import aligned
from trace_jax.models.architecture import ArraySpec, ModelConfig, flat_specs, low_rank
from trace_jax.models.sharding import Delta, expert_rows, merged, param_shardings, param_specs, put_rows
from trace_jax.parallel.mesh import EXPERT, spec_axes, storage_spec, sum_over
from trace_jax.routing.config import select_experts
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.unlearning.config import Calibrated, Patterns, Trainable, UnlearningConfig

Flat = dict[str, Any]  # arrays by path
_ROWS, _A, _B = "rows", "lora_a", "lora_b"


# --- chosen


def trainable_paths(model: ModelConfig, trainable: Trainable) -> tuple[str, ...]:
    """The parameters of which anything trains; a ConfigError if there is none, or if a pattern matches none."""
    paths, patterns = tuple(flat_specs(model)), trainable.patterns
    for pattern in patterns if isinstance(trainable, Patterns) else ():
        if not fnmatch.filter(paths, pattern.removeprefix("!")):
            raise ConfigError(
                f"trainable: {pattern!r} is neither a preset ({', '.join(Trainable.kinds)}) nor a pattern that matches "
                f"a parameter. Parameters: {', '.join(sorted(paths))}."
            )

    def trains(path: str) -> bool:
        first = next((p for p in patterns if fnmatch.fnmatchcase(path, p.removeprefix("!"))), "!")
        # The correction only chooses experts: no loss has a gradient for it, and weight decay alone would move it.
        return not first.startswith("!") and path != "layers/router_correction"

    if not (training := tuple(filter(trains, paths))):
        raise ConfigError(f"trainable: {', '.join(patterns)} freezes every parameter; nothing would be unlearned.")
    return training


def chosen_experts(
    config: UnlearningConfig, calibrated: np.ndarray | None, forget: ExpertStatistics, retain: ExpertStatistics, *,
    seed: int,
) -> np.ndarray | None:  # fmt: skip
    """bool [L, E], the experts that train as `config.trainable.experts` says (`calibrated`: those that the calibration
    of the retain weights selected); None where not only some experts train.
    """
    rule = config.trainable.experts
    if rule is None or isinstance(rule, Calibrated):
        return None if rule is None else calibrated
    try:
        return select_experts(forget, retain, rule=rule, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"unlearning.trainable.experts is {rule.name!r}: {error}") from None


def is_of_experts(path: str) -> bool:
    """Whether a parameter [L, E, ...] holds all experts, of which some rows may train alone."""
    return path.startswith("layers/experts/")


def selected_index(selected: np.ndarray) -> np.ndarray:
    """i32 [L, N]: the selected experts of each layer of bool [L, E], filled up with E."""
    number = int(selected.sum(axis=1).max())
    order = np.argsort(~selected, axis=1, kind="stable")[:, :number].astype(np.int32)
    return np.where(np.take_along_axis(selected, order, axis=1), order, np.int32(selected.shape[1]))


def update_masks(
    paths: Iterable[str], model: ModelConfig, *,
    layers: tuple[int, int] | None = None, selected: np.ndarray | None = None,
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """f32 masks by path that multiply (broadcast) the updates of stacked arrays; None when all of every array trains.

    layers: (first, last), layers of the network counted from 1, inclusive; only these train.
    selected: bool [L, E], the experts whose rows alone train; of all else (routers) only their layers train.
    """
    if layers is None and (selected is None or all(map(is_of_experts, paths))):
        return None
    declared, stacks = flat_specs(model), {"layers": model.moe_layers, "dense": model.dense_layers}
    masks = {}
    for path in paths:
        rank, stack = len(declared[path].shape), path.partition("/")[0]
        mask, along = np.ones((1,) * rank, np.float32), (-1, *(1,) * (rank - 1))
        if layers is not None and stack in stacks:
            inside = [layers[0] <= layer + 1 <= layers[1] for layer in stacks[stack]]
            mask = mask * np.reshape(np.array(inside, np.float32), along)
        if selected is not None and not is_of_experts(path):
            mask = mask * np.reshape(selected.any(axis=1).astype(np.float32), along)
        masks[f"{path}/{_ROWS}" if selected is not None and is_of_experts(path) else path] = mask
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError(f"nothing of {', '.join(masks)} would train: no part of it is in layers {layers}.")
    return masks


def trainable_table(model: ModelConfig, config: UnlearningConfig, selected: np.ndarray | None = None) -> list[dict]:
    """One row per parameter: path, shape, how many numbers it has, how many train, and which ("" where none do).
    selected: bool [L, E], the experts that train where not all do.
    """
    paths, rank, rows = trainable_paths(model, config.trainable), config.trainable.rank, []
    masks = update_masks(paths, model, layers=config.layers, selected=selected)
    for path, spec in sorted(flat_specs(model).items()):
        size, count, which = math.prod(spec.shape), 0, ""
        if path in paths and rank is not None:
            count = sum(math.prod(factor.shape) for factor in factors(model, [path], rank).values())
            which = f"rank {rank}"
        elif path in paths:
            of_experts = selected is not None and is_of_experts(path)
            mask: Any = selected if of_experts else np.ones(1) if masks is None else masks[path]
            number = int(mask.sum())
            count = size // mask.size * number
            some = f"{number} of {mask.size} {'experts' if of_experts else 'layers'}" if number else ""
            which = "all" if number == mask.size else some
        rows.append({"path": path, "shape": list(spec.shape), "parameters": size, "trained": count, "which": which})
    return rows


def table_text(table: Sequence[Mapping[str, Any]]) -> str:
    """A trainable table as a person reads it: a line for each parameter that trains, one for all that don't."""
    trained, total = (sum(row[key] for row in table) for key in ("trained", "parameters"))
    rows, frozen = [row for row in table if row["trained"]], [row for row in table if not row["trained"]]
    lines = [(row["path"], " x ".join(map(str, row["shape"])), row["which"], f"{row['trained']:,}") for row in rows]
    arrays = f"{len(frozen)} array{'s' * (len(frozen) != 1)}"
    lines.append(("frozen", arrays, "", f"{sum(row['parameters'] for row in frozen):,}"))
    head = f"trainable parameters: {trained:,} numbers; the model has {total:,} ({trained / total:.2%})"
    return "\n".join([head, *aligned([("parameter", "shape", "trains", "numbers"), *lines], left=3)])


# --- declared


def factors(model: ModelConfig, paths: Iterable[str], rank: int) -> dict[str, ArraySpec]:
    """Declarations of the low-rank factors of the parameters at `paths`, by path."""
    declared, result = flat_specs(model), {}
    for path in sorted(paths):
        try:
            result[f"{path}/{_A}"], result[f"{path}/{_B}"] = low_rank(declared[path], rank)
        except ConfigError as error:
            raise ConfigError(f"trainable.rank: {path}: {error} Lower unlearning.trainable.rank.") from None
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
    """How trained arrays are stored on `mesh`."""
    return {path: storage_spec(s.shape, s.axes, mesh.shape) for path, s in declarations(model, trained).items()}


# --- split, compute, merge


@functools.partial(jax.jit, static_argnames=("paths", "model", "mesh", "rank"))
def split(
    original: Flat, paths: tuple[str, ...], model: ModelConfig, mesh: Mesh, *, index=None, rank=None, seed=0
) -> Flat:
    """The arrays that train, of the parameters at `paths`, before the first step. `original` is on the mesh.

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

    specs, rows = param_specs(model, mesh), [path for path in paths if index is not None and is_of_experts(path)]
    result = {path: original[path] for path in paths if path not in rows}
    for path in rows:
        sides = {"in_specs": (specs[path], P()), "out_specs": _on_all_experts(specs[path])}
        result[f"{path}/{_ROWS}"] = jax.shard_map(cut, mesh=mesh, **sides)(original[path], index)
    return result


def current_params(trained: Flat, original: Mapping[str, Any], index: Any = None, scale: Any = None) -> Flat:
    """All parameters of the model that trains: plain arrays, and `Delta` where a part of one trains. `original` may be
    shapes where whole arrays train. index: i32 [L, N], of rows. scale: f32 [], alpha / rank.
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
    """Parameters of an ordinary model: `original` with what trained in its place (see `current_params`); with
    `subtract` s > 0, original - s (trained - original) instead, in float32: a task vector is subtracted.
    """
    if subtract and scale is not None:
        scale = -subtract * scale
    elif subtract:
        paths = tuple(path.removesuffix(f"/{_ROWS}") for path in trained)
        first = split(original, paths, model, mesh, index=index)
        trained = {p: first[p].astype(jnp.float32) * (1.0 + subtract) - subtract * x for p, x in trained.items()}
    current = current_params(trained, original, index, scale)
    deltas = {path: leaf for path, leaf in current.items() if isinstance(leaf, Delta)}
    return {**current, **(_merged(deltas, model=model, mesh=mesh) if deltas else {})}


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _merged(deltas: dict[str, Delta], *, model: ModelConfig, mesh: Mesh) -> Flat:
    """Plain arrays, stored as parameters are."""
    specs, shardings = param_specs(model, mesh), param_shardings(model, mesh)

    def put(array, rows, index):
        return jax.vmap(functools.partial(put_rows, first=_first_expert(array, model)))(array, rows, index)

    def one(leaf: Delta, spec: P):
        if leaf.index is None:
            return jax.lax.map(lambda layer: merged(layer.array, layer.a, layer.b), leaf)
        in_specs = (spec, _on_all_experts(spec), P())
        return jax.shard_map(put, mesh=mesh, in_specs=in_specs, out_specs=spec)(leaf.array, leaf.rows, leaf.index)

    result = {path: one(leaf, specs[path]) for path, leaf in deltas.items()}
    return jax.lax.with_sharding_constraint(result, {path: shardings[path] for path in result})


def _first_expert(array: jax.Array, model: ModelConfig) -> jax.Array | int:
    """The first expert of a device's part of an array."""
    return jax.lax.axis_index(EXPERT) * array.shape[1] if array.shape[1] < model.num_experts else 0


def _on_all_experts(spec: P) -> P:
    """The spec of rows that lie as their array does, but on every device of "expert"."""
    return P(*(None if d == 1 and EXPERT in spec_axes(spec, d) else entry for d, entry in enumerate(spec)))
