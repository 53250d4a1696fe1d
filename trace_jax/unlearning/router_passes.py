"""GRIP around a run: what routers read of retain text, and how that has moved (`trace_jax.unlearning.rivals`)."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.io.progress import say
from trace_jax.models.architecture import ModelConfig, flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.models.sharding import map_batches, placed_params
from trace_jax.parallel.mesh import BATCH_AXES, place, row_shards, to_host
from trace_jax.unlearning import rivals
from trace_jax.unlearning.config import GripProject, GripRealign, UnlearningConfig
from trace_jax.unlearning.rivals import BIAS, CORRECTION, ROUTER, Moments, Protection

Finish = Callable[[Model], tuple[Model, list[dict] | None]]


def grip_hooks(
    original: Model, retain: Rows | None, config: UnlearningConfig, paths: Collection[str], *, seed: int, mesh: Mesh
) -> tuple[Protection | None, Finish]:
    """What GRIP, as the settings ask for it, does around a run in which the parameters at `paths` train.

    original: the model before unlearning, on the mesh.

    Returns:
      (what holds routers after every step, or None; a function of the model that a run ends with, which gives the
      model that comes of it and rows about what was protected, or realigned, in each layer).
    """
    grip = config.grip
    if not isinstance(grip, (GripProject, GripRealign)):
        return None, lambda model: (model, None)
    assert retain is not None
    if isinstance(grip, GripRealign):
        return None, lambda model: realign(original, model, retain, grip, mesh=mesh)
    protection, table = retain_protection(original, retain, grip, bias=BIAS in paths, seed=seed, mesh=mesh)

    def finish(model: Model) -> tuple[Model, list[dict] | None]:
        if not config.objective.subtracts_update:
            return model, table
        # The margins held for what was learnt; now they must for what that was subtracted from.
        before, flat = flatten(original.params), flatten(model.params)
        routers = {path: flat[path] for path in (ROUTER, BIAS) if path in flat}
        held, _ = rivals.keep_routers(routers, before, protection, place(np.int32(0), mesh), mesh=mesh)
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
    batches = list(sequential_batches(rows, row_shards(mesh)))
    arrays = ((batch.tokens, batch.segments, batch.valid) for batch in batches)
    most, pieces = int(rows.valid.sum(axis=1).max()), []
    passes = map_batches(_read, model.params, model.config, arrays, mesh=mesh, static=(most,))
    for batch, outputs in zip(batches, passes, strict=True):
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


def retain_protection(
    model: Model, retain: Rows, grip: GripProject, *, bias: bool, seed: int, mesh: Mesh
) -> tuple[Protection, list[dict]]:
    """(the protection of the original model's routers on retain text, on the mesh; one row per layer about it).

    Args:
      bias: the routers' bias trains as well.
    Returns:
      rows of {layer (of the network, from 0), tokens, free}: how many tokens are protected, and the share of its
      directions in which an expert's router row may still move, mean over experts. Where nothing is free, the routers
      are frozen: fewer tokens (`grip.tokens`) leave room.
    """
    inputs, scores, indices = read_routers(model, spread_tokens(retain, grip.tokens), mesh=mesh)
    correction = to_host(flatten(model.params).get(CORRECTION))
    reads = np.pad(inputs, ((0, 0), (0, 0), (0, int(bias))), constant_values=1)
    protection = rivals.protect(reads, scores, indices, model.config, grip, correction=correction, seed=seed)
    free = 1 - (protection.basis.any(axis=2).sum(axis=2) / protection.basis.shape[2]).mean(axis=1)  # [L]
    layers = zip(model.config.moe_layers, free.tolist(), strict=True)
    say(
        f"GRIP: {inputs.shape[1]} retain tokens leave the routers {free.mean():.1%} of their directions"
        + ("" if free.any() else "; they are frozen. Lower grip.tokens to let them move.")
    )
    table = [{"layer": layer, "tokens": inputs.shape[1], "free": of_layer} for layer, of_layer in layers]
    return place(protection, mesh, rivals.protection_specs(model.config.num_experts, mesh)), table


def realign(
    original: Model, current: Model, retain: Rows, grip: GripRealign, *, mesh: Mesh
) -> tuple[Model, list[dict]]:
    """`current` with routers that score retain text as those of `original` do, and one row per layer about it.

    From the first layer with a router to the last: each is realigned to inputs that corrected routers have made. A
    layer costs one pass of both models over the tokens. Biases of routers are realigned with them. A correction is kept
    if the cosine of scores before and after is at least `LEAST_COSINE`. Raises ConfigError for too few tokens.

    Returns:
      (model, rows of {layer (of the network, from 0), kept, cosine, cosine_before}), cosines of the original's scores
      with those after and before the correction.
    """
    config = original.config
    rows = spread_tokens(retain, grip.tokens)
    if rows.valid.sum() < config.hidden_size:
        raise ConfigError(
            f"grip 'realign' has {rows.valid.sum()} retain tokens for routers of {config.hidden_size} inputs, which do "
            f"not determine them; raise grip.tokens (it is {grip.tokens}) or give more retain text."
        )
    bias, flat = config.router_bias, flatten(current.params)
    theta, new = (to_host(rivals.joined(f, bias)).astype(np.float64) for f in (flatten(original.params), flat))

    def with_routers() -> Any:
        return placed_params(unflatten({**flat, **rivals.parted(new.astype(np.float32), bias)}), config, mesh)

    before, table = placed_params(original.params, config, mesh), []
    for layer, of_network in enumerate(config.moe_layers):
        moments = _moments(before, with_routers(), rows, layer, config, mesh)
        solved = rivals.realigned(theta[layer], moments, grip.ridge)
        reached, now = (rivals.cosine(theta[layer], router, moments) for router in (solved, new[layer]))
        row = {"layer": of_network, "kept": reached >= rivals.LEAST_COSINE, "cosine": reached, "cosine_before": now}
        new[layer] = solved if row["kept"] else new[layer]
        table.append(row)
    return current.replace(params=with_routers()), table


def with_realigned(trained: list[dict], table: list[dict]) -> list[dict]:
    """`trainable_table` rows in which realigned routers count as trained: they are kept and exported like these."""
    share = sum(row["kept"] for row in table) / len(table)

    def one(row):
        changed = round(row["parameters"] * share) if row["path"] in (ROUTER, BIAS) else 0
        return row | {"trained": max(row["trained"], changed)}

    return [one(row) for row in trained]


def _moments(before: Any, after: Any, rows: Rows, layer: int, config: ModelConfig, mesh: Mesh) -> Moments:
    """Moments of a layer's router inputs over the valid tokens: in float32 on devices, in float64 over batches."""
    batches = sequential_batches(rows, row_shards(mesh))
    arrays = ((b.tokens, b.segments, b.valid, np.full(len(b.tokens), layer, np.int32)) for b in batches)
    total: Any = [0.0] * 3
    for sums in map_batches(_products, (before, after), config, arrays, mesh=mesh, out_specs=P()):
        total = [a + b.astype(np.float64) for a, b in zip(total, sums, strict=True)]
    return Moments(*total)


def _products(params: tuple, config: ModelConfig, tokens, segments, valid, layer):
    """Sums f32 [W, W] over all rows of products of what the router of `layer` i32 [B] (0 in rows of padding) reads."""

    def inputs(params):
        out: Any = forward(params, config, tokens, mask=segments, collect=("router_inputs",))
        x = out.router.inputs[jnp.max(layer)].astype(jnp.float32)
        if config.router_bias:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
        return jnp.where(valid[..., None], x, 0.0)

    x, y = map(inputs, params)
    products = [
        jnp.einsum("bsd,bse->de", a, b, precision=jax.lax.Precision.HIGHEST) for a, b in ((x, x), (x, y), (y, y))
    ]
    return jax.lax.psum(products, BATCH_AXES)
