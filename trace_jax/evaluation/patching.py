"""Which experts carry what unlearning did: what returns when originals are put back, by the scoreboard's items."""

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from trace_jax.evaluation.fronts import FORGETTING, RunItems, Series, board_series, make_draws
from trace_jax.evaluation.intervals import LEVEL, Interval, quantile_interval
from trace_jax.evaluation.likelihood import NonFiniteScore
from trace_jax.evaluation.task import SPLIT, Evaluator, Scoreboard, Task
from trace_jax.io.progress import tracked
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.model import Model
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import to_host
from trace_jax.routing.config import highest, ranks
from trace_jax.routing.differences import expert_drift
from trace_jax.routing.statistics import ExpertStatistics

DRAWS, MOST_SIZES, MOST_BLOCKS = 3, 4, 8  # of random experts; numbers of experts and blocks of layers at most
MOST_ITEMS = 500  # test items of a subject, where a benchmark has thousands
EXPERTS = "experts"
# The parts of a model by the paths of their parameters; the first pattern that fits counts.
PARTS = {
    "layers/experts/*": EXPERTS, "layers/router*": "routers",
    "layers/shared/*": "shared and dense MLPs", "dense/mlp/*": "shared and dense MLPs",
    **dict.fromkeys(("*/attention*norm*", "*/mlp*norm*", "*/moe_output_norm*"), "norms and embeddings"),
    "layers/*": "attention", "dense/*": "attention", "*": "norms and embeddings",
}  # fmt: skip


def part_of(path: str) -> str:
    """The part of a model (`PARTS`) that a parameter belongs to."""
    return next(part for pattern, part in PARTS.items() if fnmatch.fnmatchcase(path, pattern))


def put_back(current: Model, original: Model, what: str | np.ndarray) -> Model:
    """`current` with a part of `original` in it (`PARTS`), or with some of its experts, bool [L, E].

    What stays, and a whole part, is shared and not copied; experts keep their sharding.
    """
    before, after = flatten(original.params), flatten(current.params)
    if isinstance(what, str):
        return current.replace(params=unflatten({p: (before if part_of(p) == what else after)[p] for p in after}))
    before, own = ({p: x for p, x in flat.items() if part_of(p) == EXPERTS} for flat in (before, after))
    return current.replace(params=unflatten({**after, **_mixed(before, own, what)}))


@jax.jit
def _mixed(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array], chosen: jax.Array) -> dict[str, jax.Array]:
    rows = {path: chosen.reshape(chosen.shape + (1,) * (x.ndim - 2)) for path, x in after.items()}
    return {path: jnp.where(rows[path], before[path], x) for path, x in after.items()}


@jax.jit
def _differ(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.any(before[path] != x) for path, x in after.items()}


def expert_sets(criticality: np.ndarray, *, seed: int = 0) -> list[tuple[str, int, np.ndarray]]:
    """The experts to put back: "critical", "random" or "least", how many of each layer, and which, bool [L, E].

    Numbers are powers of two up to half of the experts. Random experts are none of the critical ones, and drawn three
    times unless they are half of all.
    """
    rng, (_, experts), place = np.random.default_rng(seed), criticality.shape, ranks(criticality)
    most = (experts // 2).bit_length() - 1
    sets = []
    for size in sorted({2 ** round(i) for i in np.linspace(0, most, MOST_SIZES)} if most >= 0 else ()):
        sets.append(("critical", size, place < size))
        for _ in range(DRAWS if 2 * size < experts else 1):
            score = np.where(place < size, -1.0, rng.random(place.shape))
            sets.append(("random", size, highest(score, size, "layer")))
        sets.append(("least", size, place >= experts - size))
    return sets


def drift_correlation(drift: np.ndarray, criticality: np.ndarray) -> Interval:
    """Spearman's correlation of drift and criticality, [L, E] both, over the experts that have moved.

    The interval is tanh(atanh r ± z sqrt((1 + r²/2) / (n - 3))) (Bonett and Wright 2000, Psychometrika 65:23), experts
    taken as independent. NaN where fewer than ten have moved, or all the same.
    """
    moved = (drift > 0) & ~np.isnan(criticality)
    n, order = int(moved.sum()), np.stack([scipy.stats.rankdata(values[moved]) for values in (drift, criticality)])
    if n < 10 or (np.ptp(order, axis=1) == 0).any():
        return Interval(math.nan, math.nan, math.nan, n)
    r = float(np.corrcoef(order)[0, 1])
    half = scipy.special.ndtri(0.5 + LEVEL / 2) * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)) + np.array([-half, half]))
    return Interval(r, float(low), float(high), n)


def measure_patching(
    original: Model, current: Model, evaluator: Evaluator, boards: Sequence[Scoreboard], *,
    forget: ExpertStatistics, retain: ExpertStatistics, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """How far each expert has drifted, and what returns when originals are put back, on the test split.

    `evaluator` has scores of `original`, whose statistics are given. Of `boards` the first that can be read counts.

    Returns:
      drift, ratio: f64 [L, E], `expert_drift` and f^F / f^R.
      correlation: of drift with the "ratio" and the "difference" f^F - f^R (`drift_correlation`).
      note: why nothing was put back, or "".
      models: a dict each: kind ("original", "unlearned", "critical", "random", "least", "all", "layers" or "part"),
        name, size (experts of a layer, or 0), and, by the names of the forgetting score and the first utility, values,
        returned (less the unlearned model's) and, of critical ones, over_random (less the mean of the random draws).
    """
    if evaluator.mesh is not None:
        place = (placed_params(model.params, model.config, evaluator.mesh) for model in (original, current))
        original, current = (m.replace(params=p) for m, p in zip((original, current), place, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # an expert that a corpus never uses
        ratio = forget.frequency / retain.frequency
    drift, difference = expert_drift(original, current), forget.frequency - retain.frequency
    correlation = {"ratio": drift_correlation(drift, ratio), "difference": drift_correlation(drift, difference)}
    result = {"drift": drift, "ratio": ratio, "correlation": correlation, "note": "", "models": []}
    differ = to_host(_differ(flatten(original.params), flatten(current.params)))
    found = ((tasks, board) for board in boards if (tasks := _tasks(evaluator, board)))
    tasks, board = next(found, ((), boards[0]))
    models = _models({part_of(path) for path in differ if differ[path]}, drift, difference, current, seed)
    if not tasks or not models:
        missing = f"no items are kept for {board.forgetting} and a utility"
        return result | {"note": f"Nothing was put back: {'no parameter changed' if tasks else missing}."}
    scorer = dataclasses.replace(evaluator, tasks=tasks)
    try:
        scorer = dataclasses.replace(scorer, original=scorer.score(original))
        outcomes = [scorer.outcomes(scorer.original)]
        outcomes.append(scorer.outcomes(scorer.score(current)))
        for *_, what in tracked(models, "putting originals back", len(models)):
            outcomes.append(scorer.outcomes(scorer.score(put_back(current, original, what))))
    except NonFiniteScore as error:
        return result | {"note": f"Nothing was put back: in part original, {error}"}
    known = [("original", "original", 0), ("unlearned", "unlearned", 0), *(model[:3] for model in models)]
    return result | {"models": _rows(known, _series(outcomes, board), board, evaluator)}


def _models(
    parts: Collection[str], drift: np.ndarray, difference: np.ndarray, current: Model, seed: int
) -> list[tuple[str, str, int, Any]]:
    """(kind, name, size, what is put back) of every model, given the parts that have changed."""
    models: list[tuple[str, str, int, Any]] = []
    if EXPERTS in parts:
        models += [(kind, f"{size} {kind}", size, chosen) for kind, size, chosen in expert_sets(difference, seed=seed)]
        models.append(("all", "all experts", drift.shape[1], EXPERTS))
    moved = np.flatnonzero(drift.any(axis=1))
    for rows in np.array_split(moved, min(MOST_BLOCKS, len(moved))) if len(moved) > 1 else ():
        first, last = (current.config.moe_layers[row] for row in (rows[0], rows[-1]))
        name = f"experts, layer {first}" if first == last else f"experts, layers {first} to {last}"
        models.append(("layers", name, 0, np.isin(np.indices(drift.shape)[0], rows)))
    others = [part for part in dict.fromkeys(PARTS.values()) if part in parts and part != EXPERTS]
    return models + [("part", part, 0, part) for part in others]


def _tasks(evaluator: Evaluator, board: Scoreboard) -> tuple[Task, ...]:
    """The quick tasks behind the forgetting score and the first utility, on the test split; none where items aren't
    kept, or where text has to be written for them, which is too dear for many models.
    """

    def scores_of(*tasks: Task) -> set[str]:
        return set(_series([dataclasses.replace(evaluator, tasks=tasks).outcomes(evaluator.original)], board))

    tasks = [task for task in evaluator.tasks if task.quick and not task.generates]
    for place, task in enumerate(tasks):
        if isinstance(data := getattr(task, "data", None), Mapping):  # sets of items by split and subject
            own = {key: items for key, items in data.items() if key[0] == SPLIT}
            tasks[place] = dataclasses.replace(cast(Any, task), data=own)
    names = scores_of(*tasks)
    return tuple(task.thinned(MOST_ITEMS) for task in tasks if names & scores_of(task)) if len(names) == 2 else ()


def _series(outcomes: Sequence[Mapping[str, np.ndarray]], board: Scoreboard) -> dict[str, list[Series]]:
    """The forgetting score and the first utility of several models, given what each item gave of each."""
    found = board_series({name: np.stack([each[name] for each in outcomes]) for name in outcomes[0]}, board)
    utilities = [name for name in board.utilities if name in found]
    return {name: found[name] for name in (board.forgetting, *utilities[:1]) if name in found}


def _rows(
    models: Sequence[tuple[str, str, int]], series: Mapping[str, list[Series]], board: Scoreboard, evaluator: Evaluator
) -> list[dict[str, Any]]:
    """`models` of `measure_patching`, from the items of every model in the order of `models`; draws are averaged."""
    (forgetting,), utilities = series[board.forgetting], {n: own for n, own in series.items() if n != board.forgetting}
    items, places = RunItems(forgetting, utilities, dict.fromkeys(utilities, False)), {}
    for place, model in enumerate(models):
        places.setdefault(model, []).append(place)
    random = make_draws(resamples=evaluator.config.bootstrap, seed=evaluator.seed)
    whole, drawn = (items.resampled(draws) for draws in (lambda names: np.ones((1, len(names))), random))
    values = {board.forgetting: np.concatenate([whole[0], drawn[0]])}  # f64 [1 + R, models], first of the items as is
    values |= {name: np.concatenate([whole[1][name], drawn[1][name]]) for name in utilities}

    def numbers(own: Sequence[int], less: Sequence[int] | None = None) -> dict[str, Interval]:
        numbers = {}
        for name, v in values.items():
            means = v[:, own].mean(axis=1) - (0.0 if less is None else v[:, less].mean(axis=1))
            means = means.round(12)  # what is equal differs by nothing
            count = sum(items.counts(name if name in utilities else FORGETTING).values())
            numbers[name] = quantile_interval(float(means[0]), means[1:], count)
        return numbers

    rows = []
    for (kind, name, size), own in places.items():
        rows.append({"kind": kind, "name": name, "size": size, "values": numbers(own), "returned": numbers(own, [1])})
        if kind == "critical":
            rows[-1]["over_random"] = numbers(own, places["random", f"{size} random", size])
    return rows
