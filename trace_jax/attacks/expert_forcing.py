"""Every token sent to the experts that the original model sends it to: finds what was only routed around.

GRIP's attack (docs/evaluation.md says what differs), made of likelihood scores: nothing is trained or written.
"""

from __future__ import annotations

import numpy as np

from trace_jax.attacks.attack import Case, Point
from trace_jax.attacks.config import ExpertForcingConfig
from trace_jax.data.batches import sequential_batches
from trace_jax.evaluation.intervals import bootstrap_mean
from trace_jax.evaluation.likelihood import spread_indices
from trace_jax.evaluation.measurement import Measurement, named
from trace_jax.evaluation.routing import SPLIT
from trace_jax.routing.diagnostics import overlap_by_row
from trace_jax.routing.statistics import expert_assignments


def expert_forcing(settings: ExpertForcingConfig, case: Case) -> list[Point]:
    """Measures the unlearned model while the original chooses the experts of every token in every layer.

    Gate weights are what the unlearned model's routers make of their own scores of these experts. `forced_share` is
    measured beside: how often that differs from what the unlearned model would have chosen.
    """
    del settings
    evaluator = case.evaluator
    scores = evaluator.score(case.unlearned.replace(guide=case.original.params))
    return [Point("original's experts", [*evaluator.measure(scores), forced_share(case)])]


def forced_share(case: Case) -> Measurement:
    """Share of (token, layer) pairs of the forget rows at which the two models, each by itself, choose different sets.

    Of rows thinned evenly to `evaluation.max_rows`; the interval is over rows.
    """
    settings, rows = case.evaluator.config, case.corpora.forget
    rows = rows.take(spread_indices(len(rows), settings.max_rows))
    original, unlearned = (
        expert_assignments(model, sequential_batches(rows, settings.batch_size), mesh=case.mesh)
        for model in (case.original, case.unlearned)
    )
    kept = overlap_by_row(original, unlearned)
    pairs = kept.tokens.astype(np.float64) * kept.unchanged.shape[1]
    changed = pairs - kept.unchanged.sum(axis=1)
    interval = bootstrap_mean(changed, weights=pairs, resamples=settings.bootstrap, seed=case.seed)
    return named("forced_share", SPLIT, interval)
