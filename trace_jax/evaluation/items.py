"""What each item gave along a run, and the fronts that other items would have given.

Methods are compared on the same items, and seeds may share items too (published benchmarks have one test set). So a
resample is drawn for an item, not for a run: how often it is drawn depends on the item and the resample alone, and
every run that has the item draws it as often. Counts are Poisson with mean 1 (Hanley and MacGibbon 2006; Chamandy et
al. 2012), which is the bootstrap for ratios of sums, without a number of items that has to be the same everywhere.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from trace_jax.evaluation.benchmarks import Scoreboard
from trace_jax.evaluation.fronts import MEAN, Front
from trace_jax.evaluation.probes import relative_likelihood
from trace_jax.unlearning.metrics import read_items


@dataclasses.dataclass(frozen=True)
class Series:
    """One score along a run as a ratio of sums over its items.

    Attributes:
      names: u32 [G], one for each item or group of items that is drawn as a whole.
      above: f64 [G, T], sum over the group at each evaluation.
      below: f64 [G], its share of the denominator: questions, or tokens.
      counts: i64 [G], items in the group.
      finish: what the ratio becomes: "share" as it is, "ratio" its exponential, "utility" that, at most 1.
    """

    names: np.ndarray
    above: np.ndarray
    below: np.ndarray
    counts: np.ndarray
    finish: str

    def values(self, draws: np.ndarray) -> np.ndarray:
        """The score f64 [R, T] on resamples that draw each group so often, f64 [R, G]."""
        ratio = draws @ self.above / (draws @ self.below)[:, None]
        if self.finish == "share":
            return ratio
        return np.exp(np.minimum(ratio, 0.0) if self.finish == "utility" else ratio)


class Draws:
    """How often each item is drawn in each of `resamples` resamples; the same for an item wherever it comes up."""

    def __init__(self, *, resamples: int, seed: int):
        self.resamples, self._seed = resamples, seed
        self._known: dict[int, np.ndarray] = {}

    def of(self, names: np.ndarray) -> np.ndarray:
        """f64 [R, G]. A resample that draws none of these items is the sample itself."""
        drawn = np.stack([self._item(int(name)) for name in names], axis=1)
        drawn[drawn.sum(axis=1) == 0] = 1.0
        return drawn

    def _item(self, name: int) -> np.ndarray:
        if name not in self._known:
            rng = np.random.default_rng((self._seed, name))
            self._known[name] = rng.poisson(1.0, self.resamples).astype(np.float64)
        return self._known[name]


@dataclasses.dataclass(frozen=True)
class RunItems:
    """What each item of one split gave along a run: the series of the forgetting score and of every utility."""

    steps: np.ndarray
    forgetting: Series
    utilities: Mapping[str, Series]
    relative: frozenset[str]

    def resampled(self, draws: Draws) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Forgetting and utilities f64 [R, T] on resampled items, as `front_from_history` makes them of the items."""
        forgetting = self.forgetting.values(draws.of(self.forgetting.names))
        utilities = {}
        for name, series in self.utilities.items():
            values = series.values(draws.of(series.names))
            with np.errstate(divide="ignore", invalid="ignore"):  # the original may have none of the drawn ones right
                utilities[name] = values / values[:, :1] if name in self.relative else values
        utilities[MEAN] = np.mean(list(utilities.values()), axis=0)
        return forgetting, utilities

    def counts(self, utility: str) -> dict[int, int]:
        """Items behind a utility, by the name of their group."""
        chosen = self.utilities.values() if utility == MEAN else (self.utilities[utility],)
        return {int(name): int(n) for s in chosen for name, n in zip(s.names, s.counts, strict=True)}


def load_run_items(directory: str | os.PathLike, front: Front, board: Scoreboard, *, split: str) -> RunItems | None:
    """The items behind a front; None where the run kept none, or not at every step of the front."""
    found = read_items(directory)
    if found is None:
        return None
    steps, items = found
    at = np.searchsorted(steps, front.steps)
    if (at >= len(steps)).any() or (steps[at] != front.steps).any():
        return None
    by_subject: dict[str, dict[str, np.ndarray]] = {}
    for path, values in items.items():
        part, subject, name = path.split("/")
        if part == split:
            by_subject.setdefault(subject, {})[name] = values[at]
    series = {}
    for subject, columns in by_subject.items():
        series |= _series(subject, columns, board)
    utilities = {u.name: series[u.name] for u in board.utilities if u.name in series}
    if board.forgetting not in series or set(utilities) != set(front.utilities) - {MEAN}:
        return None
    relative = frozenset(u.name for u in board.utilities if u.relative)
    return RunItems(front.steps, series[board.forgetting], utilities, relative)


def _series(subject: str, columns: Mapping[str, np.ndarray], board: Scoreboard) -> dict[str, Series]:
    """Series by the name of the measurement, from columns [T, N] of one subject."""
    found = {}
    if "correct" in columns:
        correct = columns["correct"].astype(np.float64)
        ones = np.ones(correct.shape[1])
        found[board.accuracy(subject)] = _grouped(columns["question"][0], correct, ones, "share")
    if "original" in columns and columns["tokens"][0].any():
        gain = columns["original"].astype(np.float64) - columns["nll"]
        finish = "ratio" if subject == "forget" else "utility"
        tokens = columns["tokens"][0].astype(np.float64)
        found[relative_likelihood(subject)] = _grouped(columns["row"][0], gain, tokens, finish)
    return found


def _grouped(names: np.ndarray, above: np.ndarray, below: np.ndarray, finish: str) -> Series:
    kept = below > 0  # a row of which nothing is scored is no item
    names, group, counts = np.unique(names[kept], return_inverse=True, return_counts=True)
    member = (np.arange(len(names))[:, None] == group).astype(np.float64)  # [G, N]
    return Series(names, member @ above[:, kept].T, member @ below[kept], counts, finish)
