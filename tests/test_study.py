"""A study runs every method at every setting and seed, continues when it was interrupted, and compares on test."""

import json

import pytest

from tests.test_pipeline import experiment
from trace_jax.evaluation.comparison import UnequalBudget
from trace_jax.files import read_json
from trace_jax.study import Trial, load_runs, run_study, seed_config, trial_method, trials, write_study


@pytest.fixture(scope="module")
def config(data):
    study = {"methods": ["uniform", "trace_rows"], "seeds": [0, 1], "alphas": [1.0, 4.0], "workers": 2}
    return experiment(data, study=study)


def test_trials_give_every_method_the_same_budget(config):
    found = list(trials(config))
    assert len(found) == 2 * 2 * 2 and len({(t.seed, t.label) for t in found}) == 8
    assert trial_method(config, found[0]).unlearning.alpha == 1.0


def test_a_seed_draws_data_and_model_anew(config):
    assert (seed_config(config, 5).seed, seed_config(config, 5).data.seed) == (5, 5)


def test_study_runs_resumes_and_compares(config, tmp_path):
    text = run_study(config, tmp_path / "study")
    assert "trace_rows" in text and "2/2" in text
    saved = read_json(tmp_path / "study" / "study.json")
    assert len(saved["runs"]) == 8 and set(saved["seconds_per_step"]) == {"uniform", "trace_rows"}
    result = {r["method"]: r for r in saved["comparisons"][0]["results"]}
    assert result["uniform"]["gains"]["mean_utility"]["value"] == 0.0
    assert json.dumps(saved)
    (tmp_path / "study" / "seed-1" / "methods" / "trace_rows@alpha=4" / "unlearning.stage.json").unlink()
    assert run_study(config, tmp_path / "study").split("\n")[3:] == text.split("\n")[3:]


def test_a_missing_run_is_an_unequal_budget(config, tmp_path):
    run_directory = tmp_path / "seed-0" / "methods"
    front = {"steps": [0, 1], "forgetting": [1.0, 0.5], "utilities": {"mean_utility": [1.0, 0.9]}, "measured": {}}
    jobs = [Trial(m, 0, f"alpha={a}", {}) for m in ("uniform", "trace_rows") for a in (1, 4)]
    for trial in jobs[:3]:
        (run_directory / trial.label).mkdir(parents=True)
        (run_directory / trial.label / "results.json").write_text(
            json.dumps({"fronts": {"validation": front, "test": front}, "seconds_per_step": 1.0})
        )
    assert len(load_runs(tmp_path, jobs)) == 3
    with pytest.raises(UnequalBudget, match="unequal budgets"):
        write_study(config, tmp_path, jobs)
