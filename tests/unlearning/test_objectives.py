"""Each forget loss against a plain loop over documents and tokens, in value and in gradient.

Row 0 holds two documents, row 1 one and padding, row 2 nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.unlearning.inputs import steering_directions
from trace_jax.unlearning.objectives import PAPER, ForgetInputs, Objective

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0], [0] * 6], np.int32)
VALID = np.array([[1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6], bool)
NLL = np.array([[0.5, 2.0, 1.0, 9.0, 0.3, 9.0], [9.0, 0.25] + [9.0] * 4, [9.0] * 6], np.float32)
REFERENCE = np.array([[0.4, 1.0, 1.5, 7.0, 2.0, 7.0], [7.0, 0.5] + [7.0] * 4, [7.0] * 6], np.float32)
REFUSAL_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0], [0] * 6], np.int32)
REFUSED = np.array([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6], bool)
REFUSAL_NLL = np.array([[8.0, 1.5, 8.0, 2.5, 0.75, 8.0], [4.0] + [8.0] * 5, [8.0] * 6], np.float32)
REFUSAL_REFERENCE = np.array([[6.0, 2.0, 6.0, 3.0, 1.0, 6.0], [3.5] + [6.0] * 5, [6.0] * 6], np.float32)
NUMBERS = {"beta": 0.5, "delta": 0.3, "nll_ceiling": 0.0, "beta1": 2.0, "beta2": 1.5}
PLAIN = ("gradient_ascent", "gradient_difference", "task_vector", "npo", "simnpo", "dpo", "idk", "wga", "tnpo")
PLAIN += ("satimp", "flat")
FORMS = [("npo", "gemma"), ("npo", "token_mean"), ("tnpo", "g_effect"), ("dpo", "tofu"), ("flat", "released")]
CASES = [*((name, PAPER) for name in PLAIN), *FORMS]


def value_of(objective, inputs):
    """Sum of the losses that count over their counts."""
    counts = objective.counts(inputs).astype(jnp.float32)
    means = jnp.where(counts > 0, objective.loss(inputs), 0.0).sum((-2, -1)) / counts.sum()
    return objective.of_means(means, 1)


def make(name, form=PAPER, **numbers):
    return Objective.kinds[name](**({} if form == PAPER else {"form": form}), **numbers)


def ratio(name, nll, form=PAPER, refusal_nll=REFUSAL_NLL, **values):
    inputs = ForgetInputs(
        jnp.asarray(VALID), jnp.asarray(SEGMENTS), nll, jnp.asarray(REFERENCE), refusal_valid=jnp.asarray(REFUSED),
        refusal_segments=jnp.asarray(REFUSAL_SEGMENTS), refusal_nll=jnp.asarray(refusal_nll),
        refusal_reference_nll=jnp.asarray(REFUSAL_REFERENCE),
    )  # fmt: skip
    objective = make(name, form)
    numbers = {k: jnp.float32(v) for k, v in (objective.numbers() | NUMBERS | values).items()}
    return value_of(objective.with_numbers(numbers), inputs)


def documents(values, valid=VALID, segments=SEGMENTS):
    """The values at valid positions of each document."""
    return [row[m & (s == i)] for row, m, s in zip(values, valid, segments, strict=True) for i in range(1, s.max() + 1)]


def refusals(values):
    return documents(values, REFUSED, REFUSAL_SEGMENTS)


def softened(x, beta):
    return 2 / beta * np.log1p(np.exp(-beta * x))


def slow(name, form, nll, refusal, *, beta=0.5, delta=0.3, beta1=2.0, beta2=1.5, weights_at=None, ceiling=0.0):
    """The formulas of docs/methods.md and of released codes. Weights without gradient are computed at `weights_at`."""
    at = nll if weights_at is None else weights_at
    ours, reference, before = documents(nll), documents(REFERENCE.astype(np.float64)), documents(at)
    refused, refused_reference = refusals(refusal), refusals(REFUSAL_REFERENCE.astype(np.float64))
    pairs = list(zip(ours, reference, strict=True))
    if name in ("gradient_ascent", "gradient_difference"):
        if ceiling:
            return np.mean([max(0.0, ceiling - row.mean()) for row in ours])
        return -np.concatenate(ours).mean()
    if name == "npo":
        if form == "token_mean":  # Unlearn-Simple, WMDP/src/unlearn/GA.py: the loss of a text is its tokens' mean
            return np.mean([softened(row.mean() - ref.mean(), beta) for row, ref in pairs])
        losses = [softened(row.sum() - ref.sum(), beta) for row, ref in pairs]
        return np.mean(losses) * (beta / 2 if form == "gemma" else 1)
    if name == "simnpo":
        return np.mean([softened(row.mean() - delta, beta) for row in ours])
    if name == "dpo":
        won = [ref.sum() - row.sum() for row, ref in zip(refused, refused_reference, strict=True)]
        lost = [ref.sum() - row.sum() for row, ref in pairs]
        losses = [softened(w - x, beta) for w, x in zip(won, lost, strict=True)]
        return np.mean(losses) * (beta / 2 if form == "tofu" else 1)
    if name == "idk":
        return np.concatenate(refused).mean()
    if form == "released":  # UCSC-REAL/FLAT, dataloader.py: of two texts of six tokens, five are predicted
        forget, answer = (np.exp(-np.concatenate(part)).sum() / (2 * 5) for part in (ours, refused))
        return np.tanh(forget) / 2 - np.tanh(answer) / 2
    if name == "flat":
        forget, answer = (np.array([np.exp(-row).mean() for row in part]) for part in (ours, refused))
        return np.mean(np.tanh(forget) / 2 - np.tanh(answer) / 2)
    if name == "task_vector":
        return np.concatenate(ours).mean()
    p, p_ref = np.exp(-np.concatenate(before)), np.exp(-np.concatenate(reference))
    weights = {
        "wga": p**beta,
        "tnpo": 2 * p**beta / (p**beta + p_ref**beta + (1e-5 if form == "g_effect" else 0)),
        "satimp": p**beta1 * (1 - p) ** beta2,
    }[name]
    return -np.mean(weights * np.concatenate(ours))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_equals_plain_reference_in_value_and_gradient(name, form):
    of = jax.value_and_grad(lambda nll, refusal: ratio(name, nll, form, refusal), argnums=(0, 1))
    value, gradients = of(jnp.asarray(NLL), jnp.asarray(REFUSAL_NLL))
    point = [NLL.astype(np.float64), REFUSAL_NLL.astype(np.float64)]
    assert value == pytest.approx(slow(name, form, *point), rel=1e-5)
    for side, gradient in enumerate(gradients):
        for index in np.ndindex(NLL.shape):
            moved = []
            for sign in (1, -1):
                shifted = [x.copy() for x in point]
                shifted[side][index] += sign * 1e-5
                moved.append(slow(name, form, *shifted, weights_at=point[0]))
            assert gradient[index] == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=2e-5)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_padding_carries_no_loss(name, form):
    changed = np.where(VALID, NLL, 1e3).astype(np.float32)
    refusal = np.where(REFUSED, REFUSAL_NLL, 1e3).astype(np.float32)
    assert ratio(name, jnp.asarray(changed), form, refusal) == ratio(name, jnp.asarray(NLL), form)


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("extreme", [0.0, 80.0])
def test_finite_where_tokens_are_certain_or_impossible(name, form, extreme):
    value, gradient = jax.value_and_grad(lambda nll: ratio(name, nll, form))(jnp.full(NLL.shape, extreme))
    assert np.isfinite(value) and np.isfinite(np.asarray(gradient)).all()


def test_g_effect_lets_improbable_tokens_go():
    """dataloader.py of tmlr-group/G-effect at p = p_ref = .01 and beta 4: weight 2e-8 / (2e-8 + 1e-5)."""
    nll = jnp.full(NLL.shape, -np.log(0.01), jnp.float32)
    inputs = ForgetInputs(jnp.asarray(VALID), jnp.asarray(SEGMENTS), nll, nll)
    expected = -(2e-8 / (2e-8 + 1e-5)) * -np.log(0.01)
    assert float(value_of(make("tnpo", "g_effect"), inputs)) == pytest.approx(expected, rel=1e-4)
    assert float(value_of(make("tnpo"), inputs)) == pytest.approx(np.log(0.01), rel=1e-5)


def test_ceiling_stops_pushing_documents_that_are_forgotten():
    value, gradient = jax.value_and_grad(lambda nll: ratio("gradient_ascent", nll, nll_ceiling=1.0))(jnp.asarray(NLL))
    assert value == pytest.approx(slow("gradient_ascent", PAPER, NLL, REFUSAL_NLL, ceiling=1.0), rel=1e-6)
    assert not np.asarray(gradient)[0, :3].any(), "the first document is above the ceiling"
    assert gradient[0, 4] < 0 and gradient[1, 1] < 0, "the others are still pushed up, also in its row"


@pytest.mark.parametrize("name", ["rmu", "adaptive_rmu"])
def test_rmu_pulls_hidden_states_to_the_direction_of_their_topic(name):
    """Its forms count positions as their codes do: centerforaisafety/wmdp the mean over all; open-unlearning's
    `compute_activation_loss` masks by `labels != -100`, the tokens that are predicted.
    """
    hidden = np.random.default_rng(0).normal(size=(3, 6, 6)).astype(np.float32)
    directions = np.asarray(steering_directions(jax.random.key(3), 2, 6))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0, rtol=1e-6)
    assert (directions >= 0).all() and (directions[0] != directions[1]).all()
    target = 4.0 * directions[[0, 1, 1]]
    error = ((hidden - target[:, None]) ** 2).mean(-1)
    read = {"hidden": jnp.asarray(hidden), "target": jnp.asarray(target)}
    inputs = ForgetInputs(jnp.asarray(VALID), jnp.asarray(SEGMENTS), **read)
    predicted = documents(error, np.roll(VALID, 1, axis=1))
    expected = {
        PAPER: error[VALID].mean(),
        "wmdp": error[:2].mean(),  # padding counts; the row without a token only fills up the batch
        "open_unlearning": np.mean([of_document.mean() for of_document in predicted]),
    }
    for form, wanted in expected.items():
        assert value_of(make(name, form), inputs) == pytest.approx(wanted, rel=1e-6), form


@pytest.mark.parametrize(
    ("name", "form", "read"),
    [
        ("ceu", PAPER, VALID & np.roll(VALID, 1, axis=1)),  # not the first token that a document predicts
        ("pdu", "open_unlearning", np.roll(VALID, 1, axis=1)),  # pdu.py masks by `labels != -100`, not shifted
        ("npo", "muse_logits", np.repeat([[True], [True], [False]], 6, axis=1)),  # iterative.py of muse_bench: no mask
    ],
)
def test_losses_that_read_other_positions_than_valid_ones(name, form, read):
    inputs = ForgetInputs(jnp.asarray(VALID), jnp.asarray(SEGMENTS), vocabulary=jnp.asarray(NLL))
    assert value_of(make(name, form), inputs) == pytest.approx(NLL[read].mean())


def test_numbers_do_not_shape_a_step():
    for kind in Objective.kinds.values():
        other = kind().with_numbers({number: 2.0 for number in kind().numbers()})
        assert other.without_numbers() == kind().without_numbers() and other.gamma == 2.0
