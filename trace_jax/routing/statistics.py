"""How often each expert is used, and by which token: one pass over a corpus counts, and keeps each token's experts;
another gives the gradient by their gates.

Counts are exact: int32 on the device, summed over devices as integers, int64 on the host; so they are the same at any
batch size and device count.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trace_jax.data.rows import Batch, Rows, batches_of
from trace_jax.io.drawing import TIMES_UNIFORM, card, heat_map, times
from trace_jax.io.files import read_arrays, write_arrays
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.decoder import forward
from trace_jax.models.loss import document_sums, token_nll
from trace_jax.models.model import Model
from trace_jax.models.sharding import compiled, map_batches
from trace_jax.parallel.mesh import BATCH_AXES, as_varying, make_mesh, varying_axes

MIN_ACTIVATIONS = 10  # activations per expert that a corpus must hold on average (T * K / E)


class DamagedRouting(ValueError):
    """A router gave NaN or infinite scores; no statistics can be taken from its model."""


@dataclasses.dataclass(frozen=True)
class ExpertStatistics:
    """Use of the experts over the valid positions of a corpus."""

    counts: np.ndarray  # i64 [L, E], how often each expert was among the top K
    # f64 [L, E], mean over documents of each one's mean gate weight, 0 where not chosen; NaN where gates aren't known
    affinity: np.ndarray
    tokens: int  # valid positions, T
    top_k: int  # experts per token, K
    layers: tuple[int, ...] = ()  # of the network each row is of, from 0 (dense layers have none); () = 0 to L - 1

    @property
    def frequency(self) -> np.ndarray:
        """f64 [L, E], share of positions that use the expert; each layer sums to K."""
        return self.counts / self.tokens

    def __repr__(self) -> str:
        (layers, experts), most = self.counts.shape, np.unravel_index(self.counts.argmax(), self.counts.shape)
        where = f"layer {(self.layers or range(layers))[most[0]]} expert {most[1]}"
        shape = f"{layers} layers x {experts} experts, top {self.top_k}"
        return f"ExpertStatistics({self.tokens:,} tokens, {shape}, most used: {where} by {self.frequency.max():.1%})"

    def _repr_html_(self) -> str:
        use, what = times(self.frequency, self.top_k / self.counts.shape[1]), f"frequency over {self.tokens} tokens"
        figure = heat_map(use, TIMES_UNIFORM, "use of each expert, times uniform", what, layers=self.layers)
        return card(repr(self), [figure], TIMES_UNIFORM)

    def save(self, path, assignments: "Assignments | None" = None) -> None:
        """Writes `path` (.npz), with the experts of every token where given: L * K bytes each up to 256 experts."""
        indices: dict[str, Any] = {} if assignments is None else {"indices": assignments.indices}
        write_arrays(path, dataclasses.asdict(self) | indices, compress=False)

    @classmethod
    def load(cls, path) -> "ExpertStatistics":
        file = read_arrays(path, [field.name for field in dataclasses.fields(cls)])
        layers = tuple(file["layers"].tolist())
        return cls(file["counts"], file["affinity"], int(file["tokens"]), int(file["top_k"]), layers)


@dataclasses.dataclass(frozen=True)
class Assignments:
    """The chosen experts of every valid token of a corpus, in row order."""

    indices: np.ndarray  # unsigned integer [L, T, K]
    rows: np.ndarray  # i32 [T], the row of each token
    documents: np.ndarray  # i32 [T], its document, numbered through the corpus
    layers: tuple[int, ...] = ()  # as in `ExpertStatistics`

    def __repr__(self) -> str:
        layers, tokens, top_k = self.indices.shape
        return f"Assignments({tokens:,} tokens of {len(np.unique(self.rows)):,} rows, {layers} layers, top {top_k})"

    @classmethod
    def load(cls, path, corpus: Rows) -> "Assignments":
        """What `ExpertStatistics.save` kept of a corpus."""
        file = read_arrays(path, ("indices", "layers"))
        return cls(file["indices"], *_places(corpus.valid, corpus.segments), tuple(file["layers"].tolist()))

    def units(self, unit: str) -> np.ndarray | None:
        """i32 [T], which "row" or "document" each token is in; None for unit "token", where each is one."""
        return {"token": None, "row": self.rows, "document": self.documents}[unit]

    def take(self, rows: np.ndarray) -> "Assignments":
        """Those of the rows that `rows` names in ascending order, numbered as in `Rows.take(rows)`."""
        number = np.searchsorted(rows, self.rows)
        taken = rows[np.minimum(number, len(rows) - 1)] == self.rows
        return Assignments(self.indices[:, taken], number[taken], self.documents[taken], self.layers)


def _places(valid: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row i32 [T], document i32 [T]) of each valid token of rows [N, S]; documents are numbered from 1."""
    row, document = np.nonzero(valid)[0], segments[valid]
    starts = (np.diff(row, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0)
    return row.astype(np.int32), np.cumsum(starts, dtype=np.int32)


def expert_statistics(
    model: Model | Callable[..., Any], rows: Rows | Iterable[Batch], *, num_experts: int | None = None,
    batch_size: int = 32, mesh: Mesh | None = None, min_activations: float = MIN_ACTIVATIONS,
) -> ExpertStatistics:  # fmt: skip
    """Counts expert activations over the valid positions of `rows`, on all devices of `mesh` (default: all).

    Args:
      model: the frozen original model; or a function of a model of any library, from tokens i32 [B, S] to the chosen
        experts, integers [L, B, S, K]. It gets each document in a row of its own, filled up with zeros behind it. Gate
        weights are not known then, so that affinities are NaN.
      rows: `Rows`, or batches of any sizes and order.
      num_experts: E, of a function; a model says its own.
      batch_size: rows per forward pass, of `Rows`; changes no count.
      mesh: of a model; a function places its arrays itself.
      min_activations: least average number of activations per expert, T * K / E. Below it a frequency of K/E is not
        known to within a third, and selection would follow noise.

    Raises:
      ValueError: too few valid positions, no batch, tokens that the model doesn't know; a function's answer that isn't
        K different experts of E for each token.
      DamagedRouting: NaN or infinite router scores.

    Example:
      >>> statistics = tj.expert_statistics(model, retain, min_activations=1)
      >>> statistics.frequency.sum(axis=1).round(6)  # each layer chooses K experts a token
      array([2., 2.])
      >>> route = jax.jit(lambda t: tj.forward(model.params, model.config, t, collect=("indices",)).router.indices)
      >>> of_function = tj.expert_statistics(route, retain, num_experts=model.config.num_experts, min_activations=1)
      >>> np.array_equal(of_function.counts, statistics.counts)
      True
    """
    how = {"num_experts": num_experts, "batch_size": batch_size, "mesh": mesh, "min_activations": min_activations}
    return expert_routing(model, rows, **how, assign=False)[0]


def expert_assignments(
    model: Model | Callable[..., Any], rows: Rows | Iterable[Batch], *, num_experts: int | None = None,
    batch_size: int = 32, mesh: Mesh | None = None,
) -> Assignments:  # fmt: skip
    """The chosen experts of every valid position, in row order: L * K bytes per token up to 256 experts. Arguments are
    those of `expert_statistics`.

    Raises:
      ValueError: no valid position, no batch, tokens that the model doesn't know; what a function may not give.
      DamagedRouting: NaN or infinite router scores.

    Example:
      >>> routed = tj.expert_assignments(model, retain)
      >>> routed.indices.shape == (2, int(retain.valid.sum()), 2)  # layers, tokens, experts of a token
      True
    """
    return expert_routing(model, rows, num_experts=num_experts, batch_size=batch_size, mesh=mesh)[1]


def expert_routing(
    model: Model | Callable[..., Any], rows: Rows | Iterable[Batch], *, num_experts: int | None = None,
    batch_size: int = 32, mesh: Mesh | None = None, min_activations: float = 0.0, assign: bool = True,
) -> tuple[ExpertStatistics, Assignments]:  # fmt: skip
    """`expert_statistics` and, unless `assign` is False (then without indices), `expert_assignments`, from one pass."""
    layers, batches = (), batches_of(rows, batch_size, model.config if isinstance(model, Model) else None)
    if isinstance(model, Model) and num_experts is None:
        layers, num_experts = model.config.moe_layers, model.config.num_experts
        outputs = _of_model(model, batches, mesh, assign)
    elif not isinstance(model, Model) and num_experts is not None and mesh is None:
        outputs = of_function(model, batches, num_experts)
    else:
        raise ValueError("with a function give num_experts and no mesh; a Model says its num_experts itself.")
    read, documents, places, indices = 0, 0, [], []
    counts, affinity = np.zeros((), np.int64), np.zeros(())
    for batch, batch_counts, gates, chosen in outputs:
        counts, affinity = counts + batch_counts, affinity + gates
        row, document = _places(np.asarray(batch.valid), np.asarray(batch.segments))
        places.append(np.stack([row + read, document + documents]))  # of each token
        read, documents = read + len(batch.valid), documents + document.max(initial=0)
        indices.append(chosen)
    indices, (row, document) = np.concatenate(indices, axis=1), np.concatenate(places, axis=1)
    tokens, top_k = len(row), indices.shape[2]
    needed = max(1.0, min_activations * num_experts / top_k)
    if tokens < needed:
        raise ValueError(
            f"the corpus has {tokens} valid tokens; statistics of {num_experts} experts with {top_k} chosen per token "
            f"need at least {int(np.ceil(needed))} ({min_activations:g} activations per expert on average). Give more "
            "text, or lower min_activations."
        )
    statistics = ExpertStatistics(counts, affinity / documents, tokens, top_k, layers)
    return statistics, Assignments(indices, row, document, layers)


def map_model(
    fn: Callable, model: Model, batches: Iterable[Batch], mesh: Mesh | None, **layout: Any
) -> Iterator[tuple[Batch, Any]]:
    """(batch, `fn` of the model on its tokens, segments and valid positions) for each, on all devices of `mesh`
    (default: all). `layout` and what `fn` takes and gives: `map_batches`.
    """
    batches, again = itertools.tee(batches)
    arrays = ((batch.tokens, batch.segments, batch.valid) for batch in batches)
    outputs = map_batches(fn, model.params, model.config, arrays, mesh=mesh or make_mesh(), **layout)
    return zip(again, outputs, strict=True)


def _of_model(
    model: Model, batches: Iterable[Batch], mesh: Mesh | None, assign: bool
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray, np.ndarray]]:
    """As `of_function`, with the sum over documents of mean gate weights; without `assign` the experts of no token."""
    config = model.config
    nothing = np.zeros((len(config.moe_layers), 0, config.experts_per_token), index_type(config.num_experts))
    outputs = map_model(_routing, model, batches, mesh, out_specs=_OUT_SPECS[: 2 + assign], static=(assign,))
    for batch, (counts, gates, *chosen) in outputs:
        if (bad := ~np.isfinite(gates).all(axis=(0, 2))).any():
            raise DamagedRouting(
                f"the router of layer {config.moe_layers[int(np.argmax(bad))]} gave NaN or infinite scores; the model "
                "is damaged (diverged training, or a wrong checkpoint), and no statistics can be taken from it."
            )
        valid = np.asarray(batch.valid)
        experts = np.moveaxis(chosen[0][: len(valid)][valid], 1, 0) if assign else nothing
        yield batch, counts.astype(np.int64), gates.sum(axis=0, dtype=np.float64), experts


_OUT_SPECS = (PartitionSpec(), *[PartitionSpec(BATCH_AXES)] * 2)  # counts, the same on all devices; gates and experts


def _routing(
    params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array, assign: bool
) -> tuple[jax.Array, ...]:
    """(counts i32 [L, E] of the whole batch; of each row f32 [B, L, E], the sum over its documents of the mean gate
    weight; and the experts [B, S, L, K] of its rows).
    """
    collect: Any = ("counts", "indices", "weights")
    router: Any = forward(params, config, tokens, mask=segments, count_mask=valid, collect=collect).router
    length = jnp.take_along_axis(document_sums(valid.astype(jnp.float32), segments), segments, axis=1)
    share = jnp.where(valid, 1 / jnp.maximum(length, 1), 0.0)
    gates = _by_expert(router.weights * share[None, :, :, None], router.indices, config)
    results = jax.lax.psum(router.counts, BATCH_AXES), gates
    return (*results, jnp.moveaxis(router.indices, 0, 2).astype(index_type(config.num_experts))) if assign else results


def _by_expert(values: jax.Array, indices: jax.Array, config: ModelConfig) -> jax.Array:
    """f32 [B, L, E]: sums over the positions of each row of values [L, B, S, K] of the chosen experts `indices`."""
    expert = jnp.arange(config.num_experts, dtype=jnp.int32)[None, None, None, :]

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        values_BSK, indices_BSK = layer
        return jnp.where(indices_BSK[..., None] == expert, values_BSK[..., None], 0.0).sum(axis=(1, 2))

    return jnp.moveaxis(jax.lax.map(of_layer, (values, indices)), 0, 1)


def counting_pass(config: ModelConfig, mesh: Mesh) -> Any:
    """The compiled function of `expert_statistics`: (params, tokens, segments, valid) -> (counts, gates by row)."""
    return compiled(_routing, config, mesh, _OUT_SPECS[:2], (False,))


def expert_sensitivity(
    model: Model, rows: Rows | Iterable[Batch], *, batch_size: int = 32, mesh: Mesh | None = None
) -> np.ndarray:
    """f64 [L, E]: mean over valid positions of `|d NLL / d gate|`, the summed NLL of what follows them by the weight
    that an expert's output is multiplied by at the position; 0 where it was not chosen. One backward pass, on all
    devices of `mesh` (default: all). Arguments are those of `expert_statistics`.

    Example:
      >>> slopes, of_forget = tj.expert_sensitivity(model, forget), tj.expert_statistics(model, forget)
      >>> tj.select_experts(of_forget, of_forget, rule="sensitivity", sensitivity=slopes, top=2).sum(axis=1)
      array([2, 2])
    """
    total, tokens = np.zeros(()), 0
    for batch, slopes in map_model(_slopes, model, batches_of(rows, batch_size, model.config), mesh):
        total, tokens = total + slopes.sum(axis=0, dtype=np.float64), tokens + int(np.asarray(batch.valid).sum())
    if not tokens:
        raise ValueError("the corpus has 0 valid tokens; there is no loss to take a slope of. Give more text.")
    return total / tokens


def _slopes(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, valid: jax.Array) -> jax.Array:
    """f32 [B, L, E]: sums over each row of |d NLL / d gate|. The summed NLL of a row is all that its gates change."""

    def loss(added: jax.Array) -> tuple[jax.Array, jax.Array]:
        options: Any = {"collect": ("hidden", "indices"), "gates_added": added, "remat": "layer"}
        out: Any = forward(params, config, tokens, mask=segments, **options)
        nll = token_nll(params, config, out.hidden, jnp.roll(tokens, -1, axis=1))
        return jnp.where(valid, nll, 0.0).sum(), out.router.indices

    shape = len(config.moe_layers), *tokens.shape, config.experts_per_token
    slopes, indices = jax.grad(loss, has_aux=True)(as_varying(jnp.zeros(shape, jnp.float32), varying_axes(tokens)))
    return _by_expert(jnp.abs(slopes), indices, config)


# --- chosen experts as integers: how they are kept, counted and checked, and how they are had from any function


def index_type(num_experts: int) -> np.dtype:
    """The smallest type for the number of an expert."""
    return np.min_scalar_type(num_experts - 1)


def count_activations(indices: np.ndarray, num_experts: int) -> np.ndarray:
    """i64 [L, E]: how often each expert occurs in `indices` [L, T, K]."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in indices])


def first_misfit(indices: np.ndarray, num_experts: int) -> tuple[int, int, str] | None:
    """(layer, token, what is wrong) of the first token of indices [L, T, K] that hasn't K different experts."""
    outside = ((indices < 0) | (indices >= num_experts)).any(axis=2)
    repeated = (np.diff(np.sort(indices, axis=2), axis=2) == 0).any(axis=2)
    for wrong, why in ((outside, f"there are {num_experts}, from 0"), (repeated, "those of a token are distinct")):
        if np.any(wrong):
            token, layer = np.argwhere(np.transpose(wrong))[0]
            return int(layer), int(token), f"the experts are {indices[layer, token].tolist()}; {why}"
    return None


def of_function(
    function: Callable[..., Any], batches: Iterable[Batch], num_experts: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray, np.ndarray]]:
    """For every batch: itself, counts i64 [L, E], NaN for affinities, and the experts [L, T, K] of its valid positions.

    `function` takes tokens i32 [B, S] and gives integers [L, B, S, K]. It reads every document in a row of its own,
    from the first position on, so that none needs to be hidden from another; zeros follow, and fill up the last rows.
    """
    known = ()  # layers and K, once there was an answer
    for batch in batches:
        tokens, segments, valid = (np.asarray(x) for x in (batch.tokens, batch.segments, batch.valid))
        size, length = tokens.shape
        row, place = np.nonzero(segments)
        key = row * (length + 1) + segments[row, place]
        _, first, document = np.unique(key, return_index=True, return_inverse=True)
        at = document, np.arange(len(row)) - first[document]  # a document is one run of positions
        alone = np.zeros((max(1, -(-len(first) // size)) * size, length), np.int32)
        alone[at] = tokens[row, place]
        parts = []
        for start in range(0, len(alone), size):
            part = np.asarray(function(alone[start : start + size]))
            whole = np.issubdtype(part.dtype, np.integer) and part.size > 0 and part.ndim == 4
            if not whole or part.shape[1:3] != (size, length) or part.shape[::3] != (known or part.shape[::3]):
                (layers, top_k), again = known or ("layers", "experts of a token"), ", as before" if known else ""
                raise ValueError(
                    f"of tokens [{size}, {length}] the function gave {part.dtype} {list(part.shape)}; expected the "
                    f"numbers of experts as integers [{layers}, {size}, {length}, {top_k}]{again}."
                )
            known = part.shape[::3]
            parts.append(part)
        experts = np.concatenate(parts, axis=1)[:, *at][:, valid[row, place]]
        if misfit := first_misfit(experts, num_experts):
            raise ValueError(f"of the function, layer {misfit[0]}, valid token {misfit[1]} of a batch: {misfit[2]}.")
        counts = count_activations(experts, num_experts)
        yield batch, counts, np.full(counts.shape, np.nan), experts.astype(index_type(num_experts))
