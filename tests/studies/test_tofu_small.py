"""The study of TOFU: its claims, tables and figures of runs whose crossings are known."""

import json
import runpy
from pathlib import Path

import pytest

from trace_jax.io.files import write_json

ROOT = Path(__file__).resolve().parents[2]
STUDY = runpy.run_path(str(ROOT / "benchmarks" / "studies" / "tofu_small.py"))
RESULTS = runpy.run_path(str(ROOT / "scripts" / "results.py"))
LEVEL = 0.3


def of_runs(utilities, **about):
    """A study in which each method comes down to the level half-way between its last two evaluations."""
    runs, results = [], [{"method": method, "setting": "alpha=1"} for method in utilities]
    for method, kept in utilities.items():
        for seed in (0, 1):
            front = {"steps": [0, 10, 20], "forgetting": [1.0, 0.5, 0.1]}
            values = [1.0, kept + 0.01 * seed, kept + 0.01 * seed - 0.2]
            front |= {"utilities": {"mean_utility": values}}
            front |= {"measured": {name: [0.9, 0.5, 0.1] for name in STUDY["ALONG"]}}
            runs.append({"method": method, "setting": "alpha=1", "seed": seed, "test": front, **about})
    return {"comparisons": [{"level": LEVEL, "reading": "first", "results": results, **about}], "runs": runs}


@pytest.fixture
def found(tmp_path):
    for seed in (0, 1):
        known = {"target": 0.9, "retrained": 0.1}
        measured = {m: [{"name": n, "split": "test", "value": v} for n in STUDY["OF_MODELS"]] for m, v in known.items()}
        write_json(tmp_path / f"seed-{seed}" / "references.json", {"measurements": measured})
        diagnosis = {"held_out": 1.1 + 0.01 * seed, "noise": 1.2, "verdict": "absent"}
        write_json(tmp_path / f"seed-{seed}" / "statistics" / "diagnosis.json", diagnosis)
        for method in ("uniform", "trace", "trace_rows", "random_experts"):
            weighed = [{"name": "calibration_effective_sample_size", "value": 0.2}]
            write_json(tmp_path / f"seed-{seed}/methods/{method}@alpha=1/results.json", {"measurements": weighed})
    kept = {"uniform": 0.8, "trace": 0.9, "trace_rows": 0.7, "random_experts": 0.6}
    parts = {"weightings": of_runs(kept), "objectives": of_runs({"uniform": 0.5, "trace_rows": 0.5}, variant="npo")}
    return STUDY["summary"](tmp_path, parts)


def test_claims_are_read_where_runs_first_come_down_to_the_level(found):
    claims = {c["claim"]: c for c in found["claims"]}
    gains = [c for text, c in claims.items() if "where the statistic" in text]
    assert [c["value"] for c in gains] == pytest.approx([0.1, -0.1, 0.1])
    *halved, over = [c["value"] for text, c in claims.items() if "forget probability" in text]
    assert halved == pytest.approx([0.1, -0.1, 0.1])  # of runs that lose utility alike
    assert over == pytest.approx(-0.05)  # of gradient difference and NPO, where there is no difference
    verdicts = [RESULTS["verdict"](c) for c in gains]
    assert verdicts == ["established", "refuted", "established"]
    [routing] = [c for text, c in claims.items() if text.startswith("Routing")]
    assert RESULTS["verdict"](routing) == "refuted"  # 1.105 is below what counts as weak


def test_rows_hold_utility_at_half_of_the_probability_and_the_page_takes_it(found):
    [*_, weights, weightings, npo] = found["tables"]
    assert [row[0] for row in weights["rows"]] == ["uniform", "trace", "trace_rows", "random_experts"]
    assert weights["rows"][0][1]["value"] == 0.2 and weights["rows"][0][2] is None
    [first, *_] = weightings["rows"]
    assert first[-1] == "2/2" and first[2]["value"] == pytest.approx(0.78) and first[3] is None
    assert npo["title"].startswith("`npo`") and [row[0] for row in npo["rows"]] == ["uniform", "trace_rows"]
    study = json.loads(json.dumps(found)) | {"command": "x", "seconds": 60}
    assert "0.780" in RESULTS["section"](study)
    for figure in study["figures"]:
        assert RESULTS["draw"](figure).lstrip().startswith(b"<")
