"""Verdicts of claims, what stands in the pages, and that the pages are up to date with benchmarks/results/studies."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = runpy.run_path(str(ROOT / "scripts" / "results.py"))
CLAIM = {"claim": "It gains.", "measure": "gain", "value": 0.1, "n": 8, "over": "8 seeds", "place": "readme"}
STUDY = {
    "question": 1,
    "name": "toy",
    "title": "Does it gain, or not?",
    "command": "python toy.py",
    "seconds": 600,
    "seeds": [0, 1],
    "environment": {"cpu": "A processor, AVX2", "cores": 2},
    "claims": [
        CLAIM | {"low": 0.05, "high": 0.2, "holds": "above", "bound": 0.0},
        CLAIM | {"claim": "It loses.", "low": -0.1, "high": 0.3, "holds": "below", "bound": 0.0, "place": None},
    ],
    "tables": [
        {"title": "Gains", "columns": ["method", "gain"], "rows": [["a|b", CLAIM | {"low": 0, "high": 1}], ["c", None]]}
    ],
    "figures": [],
    "leaderboard": [
        {
            "benchmark": "b",
            "about": "Of b.",
            "method": m,
            "setting": "only",
            "seeds": 2,
            "score": s,
            "numbers": {"x": 2.0},
        }
        for m, s in (("worse", {"value": 0.5}), ("better", {"value": 0.9, "low": 0.8, "high": 1.0}))
    ],
}


@pytest.mark.parametrize(
    ("holds", "low", "high", "expected"),
    [
        ("above", 0.1, 0.3, "established"),
        ("above", -0.1, 0.3, "open"),
        ("above", -0.3, -0.1, "refuted"),
        ("below", -0.3, -0.1, "established"),
        ("below", 0.1, 0.3, "refuted"),
        ("above", None, None, "open"),
    ],
)
def test_verdict_is_what_the_whole_interval_says(holds, low, high, expected):
    claim = {"value": 0.2, "low": low, "high": high, "holds": holds, "bound": 0.0}
    assert RESULTS["verdict"](claim) == expected


def test_pages_get_their_blocks_and_keep_what_is_around_them(tmp_path):
    (tmp_path / "benchmarks" / "results" / "studies").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shapes = {"lines": {"x": [1, 2], "y": [0.1, 0.2], "low": [0, 0.1], "high": [0.2, 0.3]}}
    shapes |= {"points": {"x": [1], "y": [2]}, "bars": {"x": ["a", "b"], "y": [1, -2]}}
    about = {"title": "T", "caption": "C", "x": "x", "y": "y"}
    figures = [about | {"name": k, "kind": k, "series": [{"name": "s", **s}]} for k, s in shapes.items()]
    map_ = {"name": "map", "kind": "map", "values": [[1.0, None]], "x_ticks": ["a", "b"], "y_ticks": ["c"]}
    path = tmp_path / "benchmarks" / "results" / "studies" / "toy.json"
    path.write_text(json.dumps(STUDY | {"figures": [*figures, about | map_]}))
    mark = "<!-- {0}: written by scripts/results.py -->\nold\n<!-- end of {0} -->\n"
    page = tmp_path / "docs" / "results.md"
    page.write_text(
        "before\n" + "between\n".join(mark.format(n) for n in ("claims", "headlines", "leaderboard", "toy"))
    )
    files = RESULTS["written"](tmp_path)
    text = files[page].decode()
    assert text.startswith("before\n") and text.count("between\n") == 3 and "old" not in text
    row = "| It gains. | **established** | 0.100 [0.050, 0.200] | gain |"
    assert f"| [1](#does-it-gain-or-not) {row}\n" in text and f"{row} 8 seeds |\n" in text
    assert "2 claims: 1 established, 0 refuted, 1 open." in text and text.count("It loses.") == 1, "its section alone"
    assert "- **established**: It gains. (gain: 0.100 [0.050, 0.200]; 8 seeds).\n" in text
    assert "| a\\|b | 0.100 [0.000, 1.000] |" in text and "| c | - |" in text
    assert text.index("| better | only | 2 | 0.900 [0.800, 1.000] | 2.000 |") < text.index("| worse |")
    assert "10 minutes on 2 cores (A processor, AVX2); seeds 0, 1." in text
    for name in ("lines", "points", "bars", "map"):
        svg = tmp_path / "docs" / "images" / "studies" / f"{name}.svg"
        drawn = files[svg]
        assert b"<svg" in drawn
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_bytes(drawn.replace(b"<svg", b"<svg class='another version of matplotlib'"))
    page.write_bytes(files[page])
    assert not RESULTS["outdated"](files)
    svg.write_bytes(drawn.replace(b"<!-- of ", b"<!-- of other data: "))
    page.write_text("edited by hand")
    assert set(RESULTS["outdated"](files)) == {svg, page}


def test_the_leaderboard_shows_what_relearning_brings_back_where_it_was_measured():
    back = {"robustness": {"b": {"better": {"value": 0.3, "low": 0.2, "high": 0.4}}}}
    table = RESULTS["leaderboard"]({"toy": STUDY, "robustness": back})
    assert "| 2.000 | forgetting score after relearning |" in table.replace("| x |", "| 2.000 |")
    assert "| 2.000 | 0.300 [0.200, 0.400] |" in table and "| worse | only | 2 | 0.500 | 2.000 | - |" in table


def test_the_pages_of_this_project_are_up_to_date():
    assert not RESULTS["outdated"](RESULTS["written"](ROOT)), "run python scripts/results.py"
