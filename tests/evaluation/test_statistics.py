"""Every number of a whole evaluation has its n and its interval, or says why it has none."""

import dataclasses
import math

import pytest
from whole_evaluation import make_model, whole_evaluator, write_benchmarks

PREFIXES = (
    "muse_",
    "muse_ou_",
    "tofu_",
    "wmdp",
    "mmlu",
    "membership_",
    "privleak",
    "verbatim",
    "extraction_",
    "exact_",
)


@pytest.mark.parametrize("count", [4, 1])
def test_every_number_has_n_and_an_interval_or_says_why_not(tiny, tmp_path, count):
    evaluator = whole_evaluator(tiny, write_benchmarks(tmp_path, count=count))
    original, unlearned, retrained = (evaluator.score(make_model(tiny, seed), full=True) for seed in range(3))
    alone = evaluator.measure(unlearned)
    found = dataclasses.replace(evaluator, original=original, retrained=retrained).measure(unlearned)
    assert all(any(m.name.startswith(prefix) for m in found) for prefix in PREFIXES)
    assert {m.name for m in found} - {m.name for m in alone} >= {"privleak", "muse_privleak", "tofu_forget_quality"}
    assert len({(m.name, m.split) for m in found}) == len(found), "no two numbers of a split have one name"
    tasks = [m for m in found if m.name.startswith(("muse_", "tofu_", "wmdp", "mmlu"))]
    assert all(m.revision.startswith("sha256:") and m.split == "test" for m in tasks)
    for m in (*alone, *found):
        assert m.n >= 1 and math.isfinite(m.value) and m.split in ("validation", "test"), m
        if math.isfinite(m.low) and math.isfinite(m.high):
            assert m.low - 1e-9 <= m.value <= m.high + 1e-9, m
        else:
            assert "no interval" in m.note or "too few items" in m.note, m
    without = {m.name for m in found if math.isnan(m.low)}
    if count > 1:
        assert without == {"tofu_forget_quality", "tofu_forget_ks"}
    else:
        assert {"tofu_model_utility", "muse_verbmem", "muse_privleak_auc"} <= without
        assert not any(name.startswith(("wmdp", "mmlu")) for name in without), "Wilson's interval has an n of one"
