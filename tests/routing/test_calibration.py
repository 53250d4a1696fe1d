"""The closest match that a sample size allows: checked against independent solutions and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from trace_jax.config import ConfigError
from trace_jax.io.files import encode
from trace_jax.routing import solver
from trace_jax.routing.calibration import Calibration, calibrate, count_activations, match_frequencies, trade_off
from trace_jax.routing.config import Matching
from trace_jax.routing.statistics import Assignments

E = 8


def frequencies(indices, num_experts=E):
    return count_activations(indices, num_experts) / indices.shape[1]


def dense_features(indices, selected, units=None):
    """a_c(t), f64 [T, C], by the definition."""
    of = np.stack([(indices[layer] == expert).any(-1) for layer, expert in np.argwhere(selected)], 1).astype(float)
    return of if units is None else np.stack([of[units == unit].mean(0) for unit in units])


def weights_of(indices, calibration, units=None):
    """The weights by the definition, f64 [T]."""
    scores = sum(of_layer[chosen].sum(-1) for of_layer, chosen in zip(calibration.multipliers, indices, strict=True))
    if units is not None:
        scores = np.array([scores[units == unit].mean() for unit in units])
    scores = scores + calibration.intercept
    if calibration.divergence == "chi2":
        return np.clip(scores, 0.0, calibration.max_weight)
    return np.minimum(np.exp(scores), calibration.max_weight)


def by_scipy(features, target, max_weight, *, size=None, rho=None):
    """The primal problem over the weights themselves, by a general solver: chi2 at a size, or kl at a rho."""
    count = len(features)

    def objective(w):
        missed = features.T @ w / count - target
        spread = w * np.log(w) - w + 1 if rho else 0.0 * w
        slope = rho * np.log(w) if rho else 0.0 * w
        value = missed @ missed / 2 + (rho or 0.0) * spread.mean()
        return 1e3 * value, 1e3 * (features @ missed + slope) / count

    constraints = [{"type": "eq", "fun": lambda w: w.mean() - 1, "jac": lambda w: np.full(count, 1 / count)}]
    if size:
        bound = {"type": "ineq", "fun": lambda w: 1 / size - (w**2).mean(), "jac": lambda w: -2 * w / count}
        constraints.append(bound)
    found = minimize(
        objective, np.ones(count), jac=True, method="SLSQP", bounds=[(1e-12 if rho else 0.0, max_weight)] * count,
        constraints=constraints, options={"maxiter": 2000, "ftol": 1e-18},
    )  # fmt: skip
    return found.x


@pytest.fixture(scope="module")
def corpora(random_routing):
    """(retain indices, forget frequencies, selected) of two corpora that one model routes differently."""
    retain = random_routing(1)
    forget = frequencies(np.concatenate([retain[:, :300], random_routing(2, tokens=300, spread=0.5)], axis=1))
    return retain, forget, forget > 1.1 * frequencies(retain)


@pytest.fixture(scope="module")
def far(corpora):
    """The same with a target that costs sample."""
    retain, forget, selected = corpora
    return retain, np.where(selected, np.minimum(3 * forget, 0.9), forget), selected


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
@pytest.mark.parametrize(("seed", "size", "max_weight"), [(0, 0.5, 50.0), (1, 0.5, 3.0), (2, 0.7, 50.0)])
def test_weights_equal_an_independent_solution(random_routing, divergence, seed, size, max_weight):
    retain, forget = random_routing(seed, tokens=60), frequencies(random_routing(seed + 9, tokens=300, spread=2.0))
    selected = forget > frequencies(retain)
    problem = {"selected": selected, "target": forget, "divergence": divergence, "max_weight": max_weight}
    calibration = calibrate(retain, min_effective_sample_size=size, max_ratio=1e9, **problem)
    certificate, weights = calibration.certificate, weights_of(retain, calibration)
    matched = calibration.selected
    arguments = {"size": size} if divergence == "chi2" else {"rho": certificate.rho}
    expected = by_scipy(dense_features(retain, matched), forget[matched], max_weight, **arguments)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert solver.effective_sample_size(weights) == pytest.approx(size, rel=1e-8) and weights.max() <= max_weight


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
@pytest.mark.parametrize("everything", [False, True])
def test_a_feasible_target_is_met_exactly(corpora, divergence, everything):
    """Activations of all experts of a layer sum to K, so that problem is singular; the weights still exist."""
    retain, forget, selected = corpora
    selected = np.ones_like(selected) if everything else selected
    problem = {"selected": selected, "target": forget, "divergence": divergence}
    calibration = calibrate(retain, min_effective_sample_size=0.0, **problem)
    weights = weights_of(retain, calibration)
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-9)
    np.testing.assert_allclose(dense_features(retain, selected).T @ weights / len(weights), forget[selected], atol=1e-8)
    certificate = calibration.certificate
    assert certificate.gap_before > 0.1 and certificate.closed == pytest.approx(1.0, abs=1e-6)
    assert not any("missed" in note for note in certificate.notes)
    assert any("hardly a selection" in note for note in certificate.notes)
    np.testing.assert_allclose(calibration.multipliers.sum(axis=1) * everything, 0.0, atol=1e-6)
    # A bound that the match leaves room for changes nothing.
    loose = calibrate(retain, min_effective_sample_size=0.05, **problem)
    np.testing.assert_allclose(weights_of(retain, loose), weights, atol=1e-6)


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_the_match_grows_closer_as_the_sample_that_remains_falls(far, divergence):
    retain, target, selected = far
    sizes = (0.9, 0.6, 0.3, 0.15, 0.08)
    tokens = Assignments(retain, *[np.arange(retain.shape[1])] * 2)
    settings, counts = Matching(divergence=divergence), count_activations(retain, E)
    solved = match_frequencies(tokens, counts, selected, target, settings, sizes)
    missed = []
    for size, (calibration, weights, frequency) in zip(sizes, solved, strict=True):
        certificate = calibration.certificate
        assert certificate.effective_sample_size == pytest.approx(size, rel=1e-8)
        np.testing.assert_allclose(weights, weights_of(retain, calibration), atol=1e-9)
        np.testing.assert_allclose(frequency[selected], certificate.weighted)
        missed.append(np.linalg.norm(certificate.weighted - target[selected]))
        alone = calibrate(
            retain, selected=selected, target=target, divergence=divergence, min_effective_sample_size=size
        )
        np.testing.assert_allclose(weights_of(retain, alone), weights, atol=1e-6)  # wherever the road began
    assert (np.diff(missed) < 0).all() and missed[0] < np.linalg.norm((frequencies(retain) - target)[selected])
    if divergence == "chi2":
        curve = trade_off(retain, selected=selected, target=target, sizes=sizes)
        assert [c.closed for c in curve] == [calibration.certificate.closed for calibration, _, _ in solved]


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_a_solver_that_begins_with_some_tokens_ends_in_the_same_weights(random_routing, monkeypatch, divergence):
    """With more units than `SAMPLE` the way begins on a part, and the Hessian is of a part; the solution is not."""
    shape = {"layers": 4, "experts": 16, "top_k": 4}
    retain, forget = random_routing(5, **shape), frequencies(random_routing(6, tokens=500, **shape), 16)
    problem = {"selected": forget > 1.2 * frequencies(retain, 16), "target": forget, "divergence": divergence}
    exact = calibrate(retain, **problem, min_effective_sample_size=0.4)
    monkeypatch.setattr(solver, "SAMPLE", 200)
    monkeypatch.setattr(solver, "LOOK", 100)
    steered = calibrate(retain, **problem, min_effective_sample_size=0.4)
    assert steered.certificate.gradient_norm < 1e-8
    np.testing.assert_allclose(steered.multipliers, exact.multipliers, atol=1e-5)
    np.testing.assert_allclose(weights_of(retain, steered), weights_of(retain, exact), atol=1e-6)


@pytest.mark.parametrize("unit", ["row", "document"])
def test_every_unit_is_the_same_problem_with_averaged_features(far, unit):
    retain, target, selected = far
    units = np.sort(np.random.default_rng(0).integers(0, 200, retain.shape[1]))  # of uneven length
    calibration = calibrate(retain, selected=selected, target=target, unit=unit, rows=units)
    weights, features = weights_of(retain, calibration, units), dense_features(retain, selected, units)
    certificate = calibration.certificate
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-9)
    np.testing.assert_allclose(certificate.weighted, features.T @ weights / len(weights), rtol=1e-9)
    gradient = certificate.weighted - target[selected] + certificate.rho * calibration.multipliers[selected]
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)  # of a convex problem: no others solve it
    # Assignments say which of the two is which.
    other = np.arange(retain.shape[1])
    of = {"row": (units, other), "document": (other, units)}[unit]
    again = calibrate(Assignments(retain, *of), selected=selected, target=target, unit=unit)
    assert np.array_equal(again.multipliers, calibration.multipliers)


def test_where_nothing_is_to_change_weights_are_exactly_one(corpora):
    retain, forget, selected = corpora
    rows = np.repeat(np.arange(300), 10)
    nothing = calibrate(retain, selected=np.zeros((2, E), bool), target=forget)
    assert (weights_of(retain, nothing) == 1.0).all() and "no expert is calibrated" in nothing.certificate.text()
    for bound in ({"max_weight": 1.0}, {"min_effective_sample_size": 1.0}):
        weights = weights_of(retain, calibrate(retain, selected=selected, target=forget, **bound))
        np.testing.assert_allclose(weights, 1.0, atol=1e-3)
    for unit in ("token", "row"):
        for divergence in ("chi2", "kl"):
            problem = {"selected": np.ones((2, E), bool), "target": frequencies(retain), "divergence": divergence}
            calibration = calibrate(retain, **problem, unit=unit, rows=rows)
            assert (weights_of(retain, calibration) == 1.0).all() and not calibration.multipliers.any()
            assert calibration.certificate.effective_sample_size == 1.0


@given(order=st.randoms(use_true_random=False), unit=st.sampled_from(["token", "row"]))
@settings(max_examples=12, deadline=None)
def test_the_order_of_the_retain_corpus_changes_no_bit(far, order, unit):
    retain, target, selected = far
    rows = np.repeat(np.arange(300), 10).astype(np.int32)
    options = {"selected": selected, "target": target, "unit": unit}
    expected = calibrate(Assignments(retain, rows, rows), **options)
    shuffled = list(range(300))
    order.shuffle(shuffled)
    tokens = (10 * np.array(shuffled)[:, None] + np.arange(10)).ravel()  # whole rows move
    found = calibrate(retain[:, tokens, ::-1], rows=rows, **options)  # and the order of a token's experts
    assert np.array_equal(found.multipliers, expected.multipliers) and found.intercept == expected.intercept


def test_repeating_tokens_is_the_same_as_counting_them(far):
    retain, target, selected = far
    once = calibrate(retain, selected=selected, target=target)
    thrice = calibrate(np.tile(retain, (1, 3, 1)), selected=selected, target=target)
    np.testing.assert_allclose(thrice.multipliers, once.multipliers, atol=1e-9)


def test_the_target_rises_by_at_most_max_ratio(corpora):
    retain, forget, selected = corpora
    certificate = calibrate(retain, selected=selected, target=forget, max_ratio=1.05).certificate
    retain_frequency = frequencies(retain)[selected]
    np.testing.assert_allclose(certificate.target, np.minimum(forget[selected], 1.05 * retain_frequency), rtol=1e-12)


def test_an_expert_that_the_retain_corpus_never_uses_is_left_out_and_named(corpora):
    retain = np.where(corpora[0] == 5, 6, corpora[0])[:, :, :1]  # nobody uses expert 5
    target = np.full((2, E), 1 / E)
    calibration = calibrate(retain, selected=np.ones((2, E), bool), target=target, min_effective_sample_size=0.0)
    certificate = calibration.certificate
    assert certificate.infeasible == ((0, 5), (1, 5)) and not calibration.selected[:, 5].any()
    assert "layer 0 expert 5, layer 1 expert 5" in certificate.text()
    np.testing.assert_allclose(weights_of(retain, calibration).mean(), 1.0, rtol=1e-9)
    # The others get what expert 5 was to have, evenly: nearer no weights come.
    np.testing.assert_allclose(certificate.weighted, 1 / 7, atol=1e-8)


def test_products_that_rounding_made_indefinite_are_solved_all_the_same():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.dirichlet(np.full(64, 0.05), 100) * 6 for _ in range(8)], axis=1)
    target = np.minimum(features[:3].mean(0), 50 * features.mean(0))  # what few rows have: their weights grow large
    (found,) = solver.closest_match(
        features, target, base=np.ones(100), sizes=[0.0], divergence="kl", max_weight=1000.0
    )
    # Of 512 entries that may each miss by ENOUGH; how much they do depends on the library of linear algebra.
    assert found.missed < solver.ENOUGH * np.sqrt(512) and found.effective_sample_size < 0.1


def test_of_an_unreachable_target_the_closest_match_is_taken_and_it_is_said():
    # Experts 0 and 1 are always chosen together, yet asked for different frequencies.
    retain = np.array([[[0, 1]] * 30 + [[2, 3]] * 70])
    target = np.array([[0.6, 0.2, 0.6, 0.6]])
    problem = {"selected": np.ones((1, 4), bool), "target": target, "min_effective_sample_size": 0.0}
    certificate = calibrate(retain, **problem).certificate
    assert "no weights come closer" in certificate.text()
    # x for experts 0 and 1, 1 - x for the others: (x - .6)^2 + (x - .2)^2 + 2 (1 - x - .6)^2 is least at x = .4
    np.testing.assert_allclose(certificate.weighted, [0.4, 0.4, 0.6, 0.6], atol=1e-6)


def test_an_expert_in_every_token_keeps_its_frequency_and_disturbs_nothing(corpora):
    retain, forget, selected = corpora
    always = np.concatenate([retain, np.full((2, retain.shape[1], 1), E)], axis=2)  # expert E is always on
    wider_target = np.concatenate([forget, np.full((2, 1), 0.5)], axis=1)
    wider = np.concatenate([selected, np.ones((2, 1), bool)], axis=1)
    calibration = calibrate(always, selected=wider, target=wider_target)
    plain = calibrate(retain, selected=selected, target=forget)
    np.testing.assert_allclose(calibration.multipliers[:, :E], plain.multipliers, atol=1e-8)
    np.testing.assert_allclose(calibration.multipliers[:, E], 0.0, atol=1e-8)
    assert (calibration.certificate.weighted[calibration.certificate.expert == E] > 1 - 1e-8).all()


def test_a_certificate_computed_by_hand():
    # Four tokens, K = 1: experts 0 0 0 1. Asked: expert 1 in half. So w = 2/3, 2/3, 2/3, 2.
    retain = np.array([[[0], [0], [0], [1]]])
    target = np.array([[0.4, 0.5, 0.1]])
    selected = np.array([[False, True, True]])
    for divergence, multiplier in (("chi2", 2 - 2 / 3), ("kl", np.log(3))):
        calibration = calibrate(retain, selected=selected, target=target, divergence=divergence)
        c = calibration.certificate
        np.testing.assert_allclose(weights_of(retain, calibration), [2 / 3, 2 / 3, 2 / 3, 2], atol=1e-8)
        np.testing.assert_allclose(calibration.multipliers, [[0, multiplier, 0]], atol=1e-8)
    assert (c.layer.tolist(), c.expert.tolist(), c.forget.tolist(), c.retain.tolist()) == ([0], [1], [0.5], [0.25])
    np.testing.assert_allclose([c.target[0], c.weighted[0]], 0.5)
    np.testing.assert_allclose([c.gap_before, c.gap_after, c.closed], [0.25, 0.0, 1.0], atol=1e-8)
    # Others: expert 0 (0.4 asked, .75 before, .5 after) and expert 2 (0.1, never used)
    np.testing.assert_allclose([c.gap_elsewhere_before, c.gap_elsewhere_after], [0.45, 0.2])
    np.testing.assert_allclose(c.closed_all, 1 - 0.2 / 0.7)
    np.testing.assert_allclose(c.effective_sample_size, 16 / (4 * (3 * 4 / 9 + 4)))
    np.testing.assert_allclose([c.largest_weight, c.clipped, c.zero, c.touched], [2.0, 0.0, 0.0, 0.25])
    assert c.infeasible == ((0, 2),) and (c.tokens, c.num_experts) == (4, 3)


def test_weights_that_nothing_is_solved_for_keep_the_same_bounds():
    generator = np.random.default_rng(0)
    base = generator.integers(1, 9, 300).astype(float)
    far_apart = np.repeat([300.0, -800.0], [2, 298])  # the exponentials of all others are 0
    for scores in (
        far_apart,
        generator.normal(0, 30, 300),
        50.0 * (generator.random(300) < 0.1),
        generator.normal(0, 0.1, 300),
    ):
        for size, cap in ((0.2, 50.0), (0.5, 3.0), (0.0, 20.0)):
            weights = solver.concentrated(scores, base, size=size, max_weight=cap)
            np.testing.assert_allclose(base @ weights / base.sum(), 1.0)
            assert weights.max() <= cap * (1 + 1e-12)
            reached, narrow = solver.effective_sample_size(weights, base), np.ptp(scores) < 1
            assert reached >= size - 1e-9 and (narrow or size == 0 or reached < size + 0.01 or cap == 3.0)
            assert (np.diff(weights[np.argsort(scores)]) >= -1e-12).all()
            if narrow:  # no bound is felt
                np.testing.assert_allclose(weights, np.exp(scores) / (base @ np.exp(scores) / base.sum()))
            elif len(np.unique(scores)) > 2:  # a power of what was given, below the largest weight
                log, of = (
                    v[(weights > 1e-200) & (weights < cap * (1 - 1e-12))] for v in (np.log(weights + 1e-300), scores)
                )
                np.testing.assert_allclose(log, np.polyval(np.polyfit(of, log, 1), of), atol=1e-6)


def test_a_calibration_is_the_same_after_saving(corpora, tmp_path):
    retain, forget, selected = corpora
    calibration = calibrate(retain, selected=selected, target=forget)
    calibration.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert np.array_equal(weights_of(retain, loaded), weights_of(retain, calibration))
    assert encode(loaded.certificate) == encode(calibration.certificate)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.json", "calibration.npz"]


def test_bad_settings_and_arrays_are_named(corpora):
    retain, forget, selected = corpora
    good = {"selected": selected, "target": forget}
    for bad, message in (
        ({"unit": "layer"}, "unit is 'layer'"), ({"max_weight": None}, "max_weight is None"),
        ({"divergence": "l2"}, "divergence is 'l2'"), ({"max_weight": 0.5}, "max_weight"),
        ({"max_ratio": float("nan")}, "max_ratio"), ({"min_effective_sample_size": 2.0}, "min_effective"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            calibrate(retain, **good, **bad)
    for indices, bad, message in (
        (retain[:, :0], {}, "no valid token"), (retain, {"unit": "row"}, "needs rows"),
        (retain + np.uint8(2), {}, "name expert 9; there are 8"), (retain.astype(float), {}, "expected integers"),
        (retain, {"target": np.where(selected, np.nan, forget)}, "no frequency"),
        (retain, {"selected": selected[:1]}, "expected bool and numbers"),
        (retain, {"unit": "row", "rows": np.zeros(3, int)}, "one number for each"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            calibrate(indices, **good | bad)
