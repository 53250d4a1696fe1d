"""How often intervals over seeds and items hold the truth, in simulated studies; docs/evaluation.md has the numbers.

Record them anew: python -m pytest tests/evaluation/test_coverage.py -s, and copy what is printed.
"""

import math
import re

import numpy as np
import pytest

from trace_jax.evaluation import intervals

STUDIES, BATCH, ITEMS, RESAMPLES = 2000, 100, 100, 400
SPREADS = (0, 1, 2)  # standard deviation between seeds, in standard errors of one seed's items
CASES = [("own", 1), ("own", 3), ("own", 5), ("shared", 3), ("shared", 5)]


def studies(rng, *, items, seeds, spread):
    """(values [S], resampled values [R, S]) of each study, whose true value is 0.

    What a model of one seed gives on an item is normal with variance 1. On shared items half of that variance is the
    item's, the same for every seed, and half is the seed's own.
    """
    shared = items == "shared"
    for _ in range(STUDIES // BATCH):
        # As `fronts.make_draws` does.
        counts = rng.poisson(1.0, (1 if shared else seeds, RESAMPLES, ITEMS)).astype(float)
        own, common = rng.normal(size=(seeds, ITEMS, BATCH)), rng.normal(size=(1, ITEMS, BATCH))
        scores = math.sqrt(0.5) * (common + own) if shared else own
        scores = scores + rng.normal(0, spread / math.sqrt(ITEMS), (seeds, 1, BATCH))
        resampled = counts @ scores / counts.sum(axis=2, keepdims=True)  # [S, R, BATCH]
        yield from zip(scores.mean(axis=1).T, np.moveaxis(resampled, 0, -1).swapaxes(0, 1), strict=True)


def coverage(items, seeds, spread):
    """Share of studies whose interval holds the truth: over seeds and items, and Student's over seeds alone."""
    rng, result = np.random.default_rng((seeds, spread, items == "shared")), np.zeros(2)
    for values, resampled in studies(rng, items=items, seeds=seeds, spread=spread):
        both = intervals.seeds_and_items(values, resampled, ITEMS), intervals.t_interval(values)
        result += [interval.low <= 0 <= interval.high for interval in both]
    return result / STUDIES


def recorded(root, items, seeds):
    """[spreads, 2] of a row of the table in the docs; NaN where there is none of the second."""
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {items} \| {seeds} \|(.*)\|$", text, re.MULTILINE)
    assert row is not None, f"the table of coverage has no row for {items} items and {seeds} seeds"
    cells = [cell.split("/") for cell in row[1].split("|")]
    return np.array([[math.nan if value.strip() == "-" else float(value) for value in cell] for cell in cells])


@pytest.mark.parametrize(("items", "seeds"), CASES)
def test_the_recorded_coverage_is_that_of_the_simulation(items, seeds, request):
    result = np.stack([coverage(items, seeds, spread) for spread in SPREADS])
    if seeds == 1:
        result[:, 1] = math.nan  # Student's interval of one number doesn't exist
    cells = [f"{a:.3f} / {'-' if math.isnan(b) else f'{b:.3f}'}" for a, b in result]
    print(f"\n| {items} | {seeds} | {' | '.join(cells)} |")
    np.testing.assert_allclose(recorded(request.config.rootpath, items, seeds), result, atol=0.01)
    if seeds > 1:
        assert (result[:, 0] > 0.94).all(), "95 % intervals over seeds and items hold the truth 95 times in 100"
