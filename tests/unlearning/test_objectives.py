"""Each forget loss against a plain loop over rows and tokens, in value and in gradient, and its golden value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.unlearning.objectives import OBJECTIVES, Coefficients, ForgetInputs, steering_direction
from trace_jax.unlearning.retain import hidden_distance, weighted_retain

VALID = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
NLL = np.array([[0.5, 2.0, 1.0, 9.0], [3.0, 9.0, 0.25, 9.0], [9.0, 9.0, 9.0, 9.0]], np.float32)
REFERENCE = np.array([[0.4, 1.0, 1.5, 7.0], [2.0, 7.0, 0.5, 7.0], [7.0, 7.0, 7.0, 7.0]], np.float32)


def numbers(**values) -> Coefficients:
    base = {"gamma": 1.0, "alpha": 1.0, "beta": 0.5, "delta": 0.3, "nll_ceiling": 0.0, "steering": 4.0}
    return Coefficients(**{k: jnp.float32(v) for k, v in (base | values).items()})


def ratio(name, nll, **values):
    inputs = ForgetInputs(jnp.asarray(VALID), nll, jnp.asarray(REFERENCE))
    total, count = OBJECTIVES[name].loss(inputs, numbers(**values))
    return total / count


def rows(nll):
    """(summed nll, summed reference, length) of every row that has a valid token."""
    return [(nll[i][m].sum(), REFERENCE[i][m].sum(), m.sum()) for i, m in enumerate(VALID) if m.any()]


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def slow(name, nll, beta=0.5, delta=0.3, ceiling=0.0):
    nll = np.asarray(nll, np.float64)
    if name == "gradient_ascent" and ceiling:
        return np.mean([max(0.0, ceiling - total / n) for total, _, n in rows(nll)])
    if name == "gradient_ascent":
        return -nll[VALID].mean()
    if name == "npo":
        return -2 / beta * np.mean([log_sigmoid(beta * (total - ref)) for total, ref, _ in rows(nll)])
    return -2 / beta * np.mean([log_sigmoid(beta * (total / n - delta)) for total, _, n in rows(nll)])


@pytest.mark.parametrize("name", ["gradient_ascent", "npo", "simnpo"])
def test_equals_plain_reference_in_value_and_gradient(name):
    value, gradient = jax.value_and_grad(lambda nll: ratio(name, nll))(jnp.asarray(NLL))
    assert value == pytest.approx(slow(name, NLL), rel=1e-6)
    for index in np.ndindex(NLL.shape):
        step = np.zeros_like(NLL, np.float64)
        step[index] = 1e-5
        numeric = (slow(name, NLL + step) - slow(name, NLL - step)) / 2e-5
        assert gradient[index] == pytest.approx(numeric, abs=2e-5)


@pytest.mark.parametrize(("name", "golden"), [("gradient_ascent", -1.35), ("npo", 2.15495702), ("simnpo", 1.83111381)])
def test_golden_value(name, golden):
    assert ratio(name, jnp.asarray(NLL)) == pytest.approx(golden, abs=1e-6)


def test_padding_carries_no_loss():
    for name in ("gradient_ascent", "npo", "simnpo"):
        changed = np.where(VALID, NLL, 1e3).astype(np.float32)
        assert ratio(name, jnp.asarray(changed)) == ratio(name, jnp.asarray(NLL))


def test_ceiling_stops_pushing_rows_that_are_forgotten():
    value, gradient = jax.value_and_grad(lambda nll: ratio("gradient_ascent", nll, nll_ceiling=1.5))(jnp.asarray(NLL))
    assert value == pytest.approx(slow("gradient_ascent", NLL, ceiling=1.5), rel=1e-6)
    assert not np.asarray(gradient[1]).any(), "row 1 is above the ceiling"
    assert (np.asarray(gradient[0])[VALID[0]] < 0).all(), "row 0 is still pushed up"


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    """2/beta log 2 + summed gradient ascent: its gradient is that of -(NLL summed per row)."""
    gradient = jax.grad(lambda nll: ratio("npo", nll, beta=1e-5))(jnp.asarray(NLL))
    ascent = jax.grad(lambda nll: -jnp.where(VALID, nll, 0.0).sum() / 2)(jnp.asarray(NLL))
    np.testing.assert_allclose(gradient, ascent, rtol=1e-4)


def test_rmu_pulls_hidden_states_to_the_scaled_direction():
    hidden = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    direction = steering_direction(jax.random.key(3), 6)
    assert np.linalg.norm(direction) == pytest.approx(1.0, rel=1e-6)
    assert (np.asarray(direction) >= 0).all()
    inputs = ForgetInputs(jnp.asarray(VALID), hidden=jnp.asarray(hidden), direction=direction)
    total, count = OBJECTIVES["rmu"].loss(inputs, numbers(steering=4.0))
    expected = np.mean(
        [((hidden[i, t] - 4.0 * np.asarray(direction)) ** 2).mean() for i, t in zip(*np.nonzero(VALID), strict=True)]
    )
    assert total / count == pytest.approx(expected, rel=1e-6)


def test_weighted_retain_loss_equals_duplicated_tokens():
    """Integer weights are the corpus with tokens repeated; dividing by the count keeps the sums equal."""
    per_token = np.random.default_rng(1).random((3, 4)).astype(np.float32)
    weights = np.array([[2, 0, 1, 5], [3, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    total, count = weighted_retain(jnp.asarray(per_token), jnp.asarray(weights), jnp.asarray(VALID))
    duplicated = [
        value for value, w, v in zip(per_token.flat, weights.flat, VALID.flat, strict=True) if v for _ in range(int(w))
    ]
    assert total == pytest.approx(np.sum(duplicated), rel=1e-6)
    assert float(count) == VALID.sum()


def test_weights_carry_no_gradient():
    gradient = jax.grad(lambda w: weighted_retain(jnp.ones((3, 4)), w, jnp.asarray(VALID))[0])(jnp.ones((3, 4)))
    assert not np.asarray(gradient).any()


def test_hidden_distance_is_the_mean_square_over_the_width():
    a, b = np.random.default_rng(2).normal(size=(2, 2, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(hidden_distance(jnp.asarray(a), jnp.asarray(b)), ((a - b) ** 2).mean(-1), rtol=1e-6)
