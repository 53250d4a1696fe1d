"""What relearning brings back: the settings that are run, and what is made of scores that are known."""

import dataclasses
import json

import pytest
import robustness

import trace_jax as tj
from trace_jax.run.experiment import METHODS

BACK = {"uniform": 0.9, "trace_rows": 0.7, "trace": 0.9, robustness.CONTROL: 0.5}


@pytest.mark.parametrize("benchmark", robustness.BENCHMARKS)
def test_every_method_runs_as_the_main_table_chose_keeping_a_state_that_has_forgotten(benchmark):
    config, main = robustness.experiment(benchmark, 11), tj.load_config(f"{benchmark}_study")
    assert (config.seed, config.data.seed, config.target.retrained) == (11, 11, True)
    assert main.evaluation.levels[0] == robustness.LEVEL == config.unlearning.keep.forgetting
    assert dataclasses.replace(config.unlearning, keep=main.unlearning.keep) == main.unlearning
    assert set(robustness.SEEDS) <= set(main.study.seeds)
    chosen = robustness.settings(benchmark)
    assert {"uniform", "trace", "trace_rows", "random_experts", "ngram", "oracle"} <= set(chosen) <= set(METHODS)
    for method, setting in chosen.items():
        made = config.method(method, unlearning=setting).unlearning
        assert (made.alpha, made.learning_rate) == (setting["alpha"], setting["learning_rate"])


def scores():
    before = {"uniform": 0.4, "trace_rows": 0.3, "trace": 0.3, robustness.CONTROL: 0.4}
    of = {m: {seed: (before[m], back + 0.01 * seed) for seed in (0, 1, 2)} for m, back in BACK.items()}
    return {"handbook": of}


def test_claims_say_who_gives_back_less_and_whether_more_than_one_that_never_knew():
    made = robustness.summary(scores())
    claims = {c["claim"]: c for c in made["claims"]}
    assert [c["value"] for c in claims.values()] == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.4, 0.2])
    assert [c["holds"] for c in claims.values()] == ["below"] * 4 + ["above"] * 2
    [table] = made["tables"]
    assert [row[0] for row in table["rows"]] == ["`uniform`", "`trace_rows`", "`trace`", robustness.CONTROL]
    [figure] = made["figures"]
    assert [series["name"] for series in figure["series"]] == list(robustness.WHEN)
    assert set(made["robustness"]["handbook"]) == {"`uniform`", "`trace_rows`", "`trace`"}
    assert made["robustness"]["handbook"]["`uniform`"]["value"] == pytest.approx(0.91)


def test_scores_are_those_of_the_strongest_attack_and_the_control_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "settings", lambda _: {"uniform": {}})
    measure = "forget_accuracy"

    def told(value):
        return [{"name": measure, "value": value, "n": 8, "low": None, "high": None, "split": "test", "source": "x"}]

    points = [{"measurements": told(a), "retrained": told(b)} for a, b in ((0.6, 0.3), (0.8, 0.2))]
    place = tmp_path / "handbook" / "seed-10"
    for file, value in (
        ("references.json", {"measurements": {"retrained": told(0.1)}}),
        ("methods/uniform/results.json", {"measurements": told(0.4)}),
        ("methods/uniform/attacks/relearning.json", {"measure": measure, "strongest": 1, "points": points}),
    ):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(json.dumps(value))
    found = robustness.measured(tmp_path, "handbook", [10])
    assert found == {"uniform": {10: (0.4, 0.8)}, robustness.CONTROL: {10: (0.1, 0.3)}}
