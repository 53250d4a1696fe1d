"""Routing metrics are counted on the same tokens as the original's, and equal plain loops and scipy."""

import json

import jax
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from tests import handmade, tiny
from trace_jax.evaluation import routing
from trace_jax.io.files import encode
from trace_jax.models.decoder import forward
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import Assignments, ExpertStatistics
from trace_jax.routing.weights import retain_weights

L, E, K = 3, 6, 2
CORPORA = {"forget": tiny.make_rows(8, seed=1), "retain": tiny.make_rows(8, seed=2)}
MODEL, OTHER = handmade.make_model(), handmade.make_model(3)


@jax.jit
def run_router(params, tokens, segments):
    return forward(params, tiny.CONFIG, tokens, mask=segments, collect=("indices",)).router.indices


def indices(model, subject):
    """Experts [L, tokens, K] of every valid position."""
    rows = CORPORA[subject]
    return np.asarray(run_router(model.params, rows.tokens, rows.segments))[:, rows.valid]


def measure(current):
    return routing.measure_routing(MODEL, current, **CORPORA, batch_size=8, resamples=100, mesh=tiny.mesh_of(1, 1, 1))


@pytest.fixture(scope="module")
def moved():
    return measure(OTHER)


def assign(seed, lengths, *, favourite=None):
    """Random experts for rows of these lengths; expert 5 is never chosen, `favourite` often."""
    rng, tokens = np.random.default_rng(seed), sum(lengths)
    scores = rng.random((L, tokens, E))
    scores[..., 5] = -1
    if favourite is not None:
        scores[..., favourite] += 0.6
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return Assignments(np.argsort(-scores, axis=-1)[..., :K].astype(np.uint8), rows, rows)


LENGTHS = {"forget": (5, 0, 9, 7, 4, 8), "retain": (6, 6, 3, 9, 0, 7, 5)}


RANDOM = {
    subject: (assign(number, lengths, favourite=number), assign(10 + number, lengths, favourite=2))
    for number, (subject, lengths) in enumerate(LENGTHS.items())
}
SUMMED = {subject: routing.corpus_routing(*pair, E) for subject, pair in RANDOM.items()}


def test_every_quantity_equals_a_plain_loop_and_scipy():
    quantities = routing.routing_quantities(SUMMED, top_k=K, resamples=100)
    tokens = {subject: sum(lengths) for subject, lengths in LENGTHS.items()}
    for layer in range(L):
        used, expected = {}, {}
        for subject, (before, after) in RANDOM.items():
            pairs = [(set(b), set(a)) for b, a in zip(before.indices[layer], after.indices[layer], strict=True)]
            expected[f"jaccard_{subject}"] = np.mean([len(b & a) / len(b | a) for b, a in pairs])
            expected[f"stability_{subject}"] = np.mean([b == a for b, a in pairs])
            for end, number in (("_original", 0), ("", 1)):
                used[subject, end] = np.array([sum(e in pair[number] for pair in pairs) for e in range(E)])
            now, then = used[subject, ""], used[subject, "_original"]
            expected[f"newly_dead_{subject}"] = sum(t > 0 and n == 0 for n, t in zip(now, then, strict=True))
        for end in ("_original", ""):
            p, q = used["forget", end], used["retain", end]
            expected[f"gap{end}"] = np.abs(p / tokens["forget"] - q / tokens["retain"]).sum()
            expected[f"kl{end}"] = entropy(p + 0.5, q + 0.5)  # scipy normalises
            expected[f"js{end}"] = jensenshannon(p, q) ** 2
            for subject in LENGTHS:
                counts = used[subject, end]
                expected[f"load_entropy_{subject}{end}"] = entropy(counts) / np.log(E)
                expected[f"dead_experts_{subject}{end}"] = (counts == 0).sum()
                assert (counts == 0).any()
        assert {name: quantity["value"][layer] for name, quantity in quantities.items()} == pytest.approx(expected)


def test_intervals_equal_a_plain_bootstrap_over_rows():
    """Another stream of draws, so the ends agree within what 4000 resamples leave."""
    rng = np.random.default_rng(7)
    result = routing.routing_quantities(SUMMED, top_k=K, resamples=4000, seed=1)
    rows = {s: [r for r, n in enumerate(lengths) if n] for s, lengths in LENGTHS.items()}
    unchanged, gaps = [], []
    for _ in range(4000):
        drawn = {s: [RANDOM[s][1].rows == r for r in rng.choice(own, len(own))] for s, own in rows.items()}
        where = {s: np.concatenate([*map(np.flatnonzero, own)]) for s, own in drawn.items()}
        before, after = (a.indices[:, where["forget"]] for a in RANDOM["forget"])
        unchanged.append((np.sort(before) == np.sort(after)).all(-1).mean(1))
        used = {s: RANDOM[s][1].indices[:, places] for s, places in where.items()}  # [L, tokens, K]
        counts = {s: np.stack([np.bincount(layer.ravel(), minlength=E) for layer in own]) for s, own in used.items()}
        gaps.append(np.abs(counts["forget"] / len(where["forget"]) - counts["retain"] / len(where["retain"])).sum(1))
    for name, resampled in (("stability_forget", np.stack(unchanged)), ("gap", np.stack(gaps))):
        quantity, values = result[name], np.append(result[name]["value"], result[name]["value"].mean())
        resampled = np.concatenate([resampled, resampled.mean(1, keepdims=True)], axis=1)
        low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
        for name, expected, atol in (
            ("value", values, 1e-12),
            ("low", np.clip(2 * values - high, 0, values), 0.03),
            ("high", np.maximum(2 * values - low, values), 0.03),
            ("bias", resampled.mean(0) - values, 0.01),
        ):
            np.testing.assert_allclose([*quantity[name], quantity["mean"][name]], expected, atol=atol)
    assert result["gap"]["mean"]["bias"] > 0  # resampling makes corpora look more different than they are


def test_one_row_a_side_has_values_and_no_intervals():
    corpus = routing.corpus_routing(*[assign(0, (9,))] * 2, E)
    result = routing.routing_quantities({"forget": corpus, "retain": corpus}, top_k=K, resamples=100)
    assert result["jaccard_forget"]["value"].tolist() == [1] * L
    assert all(np.isnan(q[end]).all() for q in result.values() for end in ("low", "high"))


def test_a_model_next_to_itself_has_not_moved():
    result = measure(MODEL)
    quantities, frequency = result["quantities"], result["frequency"]
    for subject, rows in CORPORA.items():
        assert (quantities[f"jaccard_{subject}"]["value"] == 1).all()
        assert (quantities[f"stability_{subject}"]["low"] == 1).all()
        assert result["tokens"][subject] == rows.valid.sum() and result["rows"][subject] == 8
        np.testing.assert_array_equal(frequency["original"][subject], frequency["unlearned"][subject])
    assert (quantities["router_drift"]["value"] == 0).all() and (result["expert_drift"] == 0).all()
    np.testing.assert_array_equal(quantities["gap"]["low"], quantities["gap_original"]["low"])  # same resamples


def test_what_is_measured_on_a_model_equals_its_own_router(moved):
    corpora = {}
    for subject, rows in CORPORA.items():
        each = np.nonzero(rows.valid)[0]
        both = [Assignments(indices(m, subject), each, each) for m in (MODEL, OTHER)]
        corpora[subject] = routing.corpus_routing(*both, 4)
        for name, model in (("original", MODEL), ("unlearned", OTHER)):
            used = [np.bincount(layer.ravel(), minlength=4) / len(each) for layer in indices(model, subject)]
            np.testing.assert_allclose(moved["frequency"][name][subject], used)
    for name, expected in routing.routing_quantities(corpora, top_k=2, resamples=100).items():
        np.testing.assert_allclose(moved["quantities"][name]["value"], expected["value"])
    old, new = (np.asarray(model.params["layers"]["router"]) for model in (MODEL, OTHER))  # [L, D, E]
    expected = np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1)
    np.testing.assert_allclose(moved["expert_drift"], expected, rtol=1e-5)
    drift = np.linalg.norm(new - old, axis=(1, 2)) / np.linalg.norm(old, axis=(1, 2))
    np.testing.assert_allclose(moved["quantities"]["router_drift"]["value"], drift, rtol=1e-5)


def test_means_over_layers_stand_among_the_measurements(moved):
    measured = {m.name: m for m in routing.routing_measurements(moved)}
    both = {f"{name}_{s}" for name in ("jaccard", "stability", "load_entropy", "dead_experts", "newly_dead")
            for s in ("forget", "retain")}  # fmt: skip
    assert set(measured) == {f"routing_{name}" for name in both | {"gap", "kl", "js"}} | {"router_drift"}
    for m in measured.values():
        assert m.low <= m.value <= m.high and m.split == "train"
    counts = {"routing_jaccard_forget": 8, "routing_gap": 16, "router_drift": 2}
    assert {name: measured[name].n for name in counts} == counts
    assert f"{moved['tokens']['forget']:,} forget tokens" in measured["routing_jaccard_forget"].note
    original = moved["quantities"]["gap_original"]["mean"]["value"]
    assert f"original model {original:.4g}" in measured["routing_gap"].note
    assert measured["routing_js"].low == moved["quantities"]["js"]["mean"]["low"]
    json.dumps(encode(moved), allow_nan=False)


def calibrated(**settings):
    """Weights, and their metrics, from statistics by hand."""
    statistics = {}
    for subject, rows in CORPORA.items():
        counts = np.stack([np.bincount(layer.ravel(), minlength=4) for layer in indices(MODEL, subject)])
        statistics[subject] = ExpertStatistics(counts, np.zeros((2, 4)), int(rows.valid.sum()), 2)
    both, mesh = {f"{subject}_statistics": own for subject, own in statistics.items()}, tiny.mesh_of(1, 1, 1)
    weights = retain_weights(CalibrationConfig(settings), model=MODEL, **CORPORA, **both, mesh=mesh)
    return weights, routing.measure_calibration(weights, **statistics)


def test_gaps_of_the_calibration_sum_to_those_of_its_certificate():
    weights, result = calibrated(name="matching", rule={"name": "difference", "top": 3})
    certificate = weights.calibration.certificate
    for name in ("gap_before", "gap_after", "gap_elsewhere_before", "gap_elsewhere_after"):
        assert result[name].sum() == pytest.approx(getattr(certificate, name))
    assert result["selected"].sum() == len(certificate.layer) > 0
    measured = {m.name: m for m in routing.calibration_measurements(result)}
    assert measured["calibration_gap_after"].value < measured["calibration_gap_before"].value
    ess = measured["calibration_effective_sample_size"]
    assert ess.value == ess.low == pytest.approx(certificate.effective_sample_size, rel=1e-12)
    assert ess.value < 1 and ess.n == CORPORA["retain"].valid.sum()
    json.dumps(encode(result), allow_nan=False)


def test_weights_that_look_at_no_expert_have_a_sample_size_only():
    _, result = calibrated(name="uniform")
    assert [m.name for m in routing.calibration_measurements(result)] == ["calibration_effective_sample_size"]
    assert result["effective_sample_size"] == pytest.approx(1) and result["gap_after"] is None
