"""What summary.py says of studies whose numbers are known: fronts are straight, seeds differ by known amounts."""

import json

import numpy as np
import pytest
import summary

LIFT = {10: -0.01, 11: 0.0, 12: 0.01}  # of every utility, by seed: a paired difference has none of it
BOARD = {"forgetting": "forget_accuracy", "utilities": {"neighbour_accuracy": True, "general_utility": False}}


def run(method, variant, seed, at_half, robustness=None):
    """A front from (1, 1) that has neighbour accuracy `at_half` at a forgetting of .5, and loses nothing in general."""
    forgetting = np.array([1.0, 0.6, 0.2])
    neighbour = 1 - (1 - forgetting) * 2 * (1 - at_half - LIFT[seed])
    utilities = {"neighbour_accuracy": neighbour, "general_utility": np.ones(3), "mean_utility": (neighbour + 1) / 2}
    test = {"steps": [0, 3, 6], "forgetting": forgetting, "utilities": utilities, "measured": {}}
    front = json.loads(json.dumps(test, default=np.ndarray.tolist))
    about = {"method": method, "setting": "alpha=8", "seed": seed, "robustness": robustness or {}}
    return {"variant": variant, **about, "test": front}


@pytest.fixture
def study(tmp_path):
    def make(kept, robustness=lambda *_: {}, name="handbook_study"):
        """`kept`: neighbour accuracy at the level, by (variant, method)."""
        path = tmp_path / name
        runs = [run(m, v, s, at, robustness(v, m, s)) for (v, m), at in kept.items() for s in LIFT]
        number = {"value": 0.05, "low": 0.01, "high": 0.09, "n": 3}
        result = {
            "setting": "alpha=8",
            "seeds": list(LIFT),
            "missed": [],
            "bracket": 0.4,
            "tried": {"alpha=8": [1, 0.9]},
        }
        result |= {"over_seeds": {"gains": {"mean_utility": number}}}
        comparisons = [
            {"variant": v, "level": 0.5, "reading": r, "results": [{"method": m, **result} for w, m in kept if w == v]}
            for v in dict.fromkeys(v for v, _ in kept)
            for r in ("first", "best")
        ]
        told = {"name": name, "benchmark": "handbook", "board": BOARD, "runs": runs, "comparisons": comparisons}
        told["seconds_per_step"] = {m: 0.2 for _, m in kept}
        config = {"study": {"seeds": list(LIFT), "tuning_seeds": [100]}, "evaluation": {"levels": [0.5]}}
        (path / "seed-10").mkdir(parents=True)
        for file, value in (
            ("study", told),
            ("config", {"config": config}),
            ("environment", {"cpu": "x", "command": "y"}),
        ):
            (path / f"{file}.json").write_text(json.dumps(value))
        times = "".join(json.dumps({"time": t}) + "\n" for t in (0, 10, 20, 5000, 5007))  # a pause
        (path / "seed-10" / "metrics.jsonl").write_text(times)
        return path

    return make


def told(question, *paths):
    """The summary, and its claims by what they say, as (value, low, high)."""
    made = json.loads(json.dumps(summary.summary(question, paths), allow_nan=False))
    return made, {c["claim"]: (c["value"], c["low"], c["high"]) for c in made["claims"]}


def test_the_main_table(study):
    kept = {
        ("", "uniform"): 0.6,
        ("", "trace_rows"): 0.8,
        ("", "trace"): 0.7,
        ("", "random_experts"): 0.82,
        ("", "oracle"): 0.9,
    }
    made, claims = told("main", study(kept))
    gains = [(1.8 + lift) / (1.6 + lift) - 1 for lift in LIFT.values()]
    value, low, high = claims["On handbook, `trace_rows` keeps more than tuned uniform at the same forgetting"]
    assert value == pytest.approx(np.mean(gains), abs=1e-4) and 0 < low < value < high
    exact = claims["On handbook: Selected experts keep more than as many random ones"]
    assert exact == pytest.approx((-0.01, -0.01, -0.01)), "paired by seed"
    assert claims["On handbook: The oracle, told which rows are neighbours, keeps more"][0] == pytest.approx(0.05)
    assert (made["seconds"], made["seeds"], made["environment"]) == (27, [10, 11, 12], {"cpu": "x"})
    row = next(row for row in made["tables"][0]["rows"] if row[0] == "`trace`")
    assert row[1:4] == ["alpha=8", "3", 0.4] and row[4]["value"] == pytest.approx(0.7)
    fronts = {s["name"]: s for s in made["figures"][1]["series"]}
    assert fronts["trace_rows"]["x"] == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert fronts["trace_rows"]["y"] == pytest.approx([0.98, 0.96, 0.94, 0.92, 0.9, 0.88])
    assert {row["method"] for row in made["leaderboard"]} == {f"`{m}`" for _, m in kept}
    assert made["leaderboard"][0]["about"].startswith("Where a run first")
    assert len(made["raw"]["runs"]["handbook_study"]) == 15 and "robustness" in made["raw"]["runs"]["handbook_study"][0]


def test_dose_and_what_trains(study):
    kept = {(f"top {k}", m): at for k, at in ((1, 0.7), (16, 0.8)) for m, at in (("uniform", 0.6), ("trace_rows", at))}
    kept |= {(f"top {k}", m): at for k in (1, 16) for m, at in (("random_experts", 0.7), ("least_experts", 0.5))}
    made, claims = told("dose", study(kept))
    assert claims["With 1 of 64 experts a layer, selected ones keep more than random ones"] == (0, 0, 0)
    assert claims["Over all numbers of experts, selected ones keep more than random ones"][0] == pytest.approx(0.025)
    assert claims["16 selected experts a layer keep more than 1"] == pytest.approx((0.05,) * 3)
    assert claims["With 1 of 64 experts a layer, selected ones keep more than least critical ones"][0] == 0.1
    assert [s["x"] for s in made["figures"][0]["series"]] == [[1, 16]] * 3
    kept = {(v, m): at for v, at in (("all", 0.8), ("lora", 0.7)) for m, at in (("uniform", 0.6), ("trace_rows", at))}
    made, claims = told("trainable", study(kept, name="trains"))
    assert [row[-2] for row in made["tables"][0]["rows"]] == [None, {"value": 0.05, "low": 0.01, "high": 0.09}] * 2
    assert claims["With `trace_rows`, training lora keeps more than training all"] == pytest.approx((-0.05,) * 3)


def test_what_never_comes_down_stays_open(study):
    """Seeds that miss the level are in no number, and a claim of none has no interval."""
    path = study({("", "uniform"): 0.6, ("", "trace_rows"): 0.8})
    whole = json.loads((path / "study.json").read_text())
    for one in whole["runs"]:
        if one["method"] == "trace_rows":
            one["test"]["forgetting"] = [1.0, 0.9, 0.8]
    (path / "study.json").write_text(json.dumps(whole))
    _, claims = told("main", path)
    assert claims["On handbook, `trace_rows` keeps more than tuned uniform at the same forgetting"] == (None,) * 3


def test_attacks_are_paired_by_seed_and_averaged_over_objectives(study):
    def attacked(variant, method, seed):
        back = 0.6 + LIFT[seed] - 0.1 * (method == "trace_rows") - 0.1 * (variant == "npo")
        control = {"attack.relearning.unlearned": back, "attack.relearning.retrained": 0.3 + LIFT[seed]}
        known = {"unlearned.membership_routing_auc": 0.8 + LIFT[seed], "retrained.membership_routing_auc": 0.6}
        return {"unlearned.forget_accuracy": 0.5, **control, **known, "attack.router_swap.unlearned": 0.7}

    kept = {(v, m): 0.7 for v in ("rmu", "npo") for m in ("uniform", "trace_rows")}
    made, claims = told("objectives", study(kept, attacked))
    less = "Over objectives, relearning brings back less from `trace_rows` than from uniform"
    assert claims[less] == pytest.approx((-0.1,) * 3)
    assert claims["After relearning, a model unlearned with `uniform` knows more than one that never knew"][0] == 0.25
    [told_apart] = [text for text in claims if text.startswith("Routing tells") and "`uniform`" in text]
    assert claims[told_apart][0] == pytest.approx(0.2)
    rows = made["tables"][1]["rows"]
    assert [row[3]["value"] for row in rows] == pytest.approx([0.6, 0.5, 0.5, 0.4])
    assert [number["value"] for number in rows[0][-2:]] == pytest.approx([0.8, 0.6])


def test_patching_tells_critical_from_random_experts(study):
    def put_back(_, method, seed):
        numbers = {"drift.ratio": 0.8 + LIFT[seed], "drift.difference": 0.7}
        numbers |= {"target.neighbour_accuracy": 1.0, "unlearned.neighbour_accuracy": 0.75}
        for kind, much in (("critical", 0.03), ("random", 0.01), ("least", 0.0)):
            numbers |= {f"returned.{kind}.{k}.neighbour_accuracy": much * k + LIFT[seed] for k in (1, 4)}
        return numbers

    kept = {("", m): 0.7 for m in ("uniform", "trace")}
    made, claims = told("patching", study(kept, put_back, "patching_fine"))
    more = "On the fine model, 4 critical experts a layer bring back more than 4 random ones (uniform)"
    assert claims[more] == pytest.approx((0.08,) * 3)
    assert claims["On the fine model, experts that forget text uses more drift further (trace)"][0] == pytest.approx(
        0.8
    )
    assert made["figures"][0]["series"][0]["y"] == pytest.approx([0.03, 0.12])
    assert [c["claim"].split()[-1] for c in made["claims"] if c["place"]] == ["(uniform)"] * 4
