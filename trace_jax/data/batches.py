"""Which rows a step reads. The position in the data is the step number, so resuming needs nothing else.

An index sampler maps a step to row numbers i64 [B]; `Batches` looks the rows up. Everything is a pure function of
(seed, step): it does not depend on the number of devices, nor on the steps before.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import grain
import numpy as np

from trace_jax.data.rows import Batch, Rows

IndexSampler = Callable[[int], np.ndarray]


def epoch_sampler(num_rows: int, batch_size: int, *, seed: int) -> IndexSampler:
    """Every row once per epoch, reshuffled each epoch. A batch may span two epochs."""
    _check_sizes(num_rows, batch_size)
    batches = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat().batch(batch_size)
    return lambda step: np.asarray(batches[int(step)], np.int64)


def weighted_sampler(weights: np.ndarray, batch_size: int, *, seed: int) -> IndexSampler:
    """Rows drawn independently, with replacement, with probability [N] proportional to `weights`."""
    weights = np.asarray(weights, np.float64)
    _check_sizes(weights.size, batch_size)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError("Row probabilities must be one finite, non-negative number per row, and not all zero.")
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]

    def draw(_: int, rng: np.random.Generator) -> np.ndarray:
        # side="right" never returns a row of probability zero.
        return np.searchsorted(cumulative, rng.random(batch_size), side="right")

    batches = grain.MapDataset.range(1).repeat().seed(seed).random_map(draw)
    return lambda step: np.asarray(batches[int(step)], np.int64)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches by step: `batches[step]` is the `Batch` of the rows `batches.indices(step)`."""

    rows: Rows
    indices: IndexSampler  # also for looking up weights of rows

    def __getitem__(self, step: int) -> Batch:
        return self.rows.batch(self.indices(step))


def retain_batches(rows: Rows, batch_size: int, *, seed: int, probability: np.ndarray | None = None) -> Batches:
    """Batches of rows drawn with `probability` [N].

    Equal probabilities, or none, visit every row once per epoch: so uniform weights train exactly as no weights do.
    """
    if probability is None or (len(probability) == len(rows) and np.ptp(probability) == 0 and probability[0] > 0):
        return Batches(rows, epoch_sampler(len(rows), batch_size, seed=seed))
    if len(probability) != len(rows):
        raise ValueError(f"{len(probability)} row probabilities were given for {len(rows)} rows.")
    return Batches(rows, weighted_sampler(probability, batch_size, seed=seed))


def mixture_batches(train: Mapping[str, Rows], mixture: Mapping[str, float], batch_size: int, *, seed: int) -> Batches:
    """Batches with a fixed number of rows per source (`batch_counts`), each reshuffled at each of its own epochs.

    Raises:
      ValueError: the mixture names a source that is not in `train`, or gives one no row.
    """
    if unknown := [name for name in mixture if name not in train]:
        raise ValueError(f"The mixture names {', '.join(unknown)}, but the sources are {', '.join(train)}.")
    offsets = dict(zip(train, np.cumsum([0, *map(len, train.values())])[:-1], strict=True))
    parts = [
        (offsets[name], epoch_sampler(len(train[name]), count, seed=seed + order))
        for order, (name, count) in enumerate(batch_counts(mixture, batch_size).items())
    ]
    rows = Rows.concatenate(list(train.values()))
    return Batches(rows, lambda step: np.concatenate([sampler(step) + offset for offset, sampler in parts]))


def batch_counts(mixture: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Rows per source in a batch, by largest remainder of the shares; sources of share 0 are left out.

    Raises:
      ValueError: a share is negative, all are zero, or a source with a share would get no row.
    """
    total = sum(mixture.values())
    if total <= 0 or min(mixture.values()) < 0:
        raise ValueError(f"The shares of a mixture must be non-negative and not all zero; given {dict(mixture)}.")
    exact = {name: batch_size * share / total for name, share in mixture.items() if share > 0}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])  # stable: ties keep the given order
    for name in by_remainder[: batch_size - sum(counts.values())]:
        counts[name] += 1
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(
            f"A batch of {batch_size} rows has no room for the sources {', '.join(empty)}; raise batch_size."
        )
    return counts


def sequential_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch may be smaller."""
    _check_sizes(len(rows), batch_size)
    for start in range(0, len(rows), batch_size):
        yield rows.batch(np.arange(start, min(start + batch_size, len(rows))))


def _check_sizes(num_rows: int, batch_size: int) -> None:
    if num_rows < 1:
        raise ValueError("There are no rows to draw batches from.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
