"""One expert of each layer is damaged by hand: drift names it, and putting it back gives back the original's scores."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from tests import handmade, tiny
from trace_jax.evaluation.patching import PARTS, drift_correlation, expert_sets, measure_patching, part_of, put_back
from trace_jax.models.architecture import flat_specs, flatten, unflatten
from trace_jax.models.sharding import param_shardings, placed_params
from trace_jax.routing.differences import expert_drift
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.tasks.benchmarks import BENCHMARKS

MODEL = handmade.make_model()
HURT = np.array([[False, False, True, False], [False, True, False, False]])


def changed(model, change, pattern):
    flat = {path: change(x) if pattern in path else x for path, x in flatten(model.params).items()}
    return model.replace(params=unflatten(flat))


DAMAGED = changed(MODEL, lambda x: x.at[np.nonzero(HURT)].multiply(-3.0), "experts")
FORGET, RETAIN = (ExpertStatistics(counts, 0.0 * counts, 100, 2) for counts in (40 + 60 * HURT, np.full((2, 4), 50)))


def measure(current, benchmark, evaluator=None):
    board = BENCHMARKS[benchmark].board
    evaluator = evaluator or handmade.make_evaluator(benchmark=benchmark)
    evaluator = dataclasses.replace(evaluator, original=evaluator.score(MODEL))
    return measure_patching(MODEL, current, evaluator, [board], forget=FORGET, retain=RETAIN)


@pytest.mark.parametrize("benchmark", ["handbook", "text"])
def test_the_critical_experts_bring_everything_back_and_others_nothing(benchmark):
    result = measure(DAMAGED, benchmark)
    rows = {row["name"]: row for row in result["models"]}
    assert list(rows) == [
        "original", "unlearned", "1 critical", "1 random", "1 least", "2 critical", "2 random", "2 least",
        "all experts", "experts, layer 0", "experts, layer 1",
    ]  # fmt: skip
    names = {"handbook": ["forget_accuracy", "neighbour_accuracy"]}
    for name in names.get(benchmark, ["forget_probability_ratio", "neighbour_utility"]):
        values = {kind: row["values"][name] for kind, row in rows.items()}
        assert values["original"] != values["unlearned"] and not math.isnan(values["unlearned"].low)
        for kind in ("1 critical", "2 critical", "all experts"):
            assert values[kind] == values["original"], kind
        for kind in ("1 random", "1 least", "2 random", "2 least"):
            assert [rows[kind]["returned"][name].value, rows[kind]["returned"][name].high] == [0.0, 0.0], kind
        returned = rows["1 critical"]["returned"][name]
        assert returned.value == pytest.approx(values["original"].value - values["unlearned"].value)
        assert rows["1 critical"]["over_random"][name] == returned


def test_drift_is_the_relative_change_of_all_weights_of_an_expert():
    flat = flatten(MODEL.params["layers"]["experts"])
    moved = changed(MODEL, lambda x: x.at[1, 3].add(0.1), "experts/down")
    drift = expert_drift(MODEL, moved)
    norm = math.sqrt(sum((np.asarray(x[1, 3], np.float64) ** 2).sum() for x in flat.values()))
    assert drift[1, 3] == pytest.approx(0.1 * math.sqrt(flat["down"][1, 3].size) / norm, rel=1e-5)
    assert np.count_nonzero(drift) == 1
    np.testing.assert_allclose(expert_drift(MODEL, DAMAGED), 4.0 * HURT, rtol=1e-6)


def test_what_is_put_back_is_the_original_bit_for_bit_and_the_rest_is_shared():
    other, mesh = handmade.make_model(3), tiny.mesh_of(2, 2, 1)
    original, current = (m.replace(params=placed_params(m.params, m.config, mesh)) for m in (MODEL, other))
    mixed = flatten(put_back(current, original, HURT).params)
    for path, sharding in param_shardings(MODEL.config, mesh).items():
        old, new = flatten(MODEL.params)[path], flatten(other.params)[path]
        if path.startswith("layers/experts/"):
            np.testing.assert_array_equal(mixed[path][HURT], old[HURT])
            np.testing.assert_array_equal(mixed[path][~HURT], new[~HURT])
            assert mixed[path].sharding.is_equivalent_to(sharding, new.ndim)
        else:
            assert mixed[path] is flatten(current.params)[path]
    for part in PARTS.values():
        current = put_back(current, original, part)
    assert all(x is y for x, y in zip(*(flatten(m.params).values() for m in (original, current)), strict=True))


def test_every_parameter_has_its_part():
    config = dataclasses.replace(
        tiny.CONFIG, dense_layers=(0,), dense_hidden_size=8, shared_hidden_size=8, shared_gate=True, qk_norm="head",
        router_bias=True, norm_placement="both", attention_gate=True,
    )  # fmt: skip
    parts = {}
    for path in flat_specs(config):
        parts.setdefault(part_of(path), set()).add(path.rpartition("layers/")[2].removeprefix("dense/"))
    assert parts["routers"] == {"router", "router_bias"} and parts["experts"] == {"experts/gate_up", "experts/down"}
    assert parts["attention"] == {"q", "k", "v", "o", "q_norm", "k_norm", "attention_gate"}
    assert parts["shared and dense MLPs"] == {"mlp/gate_up", "mlp/down", "shared/gate_up", "shared/down", "shared/gate"}
    sides = {f"{name}_{kind}" for name in ("attention", "mlp") for kind in ("norm", "post_norm")}
    assert parts["norms and embeddings"] == {"embed", "head", "final_norm"} | sides


def test_random_experts_are_as_many_and_none_of_the_critical():
    criticality = np.random.default_rng(0).normal(size=(3, 64))
    sets = expert_sets(criticality)
    expected = [(kind, size) for size in (1, 4, 8, 32) for kind in ("critical", "least")]
    assert [(kind, size) for kind, size, _ in sets if kind != "random"] == expected
    assert len(sets) == 4 * 5 - 2  # half of all: there is one choice
    chosen = {(kind, size): mask for kind, size, mask in sets}
    for kind, size, mask in sets:
        assert (mask.sum(axis=1) == size).all()
        least = np.sort(criticality, axis=1)[:, [size - 1, -size]]  # of the least, and of the critical ones
        beyond = {"least": criticality <= least[:, :1], "critical": criticality >= least[:, 1:]}
        assert (mask == beyond[kind]).all() if kind in beyond else not (mask & chosen["critical", size]).any()
    assert [size for _, size, _ in expert_sets(criticality[:, :1])] == []


def test_the_correlation_is_spearmans_over_the_experts_that_moved():
    drift = (rng := np.random.default_rng(0)).random((2, 16))
    criticality = drift + rng.normal(0, 0.3, drift.shape)
    drift[1] = 0.0  # did not train
    found = drift_correlation(drift, criticality)
    r = float(np.asarray(stats.spearmanr(drift[0], criticality[0]))[0])
    half = 1.959964 * math.sqrt((1 + r**2 / 2) / 13)
    assert found.n == 16 and found.value == pytest.approx(r)
    assert (found.low, found.high) == pytest.approx((math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)))
    assert math.isnan(drift_correlation(drift[:, :9], criticality[:, :9]).value)


def test_where_nothing_can_be_put_back_a_sentence_says_why():
    assert measure(MODEL, "text")["note"] == "Nothing was put back: no parameter changed."
    routers = measure(changed(MODEL, lambda x: -x, "router"), "text")
    assert [row["name"] for row in routers["models"]] == ["original", "unlearned", "routers"]
    assert routers["models"][2]["values"] == routers["models"][0]["values"] and not routers["drift"].any()
    probes = {"test": dataclasses.replace(handmade.PROBES["test"], questions={})}
    nothing = measure(DAMAGED, "handbook", handmade.make_evaluator(probes, benchmark="handbook"))
    assert "no items are kept for forget_accuracy and a utility" in nothing["note"] and not nothing["models"]
