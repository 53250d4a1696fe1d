"""Attacks as stages of a run: each leaves its lines, and is made anew only where it changed."""

import shutil

import pytest

import trace_jax
from tests.run.toy import experiment, numbers, on_one_device
from trace_jax.config import ConfigError
from trace_jax.data.sources import DataError
from trace_jax.evaluation.likelihood import NonFiniteScore
from trace_jax.io.files import read_json
from trace_jax.run.methods import run

TRAINING = {"steps": [1, 2], "batch_size": 2, "learning_rate": 1e-2}
ROUNDING = {"bits": [4], "blocks": []}
ATTACKS = {"relearning": TRAINING, "benign_relearning": TRAINING, "quantization": ROUNDING, "router_swap": {}}


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    with on_one_device():
        yield


@pytest.fixture(scope="module")
def attacked(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "attacked"
    run(experiment(data, methods=["uniform"], attacks=ATTACKS), path)
    return path


def test_every_attack_is_a_line_of_the_results(attacked):
    results = numbers(attacked)["methods"]["uniform"]
    lengths, others = ["1 steps", "2 steps"], {"quantization": ["4 bits"], "router_swap": ["original routers"]}
    points = {name: [p["at"] for p in a["points"]] for name, a in results["attacks"].items()}
    assert points == {"relearning": lengths, "benign_relearning": lengths, **others}
    usual = {(m["name"], m["split"]) for m in results["measurements"] if not m["name"].startswith(("routing", "cal"))}
    usual -= {("router_drift", "train")}
    for name, attack in results["attacks"].items():
        assert attack["measure"] == "forget_probability_ratio" and not attack["failed"]
        values = []
        for point in attack["points"]:
            assert {(m["name"], m["split"]) for m in point["measurements"]} == usual
            assert all(m["n"] > 0 and m["low"] <= m["value"] <= m["high"] for m in point["measurements"])
            read = {(m["name"], m["split"]): m["value"] for m in point["measurements"]}
            values.append(read[attack["measure"], "test"])
        assert values[attack["strongest"]] == max(values)
        assert attack == read_json(attacked / "methods/uniform/attacks" / f"{name}.json")
    assert results["attacks"]["quantization"]["settings"] == ROUNDING
    page = (attacked / "report.html").read_text()  # `tests/report` has what it shows of an attack
    assert all(f"after {name.replace('_', ' ')}, test split" in page for name in points)


def test_only_what_changed_is_attacked_again(data, attacked, tmp_path):
    path = shutil.copytree(attacked, tmp_path / "run")
    names = "model.safetensors", "results.json", "attacks/relearning.json", "attacks/quantization.json"
    files = {name: path / "methods/uniform" / name for name in names}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    again = trace_jax.attack(path, {"quantization": {"bits": [4], "blocks": ["nf4"]}})
    after = {name: file.stat().st_mtime_ns for name, file in files.items()}
    assert {name for name in files if before[name] != after[name]} == {"attacks/quantization.json"}
    frame = again.attacks().set_index(["method", "attack", "at", "split", "name"]).value.sort_index()
    assert frame.index.is_unique and set(frame.index.get_level_values("attack")) == set(ATTACKS)
    found = read_json(files["attacks/quantization.json"])["points"][1]["measurements"]
    rounded = frame["uniform", "quantization", "nf4"]
    assert {(m["split"], m["name"]): m["value"] for m in found} == rounded.to_dict()
    with pytest.raises(ConfigError, match="no setting of this name; did you mean 'router_swap'"):
        trace_jax.attack(path, {"routerswap": {}})
    run(experiment(data, methods=["uniform"]), path)  # none is asked for: none is reported
    assert numbers(path)["methods"]["uniform"]["attacks"] == {}
    assert "Under attack" not in (path / "report.html").read_text()


def test_an_attack_that_breaks_the_model_says_so(data, attacked, tmp_path, monkeypatch):
    from trace_jax.attacks.attack import RouterSwap

    def broken(attack, case):
        raise NonFiniteScore("the model gives NaN")

    path = shutil.copytree(attacked, tmp_path / "run")
    monkeypatch.setattr(RouterSwap, "points", broken)
    (path / "methods/uniform/attacks/router_swap.stage.json").unlink()
    run(experiment(data, methods=["uniform"], attacks=ATTACKS), path)
    attack = numbers(path)["methods"]["uniform"]["attacks"]["router_swap"]
    assert (attack["points"], attack["strongest"], attack["failed"]) == ([], None, "the model gives NaN")
    assert "the model gives NaN" in (path / "report.html").read_text()


def test_what_can_not_be_attacked_is_refused_before_anything_is_unlearned(data, attacked, tmp_path):
    config = experiment(data, attacks={"benign_relearning": {"source": str(tmp_path / "none.jsonl")}})
    with pytest.raises(DataError, match=r"none\.jsonl"):  # before anything is trained, too
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    path = shutil.copytree(attacked, tmp_path / "run")
    with pytest.raises(ConfigError, match="examples = 500: only"):
        run(experiment(data, methods=["trace_rows"], attacks={"prompting": {"examples": [500]}}), path)
    assert not (path / "methods/trace_rows").exists()
    with pytest.raises(ConfigError, match="did you mean 'router_swap'"):
        experiment(data, attacks={"routerswap": {}})
