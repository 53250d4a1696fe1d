"""The study of recorded routing, on captures of three texts of which two use the same experts."""

import json

import numpy as np
import pytest
import real_routing as study

import trace_jax as tj

EXPERTS = 8
SCORES = {"ore": [3, 3, 1, 0, 0, 0, 0, 0], "metal": [3, 3, 1, 0, 0, 0, 0, 0], "song": [0, 0, 0, 0, 1, 3, 3, 0]}


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """Two layers, two experts a token: 20 rows of 60 tokens of each text."""
    files, rng = [], np.random.default_rng(0)
    for name, scores in SCORES.items():
        noisy = np.array(scores) + rng.gumbel(size=(2, 1200, EXPERTS))
        files.append(tmp_path_factory.mktemp("captures") / f"{name}.npz")
        np.savez(files[-1], expert_ids=np.argsort(-noisy, axis=2)[..., :2], row_lengths=np.full(20, 60))
    return files


def test_a_study_says_what_weights_reach_and_where_they_go(captures, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "workers", lambda: 1)
    given = ["--workdir", str(tmp_path), "--output", str(tmp_path / "study.json"), "--num-experts", str(EXPERTS)]
    given += ["--seeds", "0", "--captures", *map(str, captures)]
    study.main(given)
    written = json.loads((tmp_path / "study.json").read_text())
    reached = {name: np.array(x["all"]) for name, x in written["raw"]["closed"]["held out"].items()}  # [sizes, tasks]
    ore, metal, song = reached["all/chi2/token"].T
    assert min(ore[0], metal[0]) > 0.8  # half of what is retained is routed alike
    assert (song < 0.6).all()  # none is: the tokens that come nearest by chance are all there is
    for method, x in written["raw"]["closed"]["in sample"].items():
        sample = np.array(x["sample"])
        assert (sample > 0.99 * np.array(study.SIZES)[:, None]).all(), method  # equal terms
    assert np.allclose(
        np.array(written["raw"]["closed"]["in sample"]["all/chi2/token"]["sample"])[2:, 2], [0.2, 0.1, 0.05]
    )
    columns, rows = (written["tables"][2][name] for name in ("columns", "rows"))
    going = {tuple(row[:2]): dict(zip(columns[2:], row[2:], strict=True)) for row in rows}
    assert going["ore", "all experts, chi-square, tokens"]["metal"] > 0.85
    assert going["ore", "all experts, chi-square, tokens"]["ore"] is None
    mismatch = {row[0]: row[1] for row in written["tables"][0]["rows"]}
    assert mismatch["song"] == "present"
    assert all(claim["low"] <= claim["value"] <= claim["high"] and claim["n"] == 3 for claim in written["claims"])

    monkeypatch.setattr(study, "unit", lambda *job: pytest.fail("what was measured is measured again"))
    study.main(given)
    again = json.loads((tmp_path / "study.json").read_text())
    assert (again["claims"], again["raw"]) == (written["claims"], written["raw"])


def test_the_former_calibrator_moves_all_frequencies_by_one_share_of_their_way(captures):
    ore, metal, song = (tj.read_capture(path, EXPERTS) for path in captures)
    retain, source = study.joined([metal, song])
    assert np.bincount(source).tolist() == [1200, 1200] and len(np.unique(retain.rows)) == 40
    forget, kept = (study.statistics(text, EXPERTS) for text in (ore, retain))
    selected = tj.select_experts(forget, kept, rule="difference", top=2)
    way = (forget.frequency - kept.frequency)[selected]
    for size, weights in zip(study.SIZES, study.strength_road(forget, kept, retain, selected), strict=True):
        reached = study.weighted_frequency(retain.indices, weights, EXPERTS)
        share = ((reached - kept.frequency)[selected]) / way
        assert np.ptp(share) < 1e-6 and 0 < share[0] <= 1
        sample = study.effective_sample_size(weights)
        assert sample == pytest.approx(size, rel=1e-2) or (share[0] > 0.999 and sample > size)


def test_a_clone_of_the_named_repository_becomes_captures(tmp_path):
    rng = np.random.default_rng(1)
    chosen = np.argsort(rng.random((4, 26, 5, 64)), axis=3)[..., :6]  # five tokens a task, of rows of two and three
    for task, layers in zip(study.TASKS, chosen, strict=True):
        directory = tmp_path / "results" / "expert_scores" / task
        directory.mkdir(parents=True)
        for layer, tokens in enumerate(layers, start=1):
            lines = ["\t".join(map(str, part.ravel())) + "\t\t0.1\t0.2" for part in (tokens[:2], tokens[2:])]
            (directory / f"expert_weights_{layer}.txt").write_text("\n".join(lines) + "\n")
    for path, layers in zip(study.captures_of_esft(tmp_path, tmp_path / "work"), chosen, strict=True):
        read = tj.read_capture(path, 64)
        assert np.array_equal(read.indices, layers) and read.rows.tolist() == [0, 0, 1, 1, 1]
