"""How often each expert is used, and by which token: one pass over a corpus counts, and keeps each token's experts.

Counts are exact: int32 on the device, summed over devices as integers, int64 on the host; so they are the same at any
batch size and device count.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.rows import Batch
from trace_jax.io.files import local_copy, replacing
from trace_jax.models.config import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.models.sharding import compiled, map_batches
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh

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

    def save(self, path, assignments: "Assignments | None" = None) -> None:
        """Writes `path` (.npz), with the experts of every token where given: L * K bytes each up to 256 experts."""
        arrays: dict[str, Any] = dataclasses.asdict(self)
        if assignments is not None:
            arrays["indices"] = assignments.indices
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)

    @classmethod
    def load(cls, path) -> "ExpertStatistics":
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

    @classmethod
    def load(cls, path, valid: np.ndarray) -> "Assignments":
        """What `ExpertStatistics.save` kept of a corpus whose rows are valid at `valid` [N, S]."""
        with local_copy(path) as local, np.load(local, allow_pickle=False) as file:
            indices, layers = file["indices"], tuple(int(layer) for layer in file["layers"])
        rows, positions = np.nonzero(valid)
        return cls(indices, rows.astype(np.int32), positions.astype(np.int32), layers)

    def take(self, rows: np.ndarray) -> "Assignments":
        """Those of the rows that `rows` names in ascending order, numbered as in `Rows.take(rows)`."""
        number = np.searchsorted(rows, self.rows)
        taken = rows[np.minimum(number, len(rows) - 1)] == self.rows
        return Assignments(self.indices[:, taken], number[taken], self.positions[taken], self.layers)


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
      ValueError: too few valid positions.  DamagedRouting: NaN or infinite router scores.
    """
    return _route(model, batches, mesh, min_activations, experts=False)[0]


def expert_assignments(model: Model, batches: Iterable[Batch], *, mesh: Mesh | None = None) -> Assignments:
    """The chosen experts of every valid position, in row order: L * K bytes per token up to 256 experts.

    Raises:
      ValueError: no valid position.  DamagedRouting: NaN or infinite router scores.
    """
    return expert_routing(model, batches, mesh=mesh)[1]


def expert_routing(
    model: Model, batches: Iterable[Batch], *, mesh: Mesh | None = None, min_activations: float = 0.0
) -> tuple[ExpertStatistics, Assignments]:
    """`expert_statistics` and `expert_assignments` from one pass; raises what they raise."""
    return _route(model, batches, mesh, min_activations, experts=True)


def _route(
    model: Model, batches: Iterable[Batch], mesh: Mesh | None, min_activations: float, *, experts: bool
) -> tuple[ExpertStatistics, Assignments]:
    """Statistics and, with `experts`, assignments (else empty)."""
    config, (fn, out_specs) = model.config, _ASSIGN if experts else _COUNT
    counts = np.zeros((len(config.moe_layers), config.num_experts), np.int64)
    gate_mass, tokens, first_row = np.zeros(counts.shape, np.float64), 0, 0
    indices = [np.zeros((len(counts), 0, config.experts_per_token), _compact(config))]
    places = [np.zeros((2, 0), np.int32)]
    for batch, (batch_counts, load, *chosen) in run_batches(model, batches, fn, out_specs=out_specs, mesh=mesh):
        valid = np.asarray(batch.valid)
        if (bad := ~np.isfinite(load).all(axis=1)).any():
            raise DamagedRouting(
                f"the router of layer {config.moe_layers[int(np.argmax(bad))]} gave NaN or infinite scores; the model "
                "is damaged (diverged training, or a wrong checkpoint), and no statistics can be taken from it."
            )
        counts += batch_counts.astype(np.int64)
        gate_mass += load.astype(np.float64)
        tokens += int(valid.sum())
        if experts:
            indices.append(np.moveaxis(chosen[0][: len(valid)][valid], 1, 0))
            places.append(np.stack(np.nonzero(valid)).astype(np.int32) + np.array([[first_row], [0]], np.int32))
            first_row += len(valid)
    if (counts.sum(axis=1) != config.experts_per_token * tokens).any():
        raise ValueError(
            f"layers counted {counts.sum(axis=1).tolist()} activations on {tokens} valid positions; expected "
            f"{config.experts_per_token} each. This is an error of trace_jax."
        )
    needed = max(1.0, min_activations * config.num_experts / config.experts_per_token)
    if tokens < needed:
        raise ValueError(
            f"the corpus has {tokens} valid tokens; statistics of {config.num_experts} experts with "
            f"{config.experts_per_token} chosen per token need at least {int(np.ceil(needed))} "
            f"({min_activations:g} activations per expert on average). Give more text, or lower min_activations."
        )
    statistics = ExpertStatistics(counts, gate_mass, tokens, config.experts_per_token, config.moe_layers)
    rows, positions = np.concatenate(places, axis=1)
    return statistics, Assignments(np.concatenate(indices, axis=1), rows, positions, config.moe_layers)


def _compact(config: ModelConfig) -> Any:
    return np.uint8 if config.num_experts <= 256 else np.uint16


def _routing(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array, *, experts: bool):
    """(counts i32 [L, E], sum of softmax f32 [L, E]) of the whole batch, and the experts [B, S, L, K] of its rows."""
    collect = ("counts", "load", "indices") if experts else ("counts", "load")
    router = forward(params, config, tokens, mask=segments, count_mask=valid, collect=collect).router
    sums = jax.lax.psum((router.counts, router.load), BATCH_AXES)
    return sums if router.indices is None else (*sums, jnp.moveaxis(router.indices, 0, 2).astype(_compact(config)))


_COUNT = partial(_routing, experts=False), PartitionSpec()
_ASSIGN = partial(_routing, experts=True), (PartitionSpec(), PartitionSpec(), PartitionSpec(BATCH_AXES))


def counting_pass(config: ModelConfig, mesh: Mesh) -> Any:
    """The compiled function of `expert_statistics`: (params, tokens, segments, valid) -> (counts, sums of softmax)."""
    fn, out_specs = _COUNT
    return compiled(fn, config, mesh, out_specs)


def run_batches(
    model: Model, batches: Iterable[Batch], fn: Callable, *, out_specs, mesh: Mesh | None = None
) -> Iterator[tuple]:
    """(batch, output of `fn(params, config, tokens, segments, valid)`) for every batch.

    `fn` runs on all devices, each with its rows; `out_specs` as in `on_mesh`. Outputs per row are longer than
    the batch where it had to be padded. The next batch is already running when one is handed out.
    """
    batches, again = itertools.tee(batches)
    arrays = ((batch.tokens, batch.segments, batch.valid) for batch in batches)
    mesh = make_mesh() if mesh is None else mesh
    yield from zip(
        again, map_batches(fn, model.params, model.config, arrays, mesh=mesh, out_specs=out_specs), strict=True
    )
