"""Attacks that take an unlearned model's parameters as they are and change them, or their routing, without training.

Quantization rounds weights to nearest in few bits: it undoes a change that is smaller than a step (2410.16454). The two
others undo what was only hidden by routing. Router swap puts the original routers back. Expert forcing sends every
token to the experts that the original model sends it to: GRIP's attack (docs/evaluation.md says what differs), made of
likelihood scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.attacks.attack import Attack, Case, Point
from trace_jax.config import ConfigError, option
from trace_jax.data.rows import sequential_batches
from trace_jax.evaluation.intervals import Measurement, bootstrap_mean, named
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.routing import SPLIT
from trace_jax.models.architecture import ArraySpec, ModelConfig, flat_specs, flatten, unflatten
from trace_jax.routing.statistics import expert_assignments, overlap_by_row

_MATRICES = ("q", "k", "v", "o", "attention_gate", "kv_down", "kv_up", "q_down", "q_up", "gate_up", "down")
_ROUTERS = ("layers/router", "layers/router_bias", "layers/router_correction")


class Quantization(Attack):
    """Weights rounded to few bits."""

    bits: tuple[int, ...] = option((8, 4), help="bits of a weight, one attack each", choices=tuple(range(2, 9)))

    def __post_init__(self):
        super().__post_init__()
        if not self.bits:
            raise ConfigError("bits is an empty list; give at least one number of bits, such as (8, 4).")

    def points(self, case: Case) -> list[Point]:
        points, model = [], case.unlearned
        for bits in self.bits:
            params = quantized(model.params, model.config, bits=bits)
            points.append(Point(f"{bits} bits", case.measure(params, f"{bits}-bits")))
        return points


def quantized(params: Any, config: ModelConfig, *, bits: int) -> Any:
    """Parameters with every matrix of attention, experts and dense layers rounded to `bits` bits and back.

    Embedding, output head, routers, norms and biases stay as they are, as the usual tools leave them. See
    `round_to_nearest`.
    """
    specs, flat = flat_specs(config), flatten(params)
    matrices = [path for path in flat if path.rpartition("/")[2] in _MATRICES]  # in one order in all processes
    return unflatten(flat | {path: _rounded(flat[path], spec=specs[path], bits=bits) for path in matrices})


@functools.partial(jax.jit, static_argnames=("spec", "bits"))
def _rounded(array: jax.Array, *, spec: ArraySpec, bits: int) -> jax.Array:
    rounded = round_to_nearest(array.astype(jnp.float32), axes=tuple(range(*spec.sides)), bits=bits)
    return rounded.astype(array.dtype)


def round_to_nearest(weights: jax.Array, *, axes: tuple[int, ...], bits: int) -> jax.Array:
    """Each weight as the nearest multiple of its channel's step, f32, ties to even.

    A channel is an output of the matrix, and `axes` are its inputs. Steps are symmetric: the largest absolute value of
    a channel is 2^(bits-1) - 1 of them, so that 0 stays 0.
    """
    levels = 2 ** (bits - 1) - 1
    largest = jnp.abs(weights).max(axis=axes, keepdims=True)
    step = jnp.where(largest > 0, largest, 1.0) / levels
    return jnp.round(weights / step) * step


class RouterSwap(Attack):
    """The original routers put back under the unlearned experts. Nothing to set."""

    def points(self, case: Case) -> list[Point]:
        """Measures the unlearned model with every router, its bias and its correction as they were before."""
        swapped = with_routers_of(case.unlearned.params, case.context.original.params)
        return [Point("original routers", case.measure(swapped, "original-routers"))]


def with_routers_of(params: Any, donor: Any) -> Any:
    """`params` with the routers of another model of the same shape; every other array is shared."""
    routers = {path: array for path, array in flatten(donor).items() if path in _ROUTERS}
    return unflatten(flatten(params) | routers)


class ExpertForcing(Attack):
    """Tokens forced to the experts that the original model sends them to. Nothing to set."""

    def points(self, case: Case) -> list[Point]:
        """Measures the unlearned model while the original chooses the experts of every token in every layer.

        Gate weights are what the unlearned model's routers make of their own scores of these experts. `forced_share` is
        measured beside: how often that differs from what the unlearned model would have chosen.
        """
        evaluator = case.context.evaluator
        scores = evaluator.score(case.unlearned.replace(guide=case.context.original.params))
        return [Point("original's experts", [*evaluator.measure(scores), self.forced_share(case)])]

    def forced_share(self, case: Case) -> Measurement:
        """Share of (token, layer) pairs of the forget rows at which the two models choose different sets.

        Of rows thinned evenly to `evaluation.max_rows`; the interval is over rows.
        """
        context, settings = case.context, case.context.evaluator.config
        rows = context.corpora.forget.take(spread_indices(len(context.corpora.forget), settings.max_rows))
        batches = sequential_batches(rows, settings.batch_size)
        overlap = overlap_by_row(
            context.original_routing(), expert_assignments(case.unlearned, batches, mesh=context.mesh)
        )
        pairs = overlap.tokens.astype(np.float64) * overlap.unchanged.shape[1]
        changed = pairs - overlap.unchanged.sum(axis=1)
        interval = bootstrap_mean(changed, weights=pairs, resamples=settings.bootstrap, seed=context.seed)
        return named("forced_share", SPLIT, interval)
