"""A study runs every method at every setting and seed, continues when it was interrupted, and compares on test."""

import dataclasses
import shutil
from unittest import mock

import numpy as np
import pytest

from tests.run.toy import experiment
from trace_jax.attacks import AttacksConfig
from trace_jax.attacks.attack import RouterSwap
from trace_jax.config import ConfigError
from trace_jax.io.files import encode, read_json, write_json
from trace_jax.routing import statistics, weights
from trace_jax.run.directory import open_workdir
from trace_jax.run.result import open_run
from trace_jax.run.study import prepare_seed, run_study, run_trial, trials, write_study

OBJECTIVES = ("gradient_difference", "npo")
STUDY = {"methods": ["uniform", "trace_rows"], "seeds": [0], "alphas": [1.0, 4.0]}


@pytest.fixture(scope="module")
def config(data):
    return experiment(data, study={**STUDY, "seeds": [0, 1], "workers": 2})


def test_every_variant_has_its_own_grid_and_only_settings_that_it_reads(data):
    ascent = {"name": "gradient_ascent", "nll_ceiling": 5.0}
    variants = {
        "npo": {"objective": {"name": "npo", "beta": [0.1, 0.5]}, "learning_rate": 0.02},
        "gradient_ascent": {"objective": ascent, "learning_rate": [1e-3, 2e-3]},
        "rmu": {"objective": {"name": "rmu", "layer": 2}, "alpha": 2.0},
    }
    variants = {name: {"unlearning": given} for name, given in variants.items()}
    config = experiment(data, study={**STUDY, "variants": variants}, unlearning={"learning_rate": 0.003})
    jobs = list(trials(config))
    labels = {t.label for t in jobs if t.method == "uniform"}
    assert labels == {
        *(f"npo+uniform@beta={b:g},alpha={a}" for b in (0.1, 0.5) for a in (1, 4)),
        *(f"gradient_ascent+uniform@lr={rate:g}" for rate in (1e-3, 2e-3)),
        "rmu+uniform@only",
    }
    assert len(jobs) == 2 * len(labels)
    methods = {t.label: t.made(config).unlearning for t in jobs}
    assert methods["npo+uniform@beta=0.5,alpha=4"].learning_rate == 0.02
    assert methods["rmu+uniform@only"].learning_rate == 0.003
    assert methods["gradient_ascent+uniform@lr=0.002"].objective.nll_ceiling == 5.0
    rmu = methods["rmu+trace_rows@only"]
    assert (rmu.alpha, rmu.objective.layer, rmu.retain_loss.name, rmu.trainable.name) == (
        2.0,
        2,
        "hidden",
        "down_projections",
    )
    assert rmu.steps == config.unlearning.steps


def test_study_of_variants_has_a_table_with_a_line_for_each(data, tmp_path):
    """Read off files that hold as much of finished runs as a comparison needs."""
    config = experiment(
        data, study={**STUDY, "alphas": [1.0], "variants": {o: {"unlearning": {"objective": o}} for o in OBJECTIVES}}
    )
    jobs = list(trials(config))
    open_workdir(config, tmp_path)
    front = {"steps": [0, 1], "forgetting": [1.0, 0.5], "utilities": {"mean_utility": [1.0, 0.9]}, "measured": {}}
    results = {"fronts": {"validation": front, "test": front}, "seconds_per_step": 1.0}
    results["board"] = encode(config.data.board)
    for trial in jobs:
        write_json(tmp_path / f"seed-{trial.seed}" / "methods" / trial.label / "results.json", results)
    assert write_study(config, tmp_path, jobs).startswith("gradient_difference\n\nTest split")
    saved = read_json(tmp_path / "study.json")
    assert list(dict.fromkeys(c["variant"] for c in saved["comparisons"])) == ["gradient_difference", "npo"]
    table = (tmp_path / "tables.md").read_text().split("\n\n")[1].splitlines()
    assert table[0].startswith("| variant | uniform | trace_rows | gain of trace_rows |")
    assert [line.split("|")[1].strip() for line in table[2:]] == ["`gradient_difference`", "`npo`"]
    assert "npo: trace_rows" in (tmp_path / "report.html").read_text()


def test_a_method_that_reads_nothing_of_what_a_variant_changes_runs_once_for_all(data):
    """Uniform has no experts to select; a rate of a variant's own is another run of it."""
    rules = {f"top {k}": {"calibration": {"rule": {"name": "difference", "top": k}}} for k in (1, 2)}
    study = {**STUDY, "alphas": [1.0], "variants": rules | {"slow": {"unlearning": {"learning_rate": 1e-4}}}}
    jobs = list(trials(config := experiment(data, study=study)))
    labels = ["uniform@alpha=1", "top 1+trace_rows@alpha=1", "uniform@alpha=1", "top 2+trace_rows@alpha=1"]
    assert [t.label for t in jobs] == [*labels, "slow+uniform@alpha=1", "slow+trace_rows@alpha=1"]
    assert [t.made(config).calibration.weighting.rule.top for t in jobs if t.method == "trace_rows"] == [1, 2, 4]
    wrong = {"fast": {"unlearning": {"learning_rates": 1.0}}}
    with pytest.raises(ConfigError, match=r"study\.variants\.fast: .*learning_rates"):
        run_study(experiment(data, study={**STUDY, "variants": wrong}), "nowhere")


def test_attacks_are_no_part_of_a_study_without_tuning_seeds(config, tmp_path):
    attacked = dataclasses.replace(config, attacks=AttacksConfig(router_swap=RouterSwap()))
    with pytest.raises(ConfigError, match="whose settings tuning seeds chose"):
        run_study(attacked, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_study_runs_resumes_and_compares(config, finished, tmp_path):
    """Every method has the same budget: two seeds, two settings."""
    jobs = list(trials(config))
    assert len(jobs) == 2 * 2 * 2 == len({(t.seed, t.label) for t in jobs})
    assert jobs[0].changes["unlearning"]["alpha"] == 1.0
    open_workdir(config, tmp_path / "study")
    shutil.copytree(finished[0], tmp_path / "study/seed-0")  # whose target model is that of seed 0
    text = run_study(config, tmp_path / "study")
    assert "trace_rows" in text and "2/2" in text
    saved = read_json(tmp_path / "study" / "study.json")
    assert len(saved["runs"]) == 8 and set(saved["seconds_per_step"]) == {"uniform", "trace_rows"}
    result = {r["method"]: r for r in saved["comparisons"][0]["results"]}
    assert result["uniform"]["gains"]["mean_utility"]["value"] == 0.0
    opened = open_run(tmp_path / "study")
    assert opened.methods[0] == "seed-0/uniform@alpha=1" and len(opened.methods) == 8 and "2/2" in opened.table()
    frame = opened.metrics().set_index(["seed", "method", "variant", "step", "split", "name"]).sort_index()
    assert frame.index.is_unique and len(frame.loc[0, "target", "", 0]) == len(frame.loc[1, "target", "", 0])
    along = frame.loc[1, "trace_rows", "alpha=4", :, "test", "forget_probability_ratio"]
    front = next(
        r["test"] for r in saved["runs"] if (r["seed"], r["method"], r["setting"]) == (1, "trace_rows", "alpha=4")
    )
    assert along.index.tolist() == front["steps"] and along.value.tolist() == front["forgetting"]
    target, made = (opened.model(f"seed-1/{label}").params for label in ("target", "trace_rows@alpha=4"))
    assert (target["embed"] != made["embed"]).any()
    (tmp_path / "study" / "seed-1" / "methods" / "trace_rows@alpha=4" / "unlearning.stage.json").unlink()
    alone = dataclasses.replace(config, study=dataclasses.replace(config.study, workers=1))
    assert run_study(alone, tmp_path / "study").split("\n")[3:] == text.split("\n")[3:]


def test_a_study_routes_the_retain_corpus_once_and_solves_the_same_weights_once(data, tmp_path, monkeypatch):
    """Three methods, two alphas, one solve: `row_weights` and `permuted` use that of `trace_rows`."""
    study = {**STUDY, "methods": ["trace_rows", "row_weights", "permuted"]}
    config = experiment(data, study=study, unlearning={"evaluate_every": 6})
    passes, route, solve = [], statistics.map_batches, mock.Mock(wraps=weights.match_frequencies)

    def routed(fn, params, config, batches, **keywords):
        batches = list(batches)
        passes.append((params, sum(len(tokens) for tokens, *_ in batches)))
        return route(fn, params, config, batches, **keywords)

    monkeypatch.setattr(statistics, "map_batches", routed)
    monkeypatch.setattr(weights, "match_frequencies", solve)
    open_workdir(config, tmp_path)
    prepare_seed(tmp_path, 0)
    for trial in trials(config):
        run_trial(tmp_path, trial)
    with np.load(tmp_path / "seed-0/statistics/retain.npz") as arrays:
        tokens = int(arrays["tokens"])
    target, forget_rows = passes[0]
    assert [rows for model, rows in passes if model is target][1:] == [passes[1][1], min(forget_rows, 8)]
    assert passes[1][1] != forget_rows and len(passes) == 3 + 2 * 6, "and each unlearned model for its metrics"
    assert solve.call_count == 1 and solve.call_args.args[0].indices.shape[1] == tokens
    assert len(list((tmp_path / "seed-0/calibrations").iterdir())) == 2


def test_tuning_seeds_run_the_grid_and_fresh_ones_what_was_chosen(config, finished, tmp_path):
    """These alone are attacked, and have original experts put back. A study that is interrupted continues there."""
    study = dataclasses.replace(config.study, tuning_seeds=(1,), seeds=(0,))
    attacks, evaluation = AttacksConfig(router_swap=RouterSwap()), dataclasses.replace(config.evaluation, patching=True)
    tuned = dataclasses.replace(config, study=study, attacks=attacks, evaluation=evaluation)
    path = tmp_path / "study"
    open_workdir(tuned, path)
    shutil.copytree(finished[0], path / "seed-0")
    text = run_study(tuned, path)
    made = {seed: [p.name for p in sorted((path / f"seed-{seed}" / "methods").glob("*@*"))] for seed in (0, 1)}
    saved = read_json(path / "study.json")
    chosen = {f"{r['method']}@{r['setting']}" for c in saved["comparisons"] for r in c["results"]}
    assert set(made[0]) == chosen and len(made[1]) == 4 and set(made[0]) < set(made[1])
    assert {run["seed"] for run in saved["runs"]} == {0} and saved["comparisons"][0]["tuning_seeds"] == [1]
    assert all(set(r["tried"]) == {"alpha=1", "alpha=4"} for r in saved["comparisons"][0]["results"])
    scored = {seed: {f.stem for f in path.glob(f"seed-{seed}/methods/*/scores/*.npz")} for seed in (0, 1)}
    assert scored[1] == {"text"} and scored[0] >= {"text", "verbatim"}, "of tuning seeds fronts are read alone"
    assert "settings chosen on seed 1" in text and "chosen of 2 on seed 1" in (path / "report.html").read_text()
    assert len(list(path.glob("seed-*/methods/*/attacks/router_swap.json"))) == 2 == len(saved["robustness"])
    for run, mean in zip((r for r in saved["runs"] if r["robustness"]), saved["robustness"], strict=True):
        directory, numbers = path / f"seed-{run['seed']}/methods/{run['label']}", run["robustness"]
        point = read_json(directory / "attacks/router_swap.json")["points"][0]
        of_test = {m["name"]: m["value"] for m in point["measurements"] if m["split"] == "test"}
        assert numbers["attack.router_swap.unlearned"] == of_test["forget_probability_ratio"]
        put = read_json(directory / "patching.json")
        assert numbers.get("drift.ratio") == put["correlation"]["ratio"]["value"]  # None of fewer than ten experts
        back = next(m for m in put["models"] if m["kind"] == "all")["returned"]["neighbour_utility"]["value"]
        assert numbers["returned.all.4.neighbour_utility"] == back and numbers["target.general_utility"] == 1.0
        assert mean["method"] == run["method"]
        assert {name: number["value"] for name, number in mean["numbers"].items()} == numbers
    assert "| attack.router_swap.unlearned |" in (path / "tables.md").read_text()
    shutil.rmtree(path / "seed-0/methods" / made[0][0])
    assert run_study(tuned, path).split("\n\n")[:2] == text.split("\n\n")[:2]
