"""Seven attacks on texts whose likelihoods are written by hand, and PrivLeak in MUSE's convention."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests import handmade, tiny
from trace_jax.evaluation import intervals, membership
from trace_jax.evaluation.likelihood import TokenScores
from trace_jax.evaluation.membership import ATTACKS, SIDES, Membership
from trace_jax.evaluation.task import TaskScores
from trace_jax.models.architecture import abstract_params
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model


def text_scores(values, **others):
    values = np.asarray(values, np.float64)
    return {attack: np.asarray(others.get(attack, values), np.float64) for attack in ATTACKS}


def members(*sides):
    """Scores of a task from those of its forget and holdout texts."""
    both = zip(SIDES, sides, strict=True)
    return TaskScores({f"test/{side}/{attack}": v for side, scores in both for attack, v in scores.items()})


def by_name(scores, retrained=None, **resampling):
    task = Membership({"test": (None, None)}, "", 0)
    result = task.measure(scores, original=None, retrained=retrained, **{"resamples": 200, "seed": 0, **resampling})
    return {m.name: m for m in result}


def test_min_k_is_the_mean_of_the_40_percent_least_likely_tokens_and_of_one_at_least():
    texts = [1, 5, 2, 8, 3], [4, 1, 1, 1, 1, 6, 1, 1, 1, 2], [3, 7], [2]
    result = membership.min_k_scores([-np.array(text, np.float32) for text in texts])
    assert result == pytest.approx([(8 + 5) / 2, (6 + 4 + 2 + 1) / 4, 7, 2])  # int(0.4 * 5) = 2, int(0.4 * 10) = 4


def test_min_k_plus_plus_where_the_model_is_certain():
    """Its variance is 0 there, and counts as 1e-6: the certain token tells nothing, any other very much."""
    certain, surprised = (TokenScores(np.array([x]), np.ones(1, bool), np.zeros(1), np.zeros(1)) for x in (0.0, -3.0))
    assert membership.min_k_plus_plus_scores([certain, surprised]) == pytest.approx([0, 3 / 1e-3])


def test_compressed_sizes_are_of_the_text_without_marks():
    tokenizer = tiny.make_tokenizer()
    result = membership.compressed_sizes(tokenizer, [[4, 5, 6], [4] * 30])
    assert result.tolist() == [len(zlib.compress(text.encode())) for text in ("w4 w5 w6", " ".join(["w4"] * 30))]
    tokenizer.add_special_tokens(["w0"])
    assert membership.compressed_sizes(tokenizer, [[4, 5, 6, 0]]).tolist() == result[:1].tolist()
    assert np.isnan(membership.compressed_sizes(None, [[4]])).all()


@pytest.mark.parametrize(
    ("seen", "holdout", "auc", "rate"),
    [
        ([0.1, 0.2], [3.0, 4.0, 5.0], 1, 1),  # memorised
        ([8.0, 9.0], [3.0, 4.0, 5.0], 0, 0),  # pushed too far
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.5, 0),  # equal scores are half a win, and nothing is found
    ],
)
def test_an_attacker_finds_what_was_memorised_and_is_misled_by_what_was_pushed_too_far(seen, holdout, auc, rate):
    result = by_name(members(text_scores(seen), text_scores(holdout)))
    for attack in ATTACKS:
        measured = result[f"membership_{attack}_auc"], result[f"membership_{attack}_tpr_at_fpr_1"]
        assert [(m.value, m.low, m.high, m.n) for m in measured] == [(auc, auc, auc, 5), (rate, rate, rate, 5)]


def test_aucs_are_those_of_scikit_learn_and_their_intervals_those_of_a_naive_bootstrap():
    rng = np.random.default_rng(1)
    forget, holdout = np.round(rng.normal(0, 1, 40)), np.round(rng.normal(0.6, 1, 30))  # with ties

    def naive(forget, holdout):
        return roc_auc_score([1] * len(forget) + [0] * len(holdout), -np.concatenate([forget, holdout]))

    result = by_name(members(text_scores(forget), text_scores(holdout)), resamples=1000)["membership_loss_auc"]
    assert result.value == pytest.approx(naive(forget, holdout))
    drawn = [naive(rng.choice(forget, 40), rng.choice(holdout, 30)) for _ in range(1000)]
    assert (result.low, result.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_the_reference_attack_compares_two_models_text_by_text():
    ours = members(text_scores([5, 6]), text_scores([1, 2]))  # the forget texts are hard ones
    theirs = members(text_scores([7, 8]), text_scores([1, 2]))
    result = by_name(ours, theirs)
    assert result["membership_loss_auc"].value == 0
    assert result["membership_reference_auc"].value == result["membership_reference_tpr_at_fpr_1"].value == 1
    assert not {"membership_reference_auc", "privleak"} & set(by_name(ours))  # `test_probes.py` has their notes
    with pytest.raises(ValueError, match="same texts"):
        by_name(ours, members(text_scores([5]), text_scores([1, 2])))


def test_what_was_not_scored_is_left_out():
    nothing = [np.nan, np.nan]
    forget = text_scores([1, 2], zlib=nothing, gradient_norm=[np.nan, 3])
    holdout = text_scores([3, 4, 5], zlib=[np.nan] * 3, gradient_norm=[5, np.nan, 4])
    result = by_name(members(forget, holdout))
    assert not any("zlib" in name for name in result)
    gradient = result["membership_gradient_norm_auc"]
    assert (gradient.value, gradient.n) == (1, 3)
    assert gradient.note == "1 forget, 2 holdout texts; too few items for an interval"
    assert math.isnan(gradient.low)
    assert by_name(members(forget, text_scores([]))) == {}
    for count in (99, 100):
        note = by_name(members(forget, text_scores(range(count))))["membership_loss_tpr_at_fpr_1"].note
        assert ("fewer than 100" in note) == (count < 100)


def test_texts_are_told_by_the_routing_of_the_others_and_those_that_are_alike_are_not():
    """Of few texts too: itself left out, and the mean of the fewer others being the farther for that."""
    rng, aucs = np.random.default_rng(0), []
    for shift in [0.0] * 200 + [1.0]:
        forget, holdout = rng.normal(size=(6, 40)) + shift, rng.normal(size=(9, 40))
        forget[:, 5], holdout[:, 5] = 0.1, 0.1  # an expert that all use alike
        sides = membership.resemblance(forget, holdout)
        aucs.append(float(intervals.auc(-sides[0], -sides[1])[0]))
    assert np.mean(aucs[:-1]) == pytest.approx(0.5, abs=0.05) and aucs[-1] > 0.95
    assert [len(side) for side in sides] == [6, 9]
    assert all(np.isnan(side).all() for side in membership.resemblance(forget[:1], holdout))


# --- from a model


def test_a_profile_is_the_mean_of_what_routers_give_where_the_text_is_scored():
    texts, first, model = [[1, 4, 5, 6, 7, 8], [1, 9, 3], [2, 4, 4, 5, 9]], [1, 1, 3], handmade.make_model()
    profiles = membership.routing_profiles(model, texts, first, batch_size=2, mesh=None)
    for text, start, profile in zip(texts, first, profiles, strict=True):
        router = forward(model.params, model.config, np.array([text], np.int32), collect=("router_logits",)).router
        p = np.asarray(jax.nn.softmax(router.logits, axis=-1), np.float64)[:, 0, start - 1 : -1]
        expected = np.concatenate([p.mean(axis=1), -(p * np.log(p)).sum(axis=-1).mean(axis=1, keepdims=True)], axis=1)
        np.testing.assert_allclose(profile, expected.ravel(), rtol=1e-5)


def test_scores_of_a_model():
    """Each attack from the logits of a text alone, by its definition."""
    params, forget, holdout = handmade.make_params(), tiny.make_rows(3, seed=1), tiny.make_rows(4, seed=2)
    scores = Membership({"test": (forget, holdout)}, "", 2).score(handmade.make_model(), batch_size=4, mesh=None)
    result = {attack: scores.arrays[f"test/forget/{attack}"] for attack in ATTACKS}
    assert (len(result["loss"]), len(scores.arrays["test/holdout/loss"])) == (4, 6)  # one or two documents a row
    ids = forget.tokens[2][forget.segments[2] == 1]  # the fourth text
    log_p = handmade.log_probabilities(params, ids)
    mean = (np.exp(log_p) * log_p).sum(-1)
    deviation = np.sqrt((np.exp(log_p) * log_p**2).sum(-1) - mean**2)
    of_token = log_p[np.arange(len(ids) - 1), ids[1:]]
    standardised, most = (of_token - mean[:-1]) / deviation[:-1], max(1, int(0.4 * len(of_token)))
    expected = {
        "loss": -of_token.mean(),
        "min_k": -np.sort(of_token)[:most].mean(),
        "min_k_plus_plus": -np.sort(standardised)[:most].mean(),
        "zlib": -of_token.mean() / len(zlib.compress(" ".join(f"w{i}" for i in ids[1:]).encode())),
    }
    assert {attack: result[attack][3] for attack in expected} == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(result["gradient_norm"]).tolist() == [True, False, True, False]
    assert not any("gradient_norm" in scores.items["items"][i] for i in (1, 3))


def test_a_gradient_norm_is_that_of_the_mean_loss_of_the_text():
    """In half precision, which gives a number of numpy too, about the same."""

    def loss(params, ids, weights):
        log_p = jax.nn.log_softmax(forward(params, handmade.CONFIG, ids[None]).logits[0])
        return -(weights * log_p[jnp.arange(5), ids[1:]]).sum()

    texts, first, model = [[1, 4, 5, 6, 7, 8], [1, 9, 3, 4, 12, 20]], [1, 4], handmade.make_model()
    norms, gradient = membership.gradient_norms(model, texts, first), jax.jit(jax.grad(loss))
    for text, weights, norm in zip(texts, ([0.2] * 5, [0, 0, 0, 0.5, 0.5]), norms, strict=True):
        leaves = jax.tree.leaves(gradient(model.params, np.array(text, np.int32), np.array(weights, np.float32)))
        assert norm == pytest.approx(np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in leaves])), rel=1e-4)
    config = dataclasses.replace(handmade.CONFIG, dtype="bfloat16")
    params = jax.tree.map(lambda x, stored: x.astype(stored.dtype), model.params, abstract_params(config))
    result = membership.gradient_norms(Model(config, params), texts, first)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, norms, rtol=0.2)


# --- PrivLeak; tests/tasks/test_muse.py has its values


def test_privleak_is_zero_of_the_retrained_model_itself_and_has_no_value_where_its_auc_is_0():
    rng = np.random.default_rng(0)
    retrained = rng.normal(size=30), rng.normal(size=30)
    assert dataclasses.astuple(membership.privleak(retrained, retrained)) == (0, 0, 0, 60)  # in every resample
    low, high = np.array([1.0]), np.array([2.0])
    assert membership.privleak((low, high), (low, high)) is None
    result = membership.privleak_auc((low, high))
    assert result.value == 0.0 and math.isnan(result.low)
    assert math.isnan(membership.privleak((low, high), (high, low)).low)
