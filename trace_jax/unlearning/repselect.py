"""RepSelect: steps along what is particular to the forget set. Sondej, Yang, Mahdi, arXiv 2606.17168.

Directions that many inputs share carry what the model is to keep, and what relearning brings back first. As the
authors' code does it (filyp/open-unlearning at 5955f30, `RepSelectSimple`), to the matrices of experts:

  1. An adversary: low-rank factors are taught the forget set, an epoch of plain descent at `adversary_rate`.
  2. With these in place, G is each matrix's gradient of -mean nll_t over the forget set. Then they are taken out.
  3. u_i, s_i, v_i are the first `components` singular triplets of G, and m is the smallest of these s_i. G is divided
     by s_i / m along every v_i, and again along every u_i: what stood out, s_i, comes out as m^2 / s_i.
  4. Every step subtracts learning_rate times what is left, always the same; where to stop is for rules to say.

Different here: G is a mean over forget tokens, not a sum of means over batches, so that it doesn't depend on the batch
size; the factors' first values are N(0, 1/inputs), peft's are uniform with a third of this variance; and where fewer
tokens than components reached an expert, m is the smallest s_i that is not rounding. Not checked: numbers against a run
of that code, and its second trainer, which collapses activations and output gradients anew in every epoch.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Rows, sequential_batches
from trace_jax.io.progress import say
from trace_jax.parallel.mesh import BATCH_AXES, dividing_axes, place
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants, StepSettings
from trace_jax.unlearning.objectives import RepSelect
from trace_jax.unlearning.optimizer import OptimizerConfig
from trace_jax.unlearning.step import batch_gradient, fresh_state, row_multiple, unlearning_step
from trace_jax.unlearning.trainable import Flat, declarations, merge, split, trainable_paths

ADVERSARY_RANK = 8  # of the factors, with alpha / rank = 1: what peft takes where neither is set


def forget_direction(
    constants: Constants, forget: Rows, config: UnlearningConfig, settings: StepSettings, *, seed: int, mesh: Mesh
) -> Flat:
    """f32 arrays like those that train, by path: the gradient that every step goes down."""
    objective, model, paths = config.objective, settings.model, trainable_paths(settings.model, config.trainable)
    assert isinstance(objective, RepSelect)
    multiple, tokens, params = row_multiple(settings, mesh), int(forget.valid.sum()), constants.original
    size = -(-config.forget_batch_size // multiple) * multiple

    def batches(rows: Rows) -> Iterator[tuple[StepRows, float]]:
        """(Rows of a step, their share of the forget tokens.)"""
        for batch in sequential_batches(rows, config.forget_batch_size):
            share = float(batch.valid.sum()) / tokens
            yield place(pad_rows(StepRows(batch), size), mesh, P(BATCH_AXES)), share

    def reading(params: Flat, index=None, **numbers: float) -> Constants:
        return Constants(params, index, None, place({k: np.float32(v) for k, v in numbers.items()}, mesh))

    if objective.adversary_rate:
        descent = OptimizerConfig(config.optimization.optimizer, objective.adversary_rate, clip_norm=0.0)
        taught = dataclasses.replace(settings, optimizer=descent, steps=0)
        factors = split(params, paths, model, mesh, rank=ADVERSARY_RANK, seed=seed)
        state = fresh_state(factors, None, None, settings=taught, mesh=mesh)
        learning = reading(params, gamma=-1.0, lora_scale=1.0)
        for rows, _ in batches(forget.take(np.random.default_rng(seed).permutation(len(forget)))):
            state, _ = unlearning_step(state, learning, rows, settings=taught, mesh=mesh)
        params = merge(params, state.trainable, model, mesh, scale=jnp.float32(1.0))
    first, total = split(params, paths, model, mesh, index=constants.index), None
    trained = fresh_state(first, None, None, settings=settings, mesh=mesh).trainable  # float32, as what trains is
    for rows, share in batches(forget):
        of_batch = reading(params, constants.index, gamma=objective.gamma * share)
        gradient, _ = batch_gradient(trained, None, of_batch, rows, settings=settings, mesh=mesh)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    assert total is not None
    say(f"RepSelect: every step goes along one gradient of {tokens:,} forget tokens, its first components collapsed")
    declared = declarations(model, total)
    return {
        path: collapsed(leaf, first=declared[path].sides[0], components=objective.components, seed=seed, mesh=mesh)
        for path, leaf in total.items()
    }


@functools.partial(jax.jit, static_argnames=("first", "components", "mesh"))
def collapsed(gradient: jax.Array, *, first: int, components: int, seed: int, mesh: Mesh) -> jax.Array:
    """`collapse` of every matrix of an array f32 [stacked..., inputs, outputs...]; `first` is the axis of the inputs.
    Devices share the matrices as far as their number divides.
    """
    matrices = gradient.reshape(math.prod(gradient.shape[:first]), gradient.shape[first], -1)
    spec = P(dividing_axes(len(matrices), mesh))

    def here(matrices, seed):
        return jax.lax.map(lambda matrix: collapse(matrix, components, jax.random.key(seed)), matrices)

    shared = jax.shard_map(here, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    return shared(matrices, jnp.asarray(seed, jnp.int32)).reshape(gradient.shape)


def collapse(gradient: jax.Array, components: int, key: jax.Array) -> jax.Array:
    """f32 [N, M] with its first singular components divided by s / min s on either side (3. above).

    They are found as torch.svd_lowrank finds them (0909.4061, algorithms 4.4 and 5.1, two iterations): exactly where
    there are as many as the matrix has rows or columns.
    """
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    count = min(components, *gradient.shape)
    basis = jnp.linalg.qr(multiply(gradient, jax.random.normal(key, (gradient.shape[1], count), jnp.float32)))[0]
    for _ in range(2):
        other = jnp.linalg.qr(multiply(gradient.T, basis))[0]
        basis = jnp.linalg.qr(multiply(gradient, other))[0]
    inner, s, v = jnp.linalg.svd(multiply(basis.T, gradient), full_matrices=False)
    u, real = multiply(basis, inner), s > s[0] * max(gradient.shape) * jnp.finfo(s.dtype).eps
    least = jnp.min(jnp.where(real, s, jnp.inf))
    taken = jnp.where(real, 1.0 - least / jnp.where(real, s, 1.0), 0.0)
    gradient = gradient - multiply(multiply(gradient, v.T) * taken[None], v)
    return gradient - multiply(u * taken[None], multiply(u.T, gradient))
