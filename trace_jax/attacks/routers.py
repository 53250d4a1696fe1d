"""The original model's routing over the unlearned experts: undoes what was only hidden by routing.

Router swap puts the routers themselves back. Expert forcing sends every token to the experts that the original model
sends it to: GRIP's attack (docs/evaluation.md says what differs), made of likelihood scores.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from trace_jax.attacks.attack import Attack, Case, Context, Point
from trace_jax.data.batches import sequential_batches
from trace_jax.evaluation.intervals import bootstrap_mean
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.evaluation.routing import SPLIT
from trace_jax.models.arrays import flatten, unflatten
from trace_jax.models.model import Model
from trace_jax.routing.statistics import Assignments, expert_assignments, overlap_by_row

_ROUTERS = ("layers/router", "layers/router_bias", "layers/router_correction")


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

    def prepare(self, context: Context) -> Callable[[], Assignments]:
        """Where the original model sends the tokens of the forget rows, found when it is asked for."""
        return functools.cache(lambda: self._assignments(context, context.original))

    def forced_share(self, case: Case) -> Measurement:
        """Share of (token, layer) pairs of the forget rows at which the two models choose different sets.

        Of rows thinned evenly to `evaluation.max_rows`; the interval is over rows.
        """
        context = case.context
        overlap = overlap_by_row(context.prepared(), self._assignments(context, case.unlearned))
        pairs = overlap.tokens.astype(np.float64) * overlap.unchanged.shape[1]
        changed = pairs - overlap.unchanged.sum(axis=1)
        resamples = context.evaluator.config.bootstrap
        interval = bootstrap_mean(changed, weights=pairs, resamples=resamples, seed=context.seed)
        return named("forced_share", SPLIT, interval)

    def _assignments(self, context: Context, model: Model) -> Assignments:
        settings, rows = context.evaluator.config, context.corpora.forget
        rows = rows.take(spread_indices(len(rows), settings.max_rows))
        return expert_assignments(model, sequential_batches(rows, settings.batch_size), mesh=context.mesh)
