"""How often each expert is used: the pass over a corpus that counts, and the one that keeps every token's experts.

Counts are exact: int32 on the device, summed over devices as integers, int64 on the host; so they are the same at any
batch size and device count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.rows import Batch
from trace_jax.io.files import local_copy, replacing
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.models.sharding import on_mesh, placed_params
from trace_jax.parallel.hosts import place, to_host
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh, row_shards

MIN_ACTIVATIONS = 10  # activations per expert that a corpus must hold on average (T * K / E)


class DamagedRouting(ValueError):
    """A router gave NaN or infinite scores; no statistics can be taken from its model."""


@dataclasses.dataclass(frozen=True)
class ExpertStatistics:
    """Use of the experts over the valid positions of a corpus.

    Attributes:
      counts: i64 [L, E], how often each expert was among the top K.
      gate_mass: f64 [L, E], sum over positions of the router's softmax.
      tokens: valid positions, T.  top_k: experts per token, K.
      layers: which layer of the network each row is of, counted from 0 (dense layers have none); () = 0 to L - 1.
    """

    counts: np.ndarray
    gate_mass: np.ndarray
    tokens: int
    top_k: int
    layers: tuple[int, ...] = ()

    @property
    def frequency(self) -> np.ndarray:
        """f64 [L, E], share of positions that use the expert; each layer sums to K."""
        return self.counts / self.tokens

    def save(self, path) -> None:
        """Writes `path` (.npz) whole or not at all."""
        with replacing(path) as temporary:
            np.savez(temporary, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path) -> ExpertStatistics:
        with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
            layers = tuple(int(layer) for layer in file["layers"]) if "layers" in file else ()
            return cls(file["counts"], file["gate_mass"], int(file["tokens"]), int(file["top_k"]), layers)


@dataclasses.dataclass(frozen=True)
class Assignments:
    """The chosen experts of every valid token of a corpus, in row order.

    Attributes:
      indices: unsigned integer [L, T, K].
      rows: i32 [T], the row of each token.  positions: i32 [T], its position in the row.
      layers: as in `ExpertStatistics`.
    """

    indices: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    layers: tuple[int, ...] = ()


def as_assignments(assignments: Assignments | np.ndarray, rows: np.ndarray | None = None) -> Assignments:
    """`assignments`, or a plain integer array [L, T, K] with the row of each token, as `Assignments`."""
    if isinstance(assignments, Assignments):
        return assignments
    indices = np.asarray(assignments)
    if indices.ndim != 3 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"assignments is {indices.dtype} of shape {indices.shape}; expected integers [layers, tokens, top k]."
        )
    tokens = indices.shape[1]
    rows = np.arange(tokens) if rows is None else np.asarray(rows)
    if rows.shape != (tokens,):
        raise ValueError(f"rows has shape {rows.shape}; expected one row number for each of the {tokens} tokens.")
    return Assignments(indices, rows, np.zeros(tokens, np.int32))


def expert_statistics(
    model: Model, batches: Iterable[Batch], *, mesh: Mesh | None = None, min_activations: float = MIN_ACTIVATIONS
) -> ExpertStatistics:
    """Counts expert activations over the valid positions of `batches`, on all devices of `mesh` (default: all).

    Args:
      model: the frozen original model.
      batches: rows in any order and batch size.
      min_activations: least average number of activations per expert, T * K / E. Below it a frequency of K/E is not
        known to within a third, and selection would follow noise.

    Raises:
      ValueError: too few valid positions; NaN or infinite router scores; counts that do not sum to K per position.
    """
    config = model.config
    counts = np.zeros((len(config.moe_layers), config.num_experts), np.int64)
    gate_mass = np.zeros(counts.shape, np.float64)
    tokens = 0
    for batch, (batch_counts, batch_load) in run_batches(model, batches, _count, out_specs=PartitionSpec(), mesh=mesh):
        valid = int(np.sum(batch.valid))
        batch_counts = np.asarray(batch_counts).astype(np.int64)
        _check_routing(config, batch_counts, np.asarray(batch_load), valid)
        counts += batch_counts
        gate_mass += np.asarray(batch_load).astype(np.float64)
        tokens += valid
    needed = max(1.0, min_activations * config.num_experts / config.experts_per_token)
    if tokens < needed:
        raise ValueError(
            f"the corpus has {tokens} valid tokens; statistics of {config.num_experts} experts with "
            f"{config.experts_per_token} chosen per token need at least {int(np.ceil(needed))} "
            f"({min_activations:g} activations per expert on average). Give more text, or lower min_activations."
        )
    return ExpertStatistics(counts, gate_mass, tokens, config.experts_per_token, config.moe_layers)


def expert_assignments(model: Model, batches: Iterable[Batch], *, mesh: Mesh | None = None) -> Assignments:
    """The chosen experts of every valid position, in row order: L * K bytes per token up to 256 experts.

    Raises:
      ValueError: no valid position, or NaN or infinite router scores.
    """
    return expert_routing(model, batches, mesh=mesh)[1]


def expert_routing(
    model: Model, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> tuple[ExpertStatistics, Assignments]:
    """Both from one pass: `expert_statistics` (of however few activations) and `expert_assignments`.

    Raises:
      DamagedRouting: NaN or infinite router scores.  ValueError: no valid position.
    """
    config = model.config
    dtype = np.uint8 if config.num_experts <= 256 else np.uint16
    counts = np.zeros((len(config.moe_layers), config.num_experts), np.int64)
    gate_mass = np.zeros(counts.shape, np.float64)
    indices, rows, positions, first_row = [], [], [], 0
    for batch, (batch_indices, batch_load) in run_batches(
        model, batches, _assign, out_specs=(PartitionSpec(BATCH_AXES), PartitionSpec()), mesh=mesh
    ):
        valid = np.asarray(batch.valid)
        chosen = np.asarray(batch_indices)[: len(valid)][valid]  # [T, L, K]
        found = np.stack([np.bincount(c.ravel(), minlength=config.num_experts) for c in chosen.swapaxes(0, 1)])
        _check_routing(config, found, np.asarray(batch_load), int(valid.sum()))
        counts += found
        gate_mass += np.asarray(batch_load).astype(np.float64)
        row, position = np.nonzero(valid)
        indices.append(chosen.astype(dtype))
        rows.append((row + first_row).astype(np.int32))
        positions.append(position.astype(np.int32))
        first_row += len(valid)
    if not (tokens := sum(map(len, rows))):
        raise ValueError("the corpus has no valid token; there is no routing to look at.")
    stacked = np.ascontiguousarray(np.concatenate(indices).swapaxes(0, 1))
    return (
        ExpertStatistics(counts, gate_mass, tokens, config.experts_per_token, config.moe_layers),
        Assignments(stacked, np.concatenate(rows), np.concatenate(positions), config.moe_layers),
    )


def _count(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array):
    """(counts i32 [L, E], sum of softmax f32 [L, E]) of the whole batch, from one device's rows."""
    router = forward(params, config, tokens, mask=segments, count_mask=valid, collect=("counts", "load")).router
    return jax.lax.psum((router.counts, router.load), BATCH_AXES)


def _assign(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array):
    """(chosen experts i32 [B, L, S, K] with the batch first, sum of softmax f32 [L, E])."""
    router = forward(params, config, tokens, mask=segments, count_mask=valid, collect=("indices", "load")).router
    assert router.indices is not None
    return router.indices.transpose(1, 2, 0, 3), jax.lax.psum(router.load, BATCH_AXES)


@lru_cache(maxsize=32)
def _compiled(fn, out_specs, config: ModelConfig, mesh: Mesh):
    return jax.jit(on_mesh(lambda params, *arrays: fn(params, config, *arrays), config, mesh, out_specs=out_specs))


def counting_pass(config: ModelConfig, mesh: Mesh) -> Any:
    """The compiled function of `expert_statistics`: (params, tokens, segments, valid) -> (counts, sums of softmax)."""
    return _compiled(_count, PartitionSpec(), config, mesh)


def run_batches(
    model: Model, batches: Iterable[Batch], fn: Callable, *, out_specs, mesh: Mesh | None = None
) -> Iterator[tuple]:
    """(batch, output of `fn(params, config, tokens, segments, valid)`) for every batch.

    `fn` runs on all devices, each with its rows; `out_specs` as in `on_mesh`. Outputs per row are longer than
    the batch where it had to be padded. The next batch is already running when one is handed out.
    """
    mesh = make_mesh() if mesh is None else mesh
    run, params = _compiled(fn, out_specs, model.config, mesh), placed_params(model.params, model.config, mesh)
    size, waiting = 0, None
    for batch in batches:
        size = max(size, _round_up(len(batch.tokens), row_shards(mesh)))  # smaller batches are padded: one compilation
        rows = (_padded(x, size) for x in (batch.tokens, batch.segments, batch.valid))
        output = run(params, *place(tuple(rows), mesh, PartitionSpec(BATCH_AXES)))
        if waiting is not None:
            yield waiting[0], to_host(waiting[1])
        waiting = batch, output
    if waiting is not None:
        yield waiting[0], to_host(waiting[1])


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(array, size: int) -> np.ndarray:
    """`array` [B, S] with zeros below, [size, S]: rows of padding (segment 0, not valid)."""
    return np.pad(np.asarray(array), ((0, size - len(array)), (0, 0)))


def _check_routing(config: ModelConfig, counts: np.ndarray, load: np.ndarray, valid: int) -> None:
    """The invariants of every pass: finite scores, and K activations per valid position in every layer."""
    bad = ~np.isfinite(load).all(axis=1)
    if bad.any():
        raise DamagedRouting(
            f"the router of layer {config.moe_layers[int(np.argmax(bad))]} gave NaN or infinite scores; the model is "
            "damaged (diverged training, or a wrong checkpoint), and no statistics can be taken from it."
        )
    top_k = config.experts_per_token
    wrong = counts.sum(axis=1) != top_k * valid
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"layer {config.moe_layers[row]} counted {int(counts[row].sum())} activations on {valid} valid positions; "
            f"expected {top_k} each, {top_k * valid}."
        )
