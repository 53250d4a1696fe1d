"""The diagnosis finds a mismatch that is there, none that isn't, and says so where text is too little to tell."""

import dataclasses

import numpy as np
import pytest

from trace_jax.routing.diagnosis import diagnose
from trace_jax.routing.statistics import Assignments

EXPERTS = 16


def text(seed, *, shift=0.0, rows=40, length=60, kind=1.0):
    """Rows with preferences of their own; `shift` is by how much the first four experts are preferred."""
    rng = np.random.default_rng(seed)
    preference = 0.5 * np.random.default_rng(0).normal(size=(3, 1, 1, EXPERTS)) * kind
    preference = preference + 0.3 * rng.normal(size=(3, rows, 1, EXPERTS))
    preference[..., :4] += shift
    scores = preference + rng.gumbel(size=(3, rows, length, EXPERTS))
    chosen = np.argsort(-scores, axis=-1)[..., :2].astype(np.uint8).reshape(3, -1, 2)
    row = np.repeat(np.arange(rows, dtype=np.int32), length)
    return Assignments(chosen, row, row)


CASES = {
    "present": ({"shift": 1.5}, {}),
    "weak": ({"shift": 0.6}, {}),
    "absent": ({}, {}),
    "undecided": ({"shift": 1.5, "rows": 7}, {}),  # fewer than a verdict takes
}


@pytest.mark.parametrize("verdict", CASES)
def test_the_verdict(verdict):
    forget, retain = (text(seed, **settings) for seed, settings in enumerate(CASES[verdict], start=1))
    found = diagnose(forget, retain, num_experts=EXPERTS)
    assert found.verdict == verdict and found.text().startswith(f"mismatch {verdict}: ")
    assert found.selected[:, :4].all() == (verdict != "absent")
    f, r = ((np.arange(EXPERTS) == t.indices[0].ravel()[:, None]).sum(0) / t.indices.shape[1] for t in (forget, retain))
    assert np.allclose(found.forget[0], f) and np.isclose(found.quantities["gap"]["value"][0], np.abs(f - r).sum())
    well_used = f >= 1 / EXPERTS  # half of K / E
    assert np.isclose(found.quantities["largest_ratio"]["value"][0], (f / r)[well_used].max())
    assert np.isclose(found.quantities["above_ratio_2"]["value"][0], ((f / r > 2) & well_used).mean())


@pytest.mark.parametrize("rows", [8, 16, 60])
def test_two_samples_of_one_text_never_have_a_mismatch(rows):
    """Their largest ratio is well above one, and the fewer the rows the larger: that is what noise looks like."""
    ratios = []
    for seed in range(5):
        found = diagnose(text(seed, rows=rows, length=12), text(50 + seed, rows=rows, length=12), num_experts=EXPERTS)
        assert found.verdict in ("absent", "undecided")
        ratios.append(found.quantities["largest_ratio"]["value"].max())
    assert min(ratios) > 1.25


def test_the_order_of_rows_and_the_seed_decide_nothing_but_the_halves():
    forget, retain = text(1, shift=1.5), text(2)
    found = [diagnose(forget, retain, num_experts=EXPERTS, seed=seed) for seed in (0, 0, 1)]
    assert found[0].held_out == found[1].held_out != found[2].held_out
    assert np.isclose(found[0].held_out, found[2].held_out, rtol=0.1)
    one_row = dataclasses.replace(forget, rows=np.zeros_like(forget.rows))
    assert np.isnan(diagnose(one_row, retain, num_experts=EXPERTS).held_out)
    with pytest.raises(ValueError, match="must come from the same layers of one model"):
        diagnose(forget, dataclasses.replace(retain, indices=retain.indices[:2]), num_experts=EXPERTS)
