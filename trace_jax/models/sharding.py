"""A model's parameters on a mesh: how each is stored and brought together, and functions run over many batches there.

Where a part of an array trains without a gradient or optimizer state for the rest, it is given as a `Delta`: with some
of its experts in an array of their own, or with the product of two small factors to be added to it. It becomes a plain
array layer by layer, where it is used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.models.architecture import ArraySpec, ModelConfig, flat_specs, flatten, low_rank, unflatten
from trace_jax.parallel import mesh as meshes
from trace_jax.parallel.mesh import BATCH_AXES, DATA, EXPERT, TENSOR, ParallelConfig, axis_sizes, place

# Primitives that move numbers without computing any. Keeping their results would keep gathered weights.
_MOVES = frozenset(
    {"all_gather", "reshape", "transpose", "convert_element_type", "slice", "dynamic_slice", "squeeze", "pad",
     "concatenate", "broadcast_in_dim", "gather", "scatter", "copy", "pvary", "pcast", "split", "rev"}
)  # fmt: skip
_PER_ROW = P(BATCH_AXES)
_ROOM = 10 << 30  # bytes of gathered parameters on a device: the smallest that large models are planned for have 16 GB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """`array` and what changes it, of all layers or of one: `rows` [L,N,...] in the places of the experts `index` i32
    [L,N] (E: in none) of `array` [L,E,...]; or the product of `a` [..., inputs, R] and `b` [..., R, outputs], added to
    `array` [..., inputs, outputs].
    """

    array: jax.Array
    rows: Any = None
    index: Any = None
    a: Any = None
    b: Any = None


def merged(array: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`array` + `a` `b` in the type of `array`: [..., inputs, outputs] and factors, without layers. The sum is float32.
    Inputs are the axes that `a` has before its last. Where there are experts, both factors have them in front.
    """
    stacked = a.ndim + b.ndim - 2 - array.ndim  # 1 where there are experts: counted in both factors
    left, right = (*a.shape[:stacked], -1, a.shape[-1]), (*b.shape[: stacked + 1], -1)
    batch = tuple(range(stacked))
    dimensions = ((stacked + 1,), (stacked,)), (batch, batch)
    precision = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    product = jax.lax.dot_general(a.reshape(left), b.reshape(right), dimensions, **precision)
    return (array.astype(jnp.float32) + product.reshape(array.shape)).astype(array.dtype)


def sent_bytes(config: ModelConfig, sizes: Mapping[str, int], tokens: int) -> dict[str, float]:
    """Bytes that one device sends in a step in which everything trains, by kind (docs/scaling.md, "Communication").

    Args:
      config: of a model with grouped attention, for it to be exact, whose dimensions the mesh divides.
      sizes: of the mesh axes.
      tokens: forget and retain tokens on one device.
    """
    sent: dict[str, float] = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
    for path, spec in flat_specs(config).items():
        inside, repeats = (spec.shape[1:], spec.shape[0]) if spec.axes[0] == "layers" else (spec.shape, 1)
        axes = spec.axes[-len(inside) :]
        own = [meshes.RULES.get(name, "") for name in axes]
        split = zip(inside, own, strict=True)
        whole = (
            math.prod(n / sizes[axis] if axis else n for n, axis in split) * repeats * jnp.dtype(spec.dtype).itemsize
        )
        stored = meshes.storage_spec(inside, axes, sizes)
        gathered = {axis for d in range(len(axes)) for axis in meshes.spec_axes(stored, d) if axis != own[d]}
        left = [axis for axis in BATCH_AXES if axis not in (*gathered, *own)]
        size, others = math.prod(sizes[axis] for axis in gathered), math.prod(sizes[axis] for axis in left)
        gathers, scatters = {"embed": (1, 1), "head": (1, 2)}.get(path, (2, 1))
        sent["all-gather"] += gathers * (1 - 1 / size) * whole
        sent["reduce-scatter"] += scatters * (1 - 1 / size) * whole
        sent["all-reduce"] += 2 * (1 - 1 / others) * whole / size
    width, K, L = config.hidden_size * jnp.dtype(config.dtype).itemsize, 4 * config.experts_per_token, config.num_layers
    others = (sizes[EXPERT] - 1) * tokens * L
    # Tokens, indices, gates; backward tokens and gates again, and gradients of outputs.
    sent["all-gather"] += others * (3 * width + 3 * K)
    sent["reduce-scatter"] += others * (2 * width + K)  # outputs; gradients of tokens and gates
    share = 2 * (1 - 1 / sizes[TENSOR]) * tokens
    sent["all-reduce"] += share * (4 * width + K) * L  # two outputs, two inputs' gradients, gates'
    sent["all-reduce"] += share * (2 * width + 12)  # embedding, gradient of hidden states; maximum, sum, target
    return sent


def chosen_mesh(
    parallel: ParallelConfig, config: ModelConfig, rows: Sequence[int], length: int, devices: int
) -> ParallelConfig:
    """`parallel` with all sizes of its mesh. Where it leaves "expert" open: that of the sizes which divide the experts
    with which devices send each other the least in a step of batches of so many `rows` of `length` tokens.
    """
    free = devices // parallel.tensor // (parallel.data or 1)

    def sizes(expert: int) -> dict[str, int]:
        return {DATA: parallel.data or free // expert, EXPERT: expert, TENSOR: parallel.tensor}

    def cost(expert: int) -> float:
        shards = sizes(expert)[DATA] * expert
        tokens = sum(-(-count // shards) for count in rows) * length
        return sum(sent_bytes(config, sizes(expert), tokens).values())

    dividing = [n for n in range(1, free + 1) if free % n == 0 and config.num_experts % n == 0]
    expert = parallel.expert or (free if parallel.data else min(dividing, key=cost, default=1))
    return dataclasses.replace(parallel, **sizes(max(1, expert)))


def expert_rows(spec: ArraySpec, number: int) -> ArraySpec:
    """Declaration of `number` experts a layer apart from the others. No "experts": every device gets those of all."""
    shape, axes = (spec.shape[0], number, *spec.shape[2:]), (spec.axes[0], "rows", *spec.axes[2:])
    return dataclasses.replace(spec, shape=shape, axes=axes)


def param_specs(config: ModelConfig, mesh: Mesh) -> dict[str, P]:
    """How every parameter is stored on `mesh`, by path."""
    return {path: meshes.storage_spec(spec.shape, spec.axes, mesh.shape) for path, spec in flat_specs(config).items()}


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """`param_specs` with the mesh."""
    return {path: NamedSharding(mesh, spec) for path, spec in param_specs(config, mesh).items()}


def placed_params(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Parameters stored on `mesh`; those that are there already are not copied."""
    return unflatten(place(flatten(params), mesh, param_specs(config, mesh)))


def decoding_specs(config: ModelConfig, mesh: Mesh) -> dict[str, P]:
    """How every parameter lies while many tokens are written, by path: gathered (`split_spec`), the smallest first, as
    far as there is room on a device, so that they are not sent for every token; else as it is stored.
    """
    declared, stored, room = flat_specs(config), param_specs(config, mesh), _ROOM
    found = dict(stored)
    for path in sorted(declared, key=lambda path: math.prod(declared[path].shape)):
        split = meshes.split_spec(stored[path], declared[path].axes)
        devices = math.prod(mesh.shape[axis] for axis in split if axis)
        size = math.prod(declared[path].shape) * jnp.dtype(declared[path].dtype).itemsize // devices
        if split != stored[path] and size <= room:
            found[path], room = split, room - size
    return found


def decoding_params(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Parameters that lie on `mesh` by `decoding_specs`."""
    stored, flat = param_specs(config, mesh), flatten(placed_params(params, config, mesh))
    specs = {path: spec for path, spec in decoding_specs(config, mesh).items() if spec != stored[path]}
    found = _gather(tuple(NamedSharding(mesh, spec) for spec in specs.values()))([flat[path] for path in specs])
    return unflatten(flat | dict(zip(specs, found, strict=True)))


@functools.lru_cache(maxsize=32)
def _gather(shardings: tuple[NamedSharding, ...]) -> Callable:
    return jax.jit(lambda arrays: arrays, out_shardings=list(shardings))


def assembled(tree: Any, config: ModelConfig, prefix: str = "") -> Any:
    """Nested parameters, or those of one layer, below the path `prefix`, as a device computes with them (`assemble`).
    Beside experts of which some are the rows of a `Delta`, "trained" bool [E] says which: the others need no gradient.
    """
    declared, result = flat_specs(config), {}
    for path, leaf in flatten(tree).items():
        spec = declared[prefix + path]

        def whole(array, spec, first=int(spec.axes[0] == "layers")):
            return meshes.assemble(array, spec.shape[first:], spec.axes[first:])

        if not isinstance(leaf, Delta):
            result[path] = whole(leaf, spec)
        elif leaf.index is None:
            a, b = low_rank(spec, leaf.a.shape[-1])
            result[path] = merged(whole(leaf.array, spec), whole(leaf.a, a), whole(leaf.b, b))
        else:
            rows, array = whole(leaf.rows, expert_rows(spec, leaf.index.shape[-1])), whole(leaf.array, spec)
            here = array.shape[0]
            start = jax.lax.axis_index(EXPERT) * here if axis_sizes().get(EXPERT, 1) > 1 else 0
            result[path] = put_rows(array, rows, leaf.index, first=start)
            expert = start + jnp.arange(here, dtype=jnp.int32)
            result[f"{path.rpartition('/')[0]}/trained"] = jnp.any(leaf.index[:, None] == expert[None], axis=0)
    return unflatten(result)


def as_they_lie(tree: Any, config: ModelConfig, prefix: str) -> dict[str, jax.Array]:
    """The parameters below `prefix`, of all layers, by path; none unless a device computes with them as they lie."""
    flat = flatten(tree)
    declared = {path: flat_specs(config)[prefix + path] for path in flat}
    own = {path: tuple(map(meshes.share, spec.shape, spec.axes)) for path, spec in declared.items()}
    return flat if all(isinstance(leaf, jax.Array) and leaf.shape == own[path] for path, leaf in flat.items()) else {}


def put_rows(array: jax.Array, rows: jax.Array, index: jax.Array, *, first: jax.Array | int = 0) -> jax.Array:
    """Experts from `first` on [E,...] with `rows` [N,...] in the places of those of `index` i32 [N] that are here."""
    here = array.shape[0]
    own = (index >= first) & (index < first + here)
    return array.at[jnp.where(own, index - first, here)].set(rows, mode="drop")


def rematerialized(layer: Callable, policy: str, params: Any, config: ModelConfig, prefix: str) -> Callable:
    """`layer(x, (params, ...))` of a stack of layers below `prefix`, with what its backward pass computes again.

    "none": nothing, except that weights in pieces (cut by a mesh, or a `Delta`) are put together again; "dots":
    everything but matrix products without batch dimensions; "layer": everything, from its input on.
    """
    if policy == "layer":
        return jax.checkpoint(layer)
    deltas = {path: leaf for path, leaf in flatten(params).items() if isinstance(leaf, Delta)}
    if policy == "none" and not deltas and all(size == 1 for size in axis_sizes().values()):
        return layer
    merging = set()  # shapes of what is multiplied, and of what is added, where factors of one layer are merged
    for path, leaf in deltas.items():
        if leaf.index is None:
            spec = flat_specs(config)[prefix + path]
            specs, stacked = (*low_rank(spec, leaf.a.shape[-1]), spec), spec.sides[0] - 1
            a, b, array = (tuple(map(meshes.share, s.shape[1:], s.axes[1:])) for s in specs)
            left = (*a[:stacked], math.prod(a[stacked:-1]), a[-1])
            right = (*b[: stacked + 1], math.prod(b[stacked + 1 :]))
            merging |= {(left, right), (array, array)}

    def keep(primitive, *operands, **settings) -> bool:
        if tuple(x.shape for x in operands) in merging:
            return False
        if policy == "none":
            return primitive.name not in _MOVES
        return bool(jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **settings))

    return jax.checkpoint(layer, policy=keep)


def on_mesh(fn: Callable, config: ModelConfig, mesh: Mesh, *, out_specs: Any) -> Callable:
    """`fn(params, *arrays)` run on every device with its part of the parameters and its rows of the arrays.

    `fn` sums over devices itself: `jax.lax.psum(value, BATCH_AXES)`. `out_specs` is P() for outputs that are equal on
    all devices, P(BATCH_AXES) for per-row ones, or a pytree of both. `params` may be a tuple: of several models.
    """

    def call(params, *arrays):
        specs = unflatten(param_specs(config, mesh))
        specs = tuple(specs for _ in params) if isinstance(params, tuple) else specs
        in_specs = (specs, *(P(BATCH_AXES) for _ in arrays))
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, *arrays)

    return call


def pad(
    rows: Sequence[Any], *, fill: float = 0, width: int | None = None, count: int | None = None, dtype: Any = np.int32
) -> np.ndarray:
    """Rows of any length as one array [N, W], filled up at the end; W and N are `width` and `count` where given."""
    width = max(map(len, rows), default=0) if width is None else width
    padded = np.full((len(rows) if count is None else count, width), fill, dtype)
    for row, values in zip(padded, rows, strict=False):
        row[: len(values)] = values
    return padded


def map_batches(
    fn: Callable,
    params: Any,
    config: ModelConfig,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    mesh: Mesh | None = None,
    out_specs: Any = _PER_ROW,
    static: tuple = (),
) -> Iterator[Any]:
    """`fn(params, config, *arrays, *static)` on the host for every batch of arrays [B, ...], in order.

    The next batch is already running when one is handed out. Smaller batches, and those that the devices can't share
    evenly, are filled up with rows of zeros to the largest size before: outputs per row may be longer than the batch.
    `fn`, a function of a module, is compiled once for it and for the hashable `static`; with a mesh as in `on_mesh`.
    """
    run = compiled(fn, config, mesh, out_specs, static)
    if mesh is not None:
        placed = functools.partial(placed_params, config=config, mesh=mesh)
        params = tuple(map(placed, params)) if isinstance(params, tuple) else placed(params)
    shards, size, waiting = 1 if mesh is None else meshes.row_shards(mesh), 0, []
    for arrays in batches:
        size = max(size, -(-len(arrays[0]) // shards) * shards)
        arrays = tuple(np.pad(x, ((0, size - len(x)), *[(0, 0)] * (np.ndim(x) - 1))) for x in map(np.asarray, arrays))
        waiting.append(run(params, *(arrays if mesh is None else place(arrays, mesh, _PER_ROW))))
        if len(waiting) > 1:
            yield meshes.to_host(waiting.pop(0))
    if waiting:
        yield meshes.to_host(waiting.pop())


@functools.lru_cache(maxsize=32)
def compiled(fn: Callable, config: ModelConfig, mesh: Mesh | None, out_specs: Any, static: tuple = ()) -> Any:
    """The compiled `fn` of `map_batches`: (parameters, *arrays) -> outputs."""

    def run(params, *arrays):
        return fn(params, config, *arrays, *static)

    return jax.jit(run if mesh is None else on_mesh(run, config, mesh, out_specs=out_specs))
