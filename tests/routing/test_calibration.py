"""The weights are the least change that meets the target: checked against independent solutions and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize

from trace_jax.config import ConfigError
from trace_jax.io.files import encode
from trace_jax.routing import entropy_balancing
from trace_jax.routing.calibration import Calibration, calibrate, corpus_weights, count_activations
from trace_jax.routing.entropy_balancing import entropy_balance
from trace_jax.routing.statistics import Assignments

E = 8


def frequencies(indices, num_experts=E):
    return count_activations(indices, num_experts) / indices.shape[1]


def dense_features(indices, selected):
    """a_c(t), f64 [T, C], by the definition."""
    return np.stack([(indices[layer] == expert).any(-1) for layer, expert in np.argwhere(selected)], 1).astype(float)


def assert_solves(features, target, ridge, multipliers, weights):
    """Weights proportional to exp(lambda . a) at which the gradient of the convex dual vanishes: no others solve it."""
    expected = np.exp(features @ multipliers)
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-9)
    np.testing.assert_allclose(features.T @ weights / weights.sum() - target + ridge * multipliers, 0.0, atol=1e-9)


@pytest.fixture(scope="module")
def corpora(random_routing):
    """(retain indices, forget frequencies, selected) of two corpora that one model routes differently."""
    retain = random_routing(1)
    forget = frequencies(np.concatenate([retain[:, :300], random_routing(2, tokens=300, spread=0.5)], axis=1))
    return retain, forget, forget > 1.1 * frequencies(retain)


def test_a_feasible_target_is_met_exactly(corpora):
    retain, forget, selected = corpora
    calibration = calibrate(retain, selected=selected, target=forget, ridge=0.0, max_weight=1e9)
    weights = corpus_weights(retain, calibration)
    reached = dense_features(retain, selected).T @ weights / weights.sum()
    np.testing.assert_allclose(reached, forget[selected], atol=1e-9)
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-12)
    assert calibration.certificate.gap_before > 0.1
    assert calibration.certificate.gap_after < 1e-8
    assert not calibration.certificate.notes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_weights_solve_the_problem(random_routing, seed, ridge):
    shape = {"experts": 8 + 4 * seed, "top_k": 1 + seed}
    retain, forget = random_routing(10 + seed, **shape), random_routing(10 + seed, tokens=200, **shape)
    forget = frequencies(forget, shape["experts"])
    selected = forget > frequencies(retain, shape["experts"])
    calibration = calibrate(retain, selected=selected, target=forget, ridge=ridge, max_weight=1e9)
    weights, multipliers = corpus_weights(retain, calibration), calibration.multipliers[selected]
    assert_solves(dense_features(retain, selected), forget[selected], ridge, multipliers, weights)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_solver_steered_by_a_sample_ends_in_the_same_weights(corpora, monkeypatch, ridge):
    """With more patterns than `SAMPLE` only the preconditioner is approximate, not the solution."""
    retain, forget, selected = corpora
    exact = calibrate(retain, selected=selected, target=forget, ridge=ridge)
    monkeypatch.setattr(entropy_balancing, "SAMPLE", 20)
    steered = calibrate(retain, selected=selected, target=forget, ridge=ridge)
    assert steered.certificate.gradient_norm < 1e-8
    np.testing.assert_allclose(steered.multipliers, exact.multipliers, atol=1e-6)


def test_weights_have_the_largest_entropy_of_all_that_meet_the_target():
    """The primal problem solved over the weights themselves, with no multipliers, by a general constrained solver."""
    features = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    target = np.array([0.7, 0.55, 0.4])
    found = minimize(
        lambda p: np.sum(p * np.log(8 * p)), np.full(8, 1 / 8), method="trust-constr", bounds=[(1e-9, 1)] * 8,
        jac=lambda p: np.log(8 * p) + 1, hess=lambda p: np.diag(1 / p),
        constraints=[LinearConstraint(np.vstack([features.T, np.ones(8)]), [*target, 1], [*target, 1])],
        options={"gtol": 1e-10, "xtol": 1e-12},
    )  # fmt: skip
    np.testing.assert_allclose(entropy_balance(features, target, base=np.ones(8)).weights, 8 * found.x, rtol=1e-4)


@pytest.mark.parametrize("unit", ["token", "row"])
def test_every_unit_is_the_same_problem_with_averaged_features(corpora, unit):
    retain, forget, selected = corpora
    rows = np.sort(np.random.default_rng(0).integers(0, 200, retain.shape[1]))  # rows of uneven length
    features = dense_features(retain, selected)
    if unit == "row":
        features = np.stack([features[rows == row].mean(0) for row in rows])
    strength, moment = 0.3, features.mean(0)
    target = moment + strength * (forget[selected] - moment)
    calibration = calibrate(
        retain, selected=selected, target=forget, unit=unit, rows=rows, strength=strength, max_weight=1e9
    )
    weights = corpus_weights(retain, calibration, rows=rows)
    assert_solves(features, target, 1e-3, calibration.multipliers[selected], weights)
    certificate = calibration.certificate
    np.testing.assert_allclose(certificate.target, target, rtol=1e-12)
    np.testing.assert_allclose(certificate.weighted, features.T @ weights / len(weights), rtol=1e-9)


def test_where_nothing_is_to_change_weights_are_exactly_one(corpora):
    retain, forget, selected = corpora
    rows = np.repeat(np.arange(300), 10)
    nothing = calibrate(retain, selected=np.zeros((2, E), bool), target=forget)
    assert (corpus_weights(retain, nothing) == 1.0).all() and "no expert is matched" in nothing.certificate.text()
    assert (corpus_weights(retain, calibrate(retain, selected=selected, target=forget, strength=0.0)) == 1.0).all()
    for unit in ("token", "row"):
        calibration = calibrate(
            retain, selected=np.ones((2, E), bool), target=frequencies(retain), unit=unit, rows=rows, ridge=1e-3
        )
        assert (corpus_weights(retain, calibration, rows=rows) == 1.0).all()
        assert not calibration.multipliers.any()
        assert calibration.certificate.effective_sample_size == 1.0


@given(order=st.randoms(use_true_random=False), unit=st.sampled_from(["token", "row"]))
@settings(max_examples=12, deadline=None)
def test_the_order_of_the_retain_corpus_changes_no_bit(corpora, order, unit):
    retain, forget, selected = corpora
    rows = np.repeat(np.arange(300), 10)
    options = {"selected": selected, "target": forget, "unit": unit}
    assignments = Assignments(retain, rows.astype(np.int32))  # which carry their rows
    expected = calibrate(assignments, **options)
    shuffled = list(range(300))
    order.shuffle(shuffled)
    tokens = (10 * np.array(shuffled)[:, None] + np.arange(10)).ravel()  # whole rows move
    found = calibrate(retain[:, tokens, ::-1], rows=rows, **options)  # and the order of a token's experts
    assert np.array_equal(found.multipliers, expected.multipliers)
    assert found.log_normalizer == expected.log_normalizer
    assert found.scale == expected.scale
    in_order = corpus_weights(retain[:, tokens], found, rows=rows)
    assert np.array_equal(in_order, corpus_weights(retain, expected, rows=rows)[tokens])


def test_repeating_tokens_is_the_same_as_counting_them(corpora):
    retain, forget, selected = corpora
    once = calibrate(retain, selected=selected, target=forget)
    thrice = calibrate(np.tile(retain, (1, 3, 1)), selected=selected, target=forget)
    np.testing.assert_allclose(thrice.multipliers, once.multipliers, atol=1e-9)


@pytest.mark.parametrize("bound", [0.5, 0.9, 0.99])
def test_the_effective_sample_size_is_kept_by_the_largest_strength(corpora, bound):
    retain, forget, selected = corpora
    target = np.where(selected, np.minimum(3 * forget, 0.9), forget)
    options = {"selected": selected, "target": target}
    certificate = calibrate(retain, min_effective_sample_size=bound, **options).certificate
    weights = corpus_weights(retain, calibrate(retain, min_effective_sample_size=bound, **options))
    size = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    assert certificate.effective_sample_size == pytest.approx(size, rel=1e-9)
    assert size >= bound
    assert 0 < certificate.strength < certificate.strength_asked == 1.0
    stronger = calibrate(retain, strength=certificate.strength + 2e-3, **options).certificate
    assert stronger.effective_sample_size < bound
    assert any("strength lowered" in note for note in certificate.notes)


def test_weights_are_clipped_then_renormalised_and_certified_after(corpora):
    retain, forget, selected = corpora
    target = np.where(selected, np.minimum(2 * forget, 0.9), forget)
    free = corpus_weights(retain, calibrate(retain, selected=selected, target=target, max_weight=1e9))
    calibration = calibrate(retain, selected=selected, target=target, max_weight=2.0)
    weights = corpus_weights(retain, calibration)
    assert (free > 2).any()
    np.testing.assert_allclose(weights, np.minimum(free, 2.0) / np.minimum(free, 2.0).mean(), rtol=1e-9)
    certificate = calibration.certificate
    np.testing.assert_allclose(certificate.clipped, (free > 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(certificate.largest_weight, weights.max(), rtol=1e-12)
    np.testing.assert_allclose(certificate.weighted, dense_features(retain, selected).T @ weights / len(weights))
    assert any("clipped" in note for note in certificate.notes)


def test_the_target_rises_by_at_most_max_ratio(corpora):
    retain, forget, selected = corpora
    certificate = calibrate(retain, selected=selected, target=forget, max_ratio=1.05).certificate
    retain_frequency = frequencies(retain)[selected]
    np.testing.assert_allclose(certificate.target, np.minimum(forget[selected], 1.05 * retain_frequency), rtol=1e-12)


def test_an_expert_that_the_retain_corpus_never_uses_is_left_out_and_named(corpora):
    retain = np.where(corpora[0] == 5, 6, corpora[0])[:, :, :1]  # nobody uses expert 5
    target = np.full((2, E), 1 / E)
    calibration = calibrate(retain, selected=np.ones((2, E), bool), target=target, ridge=0.0, max_weight=1e9)
    certificate = calibration.certificate
    assert certificate.infeasible == ((0, 5), (1, 5))
    assert certificate.infeasible_share == 2 / 16
    assert not calibration.selected[:, 5].any()
    assert "layer 0 expert 5, layer 1 expert 5" in certificate.text()
    np.testing.assert_allclose(corpus_weights(retain, calibration).mean(), 1.0, rtol=1e-12)


def test_an_unreachable_target_falls_back_to_a_ridge_and_says_so():
    # Experts 0 and 1 are always chosen together, yet asked for different frequencies.
    retain = np.array([[[0, 1]] * 30 + [[2, 3]] * 70])
    target = np.array([[0.6, 0.2, 0.6, 0.6]])
    certificate = calibrate(retain, selected=np.ones((1, 4), bool), target=target, ridge=0.0).certificate
    assert certificate.ridge == 1e-3
    assert "no weights of these tokens were found that meet the target" in certificate.text()
    assert "no weights can meet it" in certificate.text()
    np.testing.assert_allclose(certificate.weighted[0], certificate.weighted[1])
    assert 0.2 < certificate.weighted[0] < 0.6
    assert np.isfinite(certificate.largest_weight)


def test_an_expert_in_every_token_keeps_its_frequency_and_disturbs_nothing(corpora):
    retain, forget, selected = corpora
    always = np.concatenate([retain, np.full((2, retain.shape[1], 1), E)], axis=2)  # expert E is always on
    wider_target = np.concatenate([forget, np.full((2, 1), 0.5)], axis=1)
    wider = np.concatenate([selected, np.ones((2, 1), bool)], axis=1)
    calibration = calibrate(always, selected=wider, target=wider_target, ridge=1e-3)
    plain = calibrate(retain, selected=selected, target=forget, ridge=1e-3)
    np.testing.assert_allclose(calibration.multipliers[:, :E], plain.multipliers, atol=1e-8)
    assert (calibration.multipliers[:, E] == 0).all()
    assert (calibration.certificate.weighted[calibration.certificate.expert == E] > 1 - 1e-12).all()


def test_all_experts_of_a_layer_can_be_matched_without_ridge(corpora):
    """Their activations always sum to K, so the problem is singular; the weights still exist and are unique."""
    retain, forget, _ = corpora
    calibration = calibrate(retain, selected=np.ones((2, E), bool), target=forget, ridge=0.0, max_weight=1e9)
    weights = corpus_weights(retain, calibration)
    features = dense_features(retain, np.ones((2, E), bool))
    assert_solves(features, forget.ravel(), 0.0, calibration.multipliers.ravel(), weights)
    np.testing.assert_allclose(calibration.certificate.weighted, forget.ravel(), atol=1e-9)
    np.testing.assert_allclose(calibration.multipliers.sum(axis=1), 0.0, atol=1e-6)


def test_a_certificate_computed_by_hand():
    # Four tokens, K = 1: experts 0 0 0 1. Asked: expert 1 in half. So w = 2/3, 2/3, 2/3, 2.
    retain = np.array([[[0], [0], [0], [1]]])
    target = np.array([[0.4, 0.5, 0.1]])
    selected = np.array([[False, True, True]])
    calibration = calibrate(retain, selected=selected, target=target, ridge=0.0)
    c = calibration.certificate
    np.testing.assert_allclose(corpus_weights(retain, calibration), [2 / 3, 2 / 3, 2 / 3, 2])
    np.testing.assert_allclose(calibration.multipliers, [[0, np.log(3), 0]], atol=1e-12)
    assert (c.layer.tolist(), c.expert.tolist(), c.forget.tolist(), c.retain.tolist()) == ([0], [1], [0.5], [0.25])
    np.testing.assert_allclose([c.target[0], c.weighted[0]], 0.5)
    np.testing.assert_allclose([c.gap_before, c.gap_after], [0.25, 0.0], atol=1e-12)
    # Others: expert 0 (0.4 asked, .75 before, .5 after) and expert 2 (0.1, never used)
    np.testing.assert_allclose([c.gap_elsewhere_before, c.gap_elsewhere_after], [0.45, 0.2])
    np.testing.assert_allclose(c.effective_sample_size, 16 / (4 * (3 * 4 / 9 + 4)))
    np.testing.assert_allclose([c.largest_weight, c.clipped, c.touched], [2.0, 0.0, 0.25])
    assert c.infeasible == ((0, 2),)
    assert c.infeasible_share == 0.5
    assert (c.strength, c.strength_asked, c.ridge, c.tokens) == (1.0, 1.0, 0.0, 4)


def test_a_calibration_is_the_same_after_saving(corpora, tmp_path):
    retain, forget, selected = corpora
    calibration = calibrate(retain, selected=selected, target=forget)
    calibration.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert np.array_equal(corpus_weights(retain, loaded), corpus_weights(retain, calibration))
    assert encode(loaded.certificate) == encode(calibration.certificate)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.json", "calibration.npz"]


def test_bad_settings_and_arrays_are_named(corpora):
    retain, forget, selected = corpora
    good = {"selected": selected, "target": forget}
    for bad, message in (
        ({"unit": "layer"}, "unit is 'layer'"), ({"max_weight": None}, "max_weight is None"),
        ({"strength": 1.5}, "strength is 1.5"), ({"ridge": -1.0}, "ridge is -1.0"), ({"max_weight": 0.5}, "max_weight"),
        ({"max_ratio": float("nan")}, "max_ratio"), ({"min_effective_sample_size": 2.0}, "min_effective"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            calibrate(retain, **good, **bad)
    for indices, bad, message in (
        (retain[:, :0], {}, "no valid token"), (retain, {"unit": "row"}, "needs rows"),
        (retain + np.uint8(2), {}, "name expert 9; there are 8"), (retain.astype(float), {}, "expected integers"),
        (retain, {"target": np.where(selected, np.nan, forget)}, "no frequency"),
        (retain, {"selected": selected[:1]}, "expected bool and numbers"),
        (retain, {"unit": "row", "rows": np.zeros(3, int)}, "one row number for each"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            calibrate(indices, **good | bad)
