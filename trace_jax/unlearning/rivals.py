"""Rivals that hold routers: the numerics of GRIP and SEUF.

GRIP: routers that unlearning can't use as a way out. Zhu, Wei, Gu, Li, arXiv 2601.16905.

Unlearning may send forget text away from the experts that know it instead of changing them, and retain text with it.
GRIP goes around any loss and constrains the routers alone. A layer scores expert j by its row theta_j [D] of the router
on an input x; u_j is the row's change since the original model, and retain inputs x_i of that model are protected.

A, while training, after every optimizer step (`keep_routers`):
  1. An input that chose j keeps its score of j: u_j loses its part in the span of these inputs, u_j - U_j U_j' u_j,
     with U_j their left singular vectors of squared singular value above `null`.
  2. An input that did not choose j still does not: u_j . x_i <= tau_i - margin, where tau_i is the lowest score that
     was chosen minus that of j. Randomised Kaczmarz projections inside the null space of (1) see to it.
  Together every protected input keeps its experts and their scores, and so their weights where these are normalised.
B, after training, layer by layer in the order of the network (`realigned`): earlier layers have changed what a router
  reads from X to X~, and Theta_new = Theta X X~' (X~ X~' + lambda I)^-1 gives it the old scores on the new inputs.

The bounds are read so that no update at all always satisfies them: where the original model itself has less than the
margin, tau_i < margin, the bound is 0 (j may come no closer), and an input in the span of those that chose j has none
(its score can't move). A router's bias that trains is one more row of it, which reads an input of 1.

SEUF (2411.18797): unlearn in a few experts that forget tokens are routed to, and hold the routers to choosing them. The
experts of highest affinity and the routers of their layers train (preset "seuf" of `trainable`); the anchor loss keeps
forget tokens on them, so that the forget loss doesn't fall by routing elsewhere.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.parallel.mesh import AXES, as_varying
from trace_jax.unlearning.config import GripProject

ROUTER, BIAS, CORRECTION = "layers/router", "layers/router_bias", "layers/router_correction"
TOLERANCE = 1e-4  # a bound on a score that is missed by less is met
LEAST_COSINE = 0.95  # of a layer's scores before and after, for its realignment to be kept


@struct.dataclass
class Protection:
    """What the routers of L layers must keep. W is D, or D + 1 where the router's bias trains.

    The basis is what takes memory: 4 L E W R bytes in float32, R the largest number of directions that any expert
    must keep, at most min(W, n). With n inputs of which a share K/E chose each expert, and twice that the busiest one,
    it is about 8 n K L W bytes (n 1024, K 8, L 48, W 2048: 6 GiB), split over the devices as far as they divide E.
    """

    inputs: Any  # [L, n, W] protected inputs, in the model's type
    basis: Any  # f32 [L, E, W, R] orthonormal columns that span the inputs that chose the expert, then zeros
    bound: Any  # f32 [L, E, n] largest rise of each score; inf where none is needed
    sweeps: Any  # i32 [] most Kaczmarz sweeps, of n projections each, for each expert in a step
    seed: Any  # i32 [] of the order of projections


# --- A. what is kept, computed once, on the host in float64


def protect(
    inputs: np.ndarray, scores: np.ndarray, indices: np.ndarray, config: ModelConfig, grip: GripProject, *,
    correction: np.ndarray | None = None, seed: int,
) -> Protection:  # fmt: skip
    """The protection of retain inputs of the original model, as numpy arrays.

    Args:
      inputs: [L, n, W], what each router read (and a last 1 where its bias trains). scores: f32 [L, n, E], its logits.
        indices: i32 [L, n, K], what it chose.
      correction: f32 [L, E], added to scores for choosing, where the model has it. It must pass `check_router`.
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


def check_router(config: ModelConfig, training: Collection[str]) -> None:
    """Raises a ConfigError where there is nothing to project, or margins don't tell which experts are chosen.

    training: paths of what trains.
    """
    if ROUTER not in training:
        raise ConfigError(
            "grip is 'project', but trainable leaves the routers as they are, so there is nothing to project; use grip "
            "'realign' (experts that change also change what later routers read), or let routers train."
        )
    why = ""
    if config.num_groups > 1:
        why = f"chooses among {config.num_groups} groups of experts first (num_groups)"
    elif config.router_score == "softmax" and config.router_correction:
        why = "adds a correction to probabilities, which depend on the scores of all experts (router_correction)"
    if why:
        raise ConfigError(
            f"grip is 'project', but this model {why}; margins of single scores would not keep its choices. Use "
            "grip 'realign', or freeze the routers."
        )


def headroom(
    scores: np.ndarray, indices: np.ndarray, config: ModelConfig, correction: np.ndarray | None = None
) -> np.ndarray:
    """f64 [n, E]: by how much each score may rise until its expert draws level with the last chosen one, tau.

    Infinite where no score is high enough. With a correction, what compares is scores (or their sigmoids) plus it.
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
    if len(inputs) >= inputs.shape[1]:
        squares, vectors = np.linalg.eigh(inputs.T @ inputs)
        return vectors[:, squares > null]
    squares, vectors = np.linalg.eigh(inputs @ inputs.T)  # the smaller of the two
    large = squares > null
    return inputs.T @ (vectors[:, large] / np.sqrt(squares[large]))


def joined(flat: Mapping[str, Any], bias: bool) -> Any:
    """[L, W, E]: routers of flat parameters; with `bias` their biases are one more row."""
    return jnp.concatenate([flat[ROUTER], flat[BIAS][:, None]], axis=1) if bias else flat[ROUTER]


def parted(routers: Any, bias: bool) -> dict[str, Any]:
    """The inverse of `joined`."""
    return {ROUTER: routers[:, :-1], BIAS: routers[:, -1]} if bias else {ROUTER: routers}


# --- A. after a step, on the devices in float32


def protection_specs(num_experts: int, mesh: Mesh) -> Protection:
    """How a `Protection` lies on the mesh: experts split over the axes that divide them."""
    of_experts = P(None, _expert_axes(num_experts, mesh))
    return Protection(P(), of_experts, of_experts, P(), P())


def _expert_axes(num_experts: int, mesh: Mesh) -> tuple[str, ...]:
    axes, devices = (), 1
    for name in AXES:
        if num_experts % (devices * mesh.shape[name]) == 0:
            axes, devices = (*axes, name), devices * mesh.shape[name]
    return axes


@functools.partial(jax.jit, static_argnames="mesh")
def keep_routers(
    arrays: Mapping[str, jax.Array], original: Mapping[str, jax.Array], protection: Protection, step, *, mesh: Mesh
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(flat parameters with routers nearby that keep what is protected, by how much a bound is still missed f32 []).

    Every device of the mesh constrains its share of the experts, one layer after the other: beside one layer's inputs
    in float32 and [E, n] scores of it nothing is held. Deterministic given the protection's seed and `step` i32 [].
    """
    bias, num_experts = protection.inputs.shape[-1] > original[ROUTER].shape[1], original[ROUTER].shape[2]
    axes = _expert_axes(num_experts, mesh)
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

    in_specs = (of_experts, of_experts, protection_specs(num_experts, mesh), P())
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

    Args:
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


# --- B. after training, on the host in float64


class Moments(NamedTuple):
    """Sums over retain tokens of products of a router's inputs, f64 [W, W]: X X', X X~' and X~ X~'."""

    original: np.ndarray
    cross: np.ndarray
    current: np.ndarray


def realigned(router: np.ndarray, moments: Moments, ridge: float) -> np.ndarray:
    """f64 [W, E]: the router that scores the current inputs as `router` [W, E] scored the original ones.

    The ridge is relative to the mean diagonal of X~ X~', so that it means the same at any number of tokens and any
    scale of inputs.
    """
    size = len(moments.current)
    penalty = ridge * np.trace(moments.current) / size * np.eye(size)
    return scipy.linalg.solve(moments.current + penalty, moments.cross.T @ router, assume_a="pos")


def cosine(router: np.ndarray, other: np.ndarray, moments: Moments) -> float:
    """Of all scores of the original inputs by `router` with those of the current inputs by `other`, both [W, E]."""
    product = np.sum(router * (moments.cross @ other))
    squares = np.sum(router * (moments.original @ router)) * np.sum(other * (moments.current @ other))
    return float(product / np.sqrt(squares)) if squares > 0 else 0.0


# --- SEUF


def anchor_loss(
    probabilities: jax.Array, indices: jax.Array, index: jax.Array, valid: jax.Array, *, form: str
) -> jax.Array:
    """f32 [], the sum over valid tokens and over the layers that have a target expert.

    - "sum", the paper's equation 3: |g - a|^2 summed over experts; g is the router's probability of the chosen experts
      and 0 for the others, a is 1 for target experts and 0 for the others.
    - "mean", its released code: the mean over experts of (s - a)^2, s the probability of all experts, chosen or not.

    Args:
      probabilities: f32 [L, B, S, E], of the router, not renormalised over the chosen experts.
      indices: i32 [L, B, S, K], the chosen experts. index: i32 [L, N], the target experts; E stands for none.
      valid: bool [B, S].
    """
    num_experts = probabilities.shape[-1]
    target = jax.nn.one_hot(index, num_experts, dtype=bool).any(axis=1)
    if form == "sum":
        chosen = jax.nn.one_hot(indices, num_experts, dtype=bool).any(axis=-2)
        probabilities = jnp.where(chosen, probabilities, 0.0)
    error = jnp.square(probabilities - target.astype(jnp.float32)[:, None, None, :])
    of_layer = error.mean(-1) if form == "mean" else error.sum(-1)
    return jnp.where(valid[None] & target.any(axis=-1)[:, None, None], of_layer, 0.0).sum()
