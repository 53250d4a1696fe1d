"""GRIP: routers that unlearning can't use as a way out. Zhu, Wei, Gu, Li, arXiv 2601.16905.

Unlearning may send forget text away from the experts that know it instead of changing them, and retain text with it.
GRIP goes around any loss and constrains the routers alone. A layer scores expert j by its row theta_j [D] of the router
on an input x; u_j is the row's change since the original model, and retain inputs x_i of that model are protected.

A, while training, after every optimizer step (`keep_routers`):
  1. An input that chose j keeps its score of j: u_j loses its part in the span of these inputs, u_j - U_j U_j' u_j,
     with U_j their left singular vectors of squared singular value above `null`.
  2. An input that did not choose j still does not: u_j . x_i <= tau_i - margin, where tau_i is the lowest score that
     was chosen minus that of j. Randomised Kaczmarz projections inside the null space of (1) see to it.
  Together every protected input keeps its experts and their scores, and so their weights where these are normalised.
B, after training, layer by layer in the order of the network (`realign`): earlier layers have changed what a router
  reads from X to X~, and Theta_new = Theta X X~' (X~ X~' + lambda I)^-1 gives it the old scores on the new inputs.

The bounds are read so that no update at all always satisfies them: where the original model itself has less than the
margin, tau_i < margin, the bound is 0 (j may come no closer), and an input in the span of those that chose j has none
(its score can't move). A router's bias that trains is one more row of it, which reads an input of 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.io.progress import say
from trace_jax.models.architecture import ModelConfig, flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.models.sharding import map_batches, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, as_varying, dividing_axes, place, row_shards, spec_axes, to_host
from trace_jax.routing.statistics import map_model
from trace_jax.unlearning.config import GripProject, GripRealign, UnlearningConfig
from trace_jax.unlearning.trainable import trainable_paths

ROUTER, BIAS, CORRECTION = "layers/router", "layers/router_bias", "layers/router_correction"
TOLERANCE = 1e-4  # a bound on a score that is missed by less is met
LEAST_COSINE = 0.95  # of a layer's scores before and after, for its realignment to be kept


@struct.dataclass
class Protection:
    """What the routers of L layers must keep. W is D, or D + 1 where the router's bias trains.

    The basis takes 4 L E W R bytes, with R <= min(W, n) the most directions that an expert must keep: about 8 n K L W
    where the busiest one is chosen twice as often as the mean (n 1024, K 8, L 48, W 2048: 6 GiB), split over devices.
    """

    inputs: Any  # [L, n, W] protected inputs, in the model's type
    basis: Any  # f32 [L, E, W, R] orthonormal columns that span the inputs that chose the expert, then zeros
    bound: Any  # f32 [L, E, n] largest rise of each score; inf where none is needed
    sweeps: Any  # i32 [] most Kaczmarz sweeps, of n projections each, for each expert in a step
    seed: Any  # i32 [] of the order of projections


def grip_hooks(
    original: Model, retain: Rows | None, config: UnlearningConfig, *, seed: int, mesh: Mesh
) -> tuple[Protection | None, Callable[[Model], tuple[Model, list[dict] | None]]]:
    """(What holds routers after every step, or None; a function of the model that a run ends with, which gives the
    model that comes of it, and rows about what was protected, or realigned, in each layer). `original`: before the run.
    """
    grip = config.grip
    if retain is not None and isinstance(grip, GripRealign):
        return None, lambda model: realign(original, model, retain, grip, mesh=mesh)
    if retain is None or not isinstance(grip, GripProject):
        return None, lambda model: (model, None)
    bias = BIAS in trainable_paths(original.config, config.trainable)
    protection, table = retain_protection(original, retain, grip, bias=bias, seed=seed, mesh=mesh)

    def finish(model: Model) -> tuple[Model, list[dict] | None]:
        if not config.objective.task_scale:
            return model, table
        # The margins held for what was learnt; now they must for what that was subtracted from.
        flat = flatten(model.params)
        routers = {path: flat[path] for path in (ROUTER, BIAS) if path in flat}
        held, _ = keep_routers(routers, flatten(original.params), protection, place(np.int32(0), mesh), mesh=mesh)
        return model.replace(params=unflatten({**flat, **held})), table

    return protection, finish


# --- what routers read of retain text


def spread_tokens(rows: Rows, most: int) -> Rows:
    """Rows in which at most `most` valid tokens are left valid, evenly spread over all; those without any are gone."""
    places = np.flatnonzero(rows.valid)
    number = min(most, len(places))
    valid = np.zeros(rows.valid.shape, bool)
    valid.flat[places[np.arange(number) * len(places) // number]] = True
    return dataclasses.replace(rows, valid=valid).take(np.flatnonzero(valid.any(axis=1)))


def read_routers(model: Model, rows: Rows, *, mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs [L, n, D], scores f32 [L, n, E], choices i32 [L, n, K]) of routers at the n valid tokens of `rows`."""
    most, pieces = int(rows.valid.sum(axis=1).max()), []
    for batch, outputs in map_model(_read, model, sequential_batches(rows, row_shards(mesh)), mesh, static=(most,)):
        pieces += [[x[row, :, : valid.sum()] for x in outputs] for row, valid in enumerate(np.asarray(batch.valid))]
    inputs, scores, indices = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    if not np.isfinite(scores).all():
        raise ValueError("a router gave NaN or infinite scores for retain text; the model is damaged.")
    return inputs, scores, indices


def _read(params, config: ModelConfig, tokens: jax.Array, segments: jax.Array, chosen: jax.Array, most: int):
    """Inputs, scores and choices [B, L, most, ...] at the first `most` chosen positions of each row."""
    collect = ("router_inputs", "router_logits", "indices")
    router = forward(params, config, tokens, mask=segments, collect=collect).router
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]

    def pick(x):
        return jnp.take_along_axis(x, order[None, :, :, None], axis=2).swapaxes(0, 1)

    return pick(router.inputs), pick(router.logits), pick(router.indices)


def joined(flat: Mapping[str, Any], bias: bool) -> Any:
    """[L, W, E]: routers of flat parameters; with `bias` their biases are one more row."""
    return jnp.concatenate([flat[ROUTER], flat[BIAS][:, None]], axis=1) if bias else flat[ROUTER]


def parted(routers: Any, bias: bool) -> dict[str, Any]:
    """The inverse of `joined`."""
    return {ROUTER: routers[:, :-1], BIAS: routers[:, -1]} if bias else {ROUTER: routers}


# --- A. what is kept, computed once, on the host in float64


def check_router(config: ModelConfig, training: Collection[str]) -> None:
    """Raises a ConfigError if no router is at the paths `training`, or margins don't tell which experts are chosen."""
    if ROUTER not in training:
        raise ConfigError(
            "grip is 'project', but trainable leaves the routers as they are, so there is nothing to project; use grip "
            "'realign' (experts that change also change what later routers read), or let routers train."
        )
    if config.num_groups > 1:
        why = f"chooses among {config.num_groups} groups of experts first (num_groups)"
    elif config.router_score == "softmax" and config.router_correction:
        why = "adds a correction to probabilities, which depend on the scores of all experts (router_correction)"
    else:
        return
    raise ConfigError(
        f"grip is 'project', but this model {why}; margins of single scores would not keep its choices. Use "
        "grip 'realign', or freeze the routers."
    )


def retain_protection(
    model: Model, retain: Rows, grip: GripProject, *, bias: bool, seed: int, mesh: Mesh
) -> tuple[Protection, list[dict]]:
    """(the protection of the original model's routers on retain text, on the mesh; one row per layer about it: its
    number in the network, from 0, how many tokens are protected, and the share `free` of directions in which an
    expert's row of the router may still move, mean over experts). bias: the routers' bias trains as well.
    """
    inputs, scores, indices = read_routers(model, spread_tokens(retain, grip.tokens), mesh=mesh)
    reads = np.pad(inputs, ((0, 0), (0, 0), (0, int(bias))), constant_values=1)
    correction = to_host(flatten(model.params).get(CORRECTION))
    protection = protect(reads, scores, indices, model.config, grip, correction=correction, seed=seed)
    free = 1 - (protection.basis.any(axis=2).sum(axis=2) / protection.basis.shape[2]).mean(axis=1)  # [L]
    say(
        f"GRIP: {inputs.shape[1]} retain tokens leave the routers {free.mean():.1%} of their directions"
        + ("" if free.any() else "; they are frozen. Lower grip.tokens to let them move.")
    )
    layers = zip(model.config.moe_layers, free.tolist(), strict=True)
    table = [{"layer": layer, "tokens": inputs.shape[1], "free": of_layer} for layer, of_layer in layers]
    return place(protection, mesh, protection_specs(model.config.num_experts, mesh)), table


def protect(
    inputs: np.ndarray, scores: np.ndarray, indices: np.ndarray, config: ModelConfig, grip: GripProject, *,
    correction: np.ndarray | None = None, seed: int,
) -> Protection:  # fmt: skip
    """Protection, in numpy, of what the original model's routers read of retain text, [L, n, W] (with a last 1 where
    the bias trains), scored, f32 [L, n, E], and chose, i32 [L, n, K], with the correction f32 [L, E] if there is one.
    """
    bases, bounds = [], []
    for layer, x in enumerate(inputs.astype(np.float64)):
        of_layer = None if correction is None else correction[layer].astype(np.float64)
        room = headroom(scores[layer].astype(np.float64), indices[layer], config, of_layer)
        chose = np.zeros(room.shape, bool)
        np.put_along_axis(chose, indices[layer], True, axis=1)
        basis = [span(x[which], grip.null) for which in chose.T]
        free = np.stack([np.sum(x**2, axis=1) - np.sum((x @ spanned) ** 2, axis=1) for spanned in basis], axis=1)
        bases.append(basis)
        bounds.append(np.where(chose | (free <= grip.null), np.inf, np.maximum(room - grip.margin, 0.0)).T)
    rank = max(1, *(spanned.shape[1] for basis in bases for spanned in basis))
    padded = [[np.pad(x, ((0, 0), (0, rank - x.shape[1]))) for x in basis] for basis in bases]
    basis, bound = np.asarray(padded, np.float32), np.asarray(bounds, np.float32)
    return Protection(inputs, basis, bound, np.int32(grip.sweeps), np.int32(seed))


def headroom(scores: np.ndarray, indices: np.ndarray, config: ModelConfig, correction: np.ndarray | None) -> np.ndarray:
    """f64 [n, E]: by how much each score may rise until its expert draws level with the last chosen one, tau; infinite
    where no score is high enough. A correction is added to scores (or their sigmoids) before.
    """
    corrected, offset = correction is not None, 0.0 if correction is None else correction[None]
    sigmoids = corrected and config.router_score == "sigmoid"
    compared = (1 / (1 + np.exp(-scores)) if sigmoids else scores) + offset
    level = np.take_along_axis(compared, indices, axis=1).min(axis=1, keepdims=True) - offset
    if sigmoids:
        inside = np.clip(level, 1e-300, 1 - 1e-16)
        level = np.where(level < 1, np.log(inside) - np.log1p(-inside), np.inf)
    return level - scores


def span(inputs: np.ndarray, null: float) -> np.ndarray:
    """f64 [W, r]: left singular vectors of inputs' [m, W] with squared singular value above `null`."""
    wide = len(inputs) < inputs.shape[1]
    squares, vectors = np.linalg.eigh(inputs @ inputs.T if wide else inputs.T @ inputs)  # the smaller of the two
    squares, vectors = squares[squares > null], vectors[:, squares > null]
    return inputs.T @ (vectors / np.sqrt(squares)) if wide else vectors


# --- A. after a step, on the devices in float32


def protection_specs(num_experts: int, mesh: Mesh) -> Protection:
    """How a `Protection` lies on the mesh: experts split over the axes that divide them."""
    axes = dividing_axes(num_experts, mesh)
    return Protection(P(), P(None, axes), P(None, axes), P(), P())


@functools.partial(jax.jit, static_argnames="mesh")
def keep_routers(
    arrays: Mapping[str, jax.Array], original: Mapping[str, jax.Array], protection: Protection, step, *, mesh: Mesh
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(flat parameters with routers nearby that keep what is protected, by how much a bound is still missed f32 []).
    Each device constrains its share of the experts, layer by layer: beside one layer's inputs in float32 and scores
    [E, n] of it nothing is held. Deterministic given the protection's seed and `step` i32 [].
    """
    bias, num_experts = protection.inputs.shape[-1] > original[ROUTER].shape[1], original[ROUTER].shape[2]
    specs = protection_specs(num_experts, mesh)
    axes = spec_axes(specs.bound, 1)
    of_experts = P(None, None, axes)

    def constrain(router, original, protection, step):
        experts = router.shape[2]
        first = jax.lax.axis_index(axes) * experts if axes else 0
        key = jax.random.fold_in(jax.random.key(protection.seed), step)

        def layer(_, arrays):
            number, new, old, inputs, basis, bound = arrays
            of_layer = jax.random.fold_in(key, number)
            keys = jax.vmap(lambda e: jax.random.fold_in(of_layer, first + e))(jnp.arange(experts, dtype=jnp.int32))
            limit = protection.sweeps * inputs.shape[0]
            rows = jax.vmap(constrained_row, in_axes=(0, 0, 0, None, 0, None))
            change, missed = rows((new - old).T, basis, bound, inputs, as_varying(keys, frozenset(axes)), limit)
            return None, (old + change.T, jnp.max(missed))

        layers = jnp.arange(router.shape[0], dtype=jnp.int32)
        arrays = (layers, router, original, protection.inputs, protection.basis, protection.bound)
        routers, missed = jax.lax.scan(layer, None, arrays)[1]
        return routers, jax.lax.pmax(jnp.max(missed), axes) if axes else jnp.max(missed)

    in_specs = (of_experts, of_experts, specs, P())
    sharded = jax.shard_map(constrain, mesh=mesh, in_specs=in_specs, out_specs=(of_experts, P()))
    routers, missed = sharded(joined(arrays, bias), joined(original, bias), protection, step)
    return {**arrays, **parted(routers, bias)}, missed


def constrained_row(
    change: jax.Array, basis: jax.Array, bound: jax.Array, inputs: jax.Array, key: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(one expert's change [W] inside the constraints, by how much a bound is still missed f32 []).

    Randomised Kaczmarz for inequalities (Strohmer, Vershynin 2009; Leventhal, Lewis 2010): draw an input with
    probability proportional to |x|^2 and, where its bound is missed, move to the nearest change that meets it. Draws
    that would move nothing are passed over: inputs are drawn among those whose bound is missed, which is the same walk.
    basis: f32 [W, R]. bound: f32 [n]. inputs: [n, W]. limit: i32 [], most moves.
    """

    def inside(x):
        return x - basis @ (basis.T @ x)

    def unfinished(walk):
        _, missed, _, moves = walk
        return (jnp.max(missed) > TOLERANCE) & (moves < limit)

    def move(walk):
        change, missed, key, moves = walk
        key, draw = jax.random.split(key)
        drawn = jax.random.categorical(draw, jnp.where(missed > TOLERANCE, weight, -jnp.inf))
        x = inside(inputs[drawn])  # the change is inside, so its product with x is that with the input
        change = change - missed[drawn] / jnp.dot(x, x) * x
        return change, inputs @ change - bound, key, moves + 1

    with jax.default_matmul_precision("highest"):
        inputs = inputs.astype(jnp.float32)
        weight, change = jnp.log(jnp.sum(inputs**2, axis=1)), inside(change)
        moves = jnp.zeros_like(bound[0], jnp.int32)
        change, missed, _, _ = jax.lax.while_loop(unfinished, move, (change, inputs @ change - bound, key, moves))
    return change, jnp.maximum(jnp.max(missed), 0.0)


# --- B. after training, on the host in float64. Moments are sums over retain tokens of products of a router's inputs
# before and after training, f64 [W, W] each: X X', X X~' and X~ X~'.


def realign(
    original: Model, current: Model, retain: Rows, grip: GripRealign, *, mesh: Mesh
) -> tuple[Model, list[dict]]:
    """`current` with routers, and their biases, that score retain text as those of `original` do, and one row per layer
    about it: its number in the network, from 0, whether the correction was kept (`LEAST_COSINE`), and the cosines of
    the original's scores with those after and before it. From the first layer to the last, one pass of both models
    each: every router is realigned to inputs that corrected routers have made.
    """
    config, rows = original.config, spread_tokens(retain, grip.tokens)
    if rows.valid.sum() < config.hidden_size:
        raise ConfigError(
            f"grip 'realign' has {rows.valid.sum()} retain tokens for routers of {config.hidden_size} inputs, which do "
            f"not determine them; raise grip.tokens (it is {grip.tokens}) or give more retain text."
        )
    bias, flat = config.router_bias, flatten(current.params)
    theta, new = (to_host(joined(f, bias)).astype(np.float64) for f in (flatten(original.params), flat))

    def with_routers() -> Any:
        return placed_params(unflatten({**flat, **parted(new.astype(np.float32), bias)}), config, mesh)

    before, table = placed_params(original.params, config, mesh), []
    for layer, of_network in enumerate(config.moe_layers):
        batches = sequential_batches(rows, row_shards(mesh))
        arrays = ((b.tokens, b.segments, b.valid, np.full(len(b.tokens), layer, np.int32)) for b in batches)
        moments: Any = [0.0] * 3
        for sums in map_batches(_products, (before, with_routers()), config, arrays, mesh=mesh, out_specs=P()):
            moments = [a + b.astype(np.float64) for a, b in zip(moments, sums, strict=True)]
        solved = realigned(theta[layer], moments, grip.ridge)
        reached, now = (cosine(theta[layer], router, moments) for router in (solved, new[layer]))
        row = {"layer": of_network, "kept": reached >= LEAST_COSINE, "cosine": reached, "cosine_before": now}
        new[layer] = solved if row["kept"] else new[layer]
        table.append(row)
    return current.replace(params=with_routers()), table


def _products(params: tuple, config: ModelConfig, tokens, segments, valid, layer):
    """Sums f32 [W, W] over all rows of products of what the router of `layer` i32 [B] (0 in rows of padding) reads."""

    def inputs(params):
        out: Any = forward(params, config, tokens, mask=segments, collect=("router_inputs",))
        x = out.router.inputs[jnp.max(layer)].astype(jnp.float32)
        if config.router_bias:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
        return jnp.where(valid[..., None], x, 0.0)

    x, y = map(inputs, params)
    pairs, precision = ((x, x), (x, y), (y, y)), jax.lax.Precision.HIGHEST
    return jax.lax.psum([jnp.einsum("bsd,bse->de", *pair, precision=precision) for pair in pairs], BATCH_AXES)


def realigned(router: np.ndarray, moments: Sequence[np.ndarray], ridge: float) -> np.ndarray:
    """f64 [W, E]: the router that scores the current inputs as `router` [W, E] scored the original ones. The ridge is
    relative to the mean diagonal of X~ X~', so that it means the same for any number and scale of inputs.
    """
    _, cross, current = moments
    penalty = ridge * np.trace(current) / len(current) * np.eye(len(current))
    return scipy.linalg.solve(current + penalty, cross.T @ router, assume_a="pos")


def cosine(router: np.ndarray, other: np.ndarray, moments: Sequence[np.ndarray]) -> float:
    """Of all scores of the original inputs by `router` with those of the current inputs by `other`, both [W, E]."""
    original, cross, current = moments
    squares = np.sum(router * (original @ router)) * np.sum(other * (current @ other))
    return float(np.sum(router * (cross @ other)) / np.sqrt(squares)) if squares > 0 else 0.0


def with_realigned(trained: list[dict], table: list[dict]) -> list[dict]:
    """`trainable_table` rows in which realigned routers count as trained: they are kept and exported like these."""
    share = sum(row["kept"] for row in table) / len(table)
    changed = {row["path"]: round(row["parameters"] * share) for row in trained if row["path"] in (ROUTER, BIAS)}
    return [row | {"trained": max(row["trained"], changed.get(row["path"], 0))} for row in trained]
