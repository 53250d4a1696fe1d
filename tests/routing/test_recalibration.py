"""Weights solved anew under a model whose routing has moved, and what is said about how far it has."""

import json

import jax
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.recalibration import Recalibration
from trace_jax.routing.retain_weights import retain_weights
from trace_jax.routing.statistics import expert_assignments, expert_routing, expert_statistics

ALL = {"weighting": "entropy", "rule": "all", "strength": 0.5}


@pytest.fixture(scope="module")
def corpora(random_rows):
    return {"forget": random_rows(1, rows=16, high=12), "retain": random_rows(2, rows=24)}


def weights_under(model, corpora, config):
    found = {name: expert_statistics(model, sequential_batches(rows, 8)) for name, rows in corpora.items()}
    return retain_weights(
        config, model=model, **corpora, forget_statistics=found["forget"], retain_statistics=found["retain"]
    )


def config_of(**settings):
    return CalibrationConfig(**{**ALL, **settings}, routing="recalibrated", recalibrate_every=3)


@pytest.fixture(scope="module")
def moved(tiny_model):
    """The model with other routers."""
    router = tiny_model.params["layers"]["router"]
    noise = 2.0 * router.std() * jax.random.normal(jax.random.key(5), router.shape)
    return tiny_model.replace(
        params={**tiny_model.params, "layers": {**tiny_model.params["layers"], "router": router + noise}}
    )


def test_one_pass_gives_the_counts_and_the_experts_of_two(tiny_model, corpora):
    statistics, assignments = expert_routing(tiny_model, sequential_batches(corpora["retain"], 7))
    counted = expert_statistics(tiny_model, sequential_batches(corpora["retain"], 8))
    assert np.array_equal(statistics.counts, counted.counts) and statistics.tokens == counted.tokens
    np.testing.assert_allclose(statistics.gate_mass, counted.gate_mass, rtol=1e-5)
    kept = expert_assignments(tiny_model, sequential_batches(corpora["retain"], 8))
    assert np.array_equal(assignments.indices, kept.indices)


def test_under_the_original_model_nothing_changes(tiny_model, corpora):
    config = config_of()
    last = weights_under(tiny_model, corpora, config)
    weights, drift = Recalibration(config, tiny_model, **corpora)(tiny_model, last)
    assert np.array_equal(weights.weights, last.weights)
    for name in ("forget", "retain"):
        np.testing.assert_array_equal(drift.overlap[name], [1.0, 1.0])
        np.testing.assert_array_equal(drift.frequency_change[name], [0.0, 0.0])
    assert drift.selected_overlap == 1 and not drift.kept
    assert drift.gap["after"] == drift.gap["before"] < drift.gap["unweighted"]
    certificate = last.certificate
    np.testing.assert_allclose(drift.gap["unweighted"], certificate.gap_before)
    np.testing.assert_allclose(drift.gap["after"], certificate.gap_after, atol=1e-6)


@pytest.mark.parametrize("weighting", ["entropy", "ratio", "permuted", "random_experts"])
def test_the_new_weights_are_those_of_the_current_model(tiny_model, moved, corpora, weighting):
    settings = {"weighting": weighting, "rule": "difference", "top": 2, "strength": 0.5}
    if weighting == "ratio":
        del settings["strength"]
    config = CalibrationConfig(**settings, routing="recalibrated")
    last, expected = (weights_under(model, corpora, config) for model in (tiny_model, moved))
    weights, drift = Recalibration(config, tiny_model, **corpora)(moved, last)
    np.testing.assert_allclose(weights.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(weights.row_probability, expected.row_probability, rtol=1e-12)
    assert np.array_equal(weights.selected, expected.selected)
    assert drift.selected == expected.selected.sum()


def test_the_drift_is_that_of_the_two_routings(tiny_model, moved, corpora):
    config = config_of()
    last = weights_under(tiny_model, corpora, config)
    weights, drift = Recalibration(config, tiny_model, **corpora)(moved, last)
    for name, rows in corpora.items():
        chosen = [expert_assignments(m, sequential_batches(rows, 8)).indices.tolist() for m in (tiny_model, moved)]
        for layer in range(2):
            pairs = [(set(a), set(b)) for a, b in zip(*(indices[layer] for indices in chosen), strict=True)]
            jaccard = np.mean([len(a & b) / len(a | b) for a, b in pairs])
            np.testing.assert_allclose(drift.overlap[name][layer], jaccard, rtol=1e-12)
        before, after = (expert_statistics(m, sequential_batches(rows, 8)).frequency for m in (tiny_model, moved))
        np.testing.assert_allclose(drift.frequency_change[name], np.abs(after - before).sum(1), rtol=1e-12)
        assert (drift.overlap[name] < 0.9).all()
    assert drift.gap["after"] < drift.gap["before"]
    assert drift.effective_sample_size == weights.effective_sample_size
    read = json.loads(json.dumps(drift.to_json()))
    assert read["overlap"]["retain"] == drift.overlap["retain"].tolist() and read["layers"] == [0, 1]
    assert f"{drift.selected} experts matched" in drift.text() and "\n" not in drift.text()


def test_where_nothing_is_selected_any_more_the_last_weights_stay(tiny_model, moved, corpora):
    last = weights_under(tiny_model, corpora, config_of())
    config = config_of(rule="ratio", tau=1e6)
    weights, drift = Recalibration(config, tiny_model, **corpora)(moved, last)
    assert weights is last
    assert drift.kept and drift.selected == 0 and drift.gap["after"] == 0
    assert "the last weights are kept" in drift.text()
    assert drift.effective_sample_size == last.effective_sample_size


def test_how_often_is_read_where_weights_are_recalibrated_only():
    assert CalibrationConfig(weighting="entropy", routing="recalibrated").recalibrate_every == 20
    assert CalibrationConfig(weighting="entropy").routing == "offline" and CalibrationConfig().routing is None
    with pytest.raises(ConfigError, match="recalibrate_every = 5 would have no effect"):
        CalibrationConfig(weighting="entropy", routing="online", recalibrate_every=5)
    with pytest.raises(ConfigError, match="routing = 'recalibrated' would have no effect"):
        CalibrationConfig(weighting="loss", routing="recalibrated")
