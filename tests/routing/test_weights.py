"""What unlearning consumes, for every weighting and every way to apply it: once, online, or solved anew."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.config import ConfigError
from trace_jax.data.rows import sequential_batches
from trace_jax.io.files import encode
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.routing.calibration import (
    calibrate,
    count_activations,
    match_frequencies,
    token_weights,
    weighted_frequency,
)
from trace_jax.routing.config import CalibrationConfig, Matching, Weighting
from trace_jax.routing.solver import effective_sample_size
from trace_jax.routing.statistics import Assignments, expert_sensitivity
from trace_jax.routing.weights import Recalibration, RetainWeights, retain_weights

MADE_FROM = ("model", "forget", "retain", "mesh", "batch_size")


def weights_of(setting, **settings):
    config = CalibrationConfig(settings, seed=settings.pop("seed", 0))
    return retain_weights(config, **setting)


@pytest.mark.parametrize("name", ["uniform", "ratio", "matching", "ngram"])
def test_statistics_that_are_not_given_are_made(setting, name):
    given = weights_of(setting, name=name)
    made = weights_of({key: value for key, value in setting.items() if key in MADE_FROM}, name=name)
    np.testing.assert_array_equal(made.tokens, given.tokens)
    np.testing.assert_array_equal(made.selected, given.selected)


def test_the_rule_by_sensitivity_takes_the_experts_with_the_steepest_loss_on_forget_rows(setting):
    found = weights_of(setting, name="ratio", rule={"name": "sensitivity", "top": 1}).selected
    slopes = expert_sensitivity(setting["model"], sequential_batches(setting["forget"], 8), mesh=setting["mesh"])
    assert (found == (slopes == slopes.max(axis=1, keepdims=True))).all()


def test_experts_of_ones_own_choice_are_matched_in_place_of_those_of_the_rule(setting):
    own = np.array([[True, False, False, True], [False, False, True, False]])
    found = weights_of({**setting, "selected": own}, name="matching", unit="row")
    by_hand = calibrate(setting["assignments"], selected=own, target=setting["forget_statistics"].frequency, unit="row")
    assert (found.selected == own).all()
    np.testing.assert_array_equal(found.calibration.multipliers, by_hand.multipliers)
    others = weights_of({**setting, "selected": own}, name="random_experts").selected
    assert (others.sum(axis=1) == [2, 1]).all() and not (others & own).any()
    with pytest.raises(ValueError, match=r"selected is bool \(2, 3\); expected bool \(2, 4\)"):
        weights_of({**setting, "selected": own[:, :3]}, name="matching")
    with pytest.raises(ValueError, match="'ngram' looks at no expert"):
        weights_of({**setting, "selected": own}, name="ngram")


def test_random_experts_that_have_to_be_selected_ones_are_counted_in_the_certificate(setting):
    few, many = (
        weights_of(setting, name="random_experts", rule={"name": "difference", "top": top}).calibration.certificate
        for top in (2, 3)
    )
    assert not any("control experts" in note for note in few.notes)
    assert "4 of 6 control experts are forget-critical ones: there are too few others." in many.notes


@pytest.mark.parametrize("name", Weighting.kinds)
def test_every_weighting_has_mean_one_on_valid_positions_and_zero_elsewhere(setting, name, tmp_path):
    valid = setting["retain"].valid
    found = weights_of(setting, name=name)
    assert found.weights.dtype == found.step_weights.dtype == np.float32
    assert found.weights.shape == valid.shape
    assert (found.weights[~valid] == 0).all() and (found.step_weights[~valid] == 0).all()
    assert (found.weights >= 0).all()
    np.testing.assert_allclose(found.weights[valid].mean(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.row_probability.sum(), 1.0)
    assert 0 < found.effective_sample_size <= 1
    matches = name in ("matching", "permuted", "random_experts", "least_experts")
    assert (found.calibration is not None) == matches and (found.frequency is not None) == (matches or name == "ratio")
    if name == "uniform":
        assert np.array_equal(found.weights, valid.astype(np.float32))
        assert np.array_equal(found.step_weights, found.weights) and (found.row_probability == 1 / 24).all()
    else:
        assert np.ptp(found.weights[valid]) > 0
    weights_of(setting, name="matching").save(tmp_path)  # into one directory, as when a setting changes
    found.save(tmp_path)
    loaded = RetainWeights.load(tmp_path)
    for part in ("weights", "row_probability", "step_weights", "selected", "frequency", "effective_sample_size"):
        assert np.array_equal(getattr(loaded, part), getattr(found, part))
    assert encode(loaded.calibration) == encode(found.calibration)


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (1, 4, 2, 3)])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_drawing_rows_aims_at_the_same_loss_as_weighting_them(lengths, rows_per_batch):
    """E[sum] / E[count] is the corpus mean of w r for "weights" and "both", at any batch size and any row lengths."""
    generator = np.random.default_rng(0)
    valid = np.arange(4) < np.array(lengths)[:, None]
    losses, weights = generator.random((4, 4)), np.where(valid, generator.exponential(size=(4, 4)), 0.0)
    weights /= weights[valid].mean()
    row_weights = np.where(valid, weights.sum(1, keepdims=True) / valid.sum(1, keepdims=True), 0.0)
    for apply, w in (("weights", weights), ("both", weights), ("sampling", row_weights)):
        found = RetainWeights(w[valid], valid, apply)
        total = count = 0.0  # exact expectations over every batch that can be drawn
        for batch in itertools.product(range(4), repeat=rows_per_batch):
            chance = np.prod(found.row_probability[list(batch)])
            total += chance * sum((found.step_weights[i] * losses[i]).sum() for i in batch)
            count += chance * sum(valid[i].sum() for i in batch)
        np.testing.assert_allclose(total / count, (w * losses)[valid].mean(), rtol=1e-6)


def test_rows_are_drawn_by_mean_weight_and_never_when_empty(setting):
    found, both = (weights_of(setting, name="matching", unit="row", apply=apply) for apply in ("sampling", "both"))
    valid = setting["retain"].valid
    mean = found.weights.sum(1) / np.maximum(valid.sum(1), 1)
    np.testing.assert_allclose(found.row_probability, mean / mean.sum(), rtol=1e-5)
    assert found.row_probability[5] == 0
    assert np.array_equal(found.step_weights, valid.astype(np.float32))
    drawn = found.row_probability > 0
    np.testing.assert_allclose(both.step_weights[drawn], found.step_weights[drawn], rtol=1e-6)


def test_permuted_deals_out_the_weights_of_matching(setting):
    valid = setting["retain"].valid
    matching, permuted = (weights_of(setting, name=name) for name in ("matching", "permuted"))
    np.testing.assert_allclose(np.sort(permuted.weights[valid]), np.sort(matching.weights[valid]), rtol=1e-6)
    assert not np.allclose(permuted.weights, matching.weights)
    again = weights_of({**setting, "solved": matching}, name="permuted")
    assert np.array_equal(again.weights, permuted.weights) and np.array_equal(again.frequency, permuted.frequency)


def test_control_experts_are_as_many_per_layer(setting):
    kinds = ("matching", "random_experts")
    matching, control = (weights_of(setting, name=name, rule={"name": "ratio", "tau": 1.05}, seed=3) for name in kinds)
    assert np.array_equal(control.selected.sum(1), matching.selected.sum(1))
    assert not np.array_equal(control.selected, matching.selected)
    least = weights_of(setting, name="least_experts", rule={"name": "difference", "top": 1})
    difference = setting["forget_statistics"].frequency - setting["retain_statistics"].frequency
    assert np.array_equal(least.selected, difference == difference.min(axis=1, keepdims=True))
    one = weights_of(setting, name="matching", rule={"name": "affinity", "top": 1, "scope": "model"})
    assert one.selected.sum() == 1


def test_rivals_weigh_by_what_they_look_at(setting):
    retain, model = setting["retain"], setting["model"]
    targets = jnp.asarray(np.pad(retain.tokens[:, 1:], ((0, 0), (0, 1))))
    hidden = forward(model.params, model.config, retain.tokens, mask=retain.segments, collect=("hidden",)).hidden
    nll = np.asarray(token_nll(model.params, model.config, hidden, targets))[retain.valid]
    np.testing.assert_allclose(weights_of(setting, name="loss").weights[retain.valid], nll / nll.mean(), rtol=1e-4)
    domain, hidden, ngram = (weights_of(setting, name=name) for name in ("domain", "hidden", "ngram"))
    inside = retain.domain == 1
    share = retain.valid[inside].sum() / retain.valid.sum()
    assert share > 0.2  # so that the bound allows all of the mass
    np.testing.assert_allclose(domain.weights[inside][retain.valid[inside]], 1 / share, rtol=1e-5)
    share = np.where(retain.valid, retain.tokens < 32, False).sum(1) / np.maximum(retain.valid.sum(1), 1)
    filled = retain.valid.any(1)
    row = ngram.weights.sum(1) / np.maximum(retain.valid.sum(1), 1)
    assert np.corrcoef(share[filled], np.log(row[filled] + 1e-30))[0, 1] > 0.3
    assert all(np.ptp(w[v]) == 0 for w, v in zip(hidden.weights, retain.valid, strict=True) if v.any())
    assert min(found.effective_sample_size for found in (hidden, ngram)) >= 0.2 - 1e-6


@pytest.mark.parametrize("name", [name for name in Weighting.kinds if name not in ("uniform", "permuted")])
def test_every_weighting_keeps_the_sample_that_is_asked_for_and_changes_for_nothing_else(setting, name):
    """Similarity draws rows by whole numbers: it keeps a little more."""

    def bounded(size):
        return weights_of(setting, name=name, max_weight=1e6, min_effective_sample_size=size)

    raw = bounded(0.0)
    asked = (1.0 + raw.effective_sample_size) / 2
    kept, loose = bounded(asked).effective_sample_size, bounded(raw.effective_sample_size / 2)
    assert asked < 0.998 and kept > asked - 1e-4 and (name == "similarity" or kept < asked + 1e-4)
    np.testing.assert_allclose(loose.tokens, raw.tokens, rtol=1e-4, atol=1e-4)


def test_statistics_of_another_corpus_are_refused(setting):
    with pytest.raises(ValueError, match="statistics of another corpus"):
        weights_of({**setting, "retain": setting["forget"]}, name="uniform")


# --- recomputed on a device from lambda and the chosen experts

N, S, E = 60, 30, 8


@pytest.fixture(scope="module")
def corpus(random_routing):
    """(indices [L, N, S, K], valid [N, S], the assignments of its valid tokens, forget frequencies)."""
    indices = random_routing(3, tokens=N * S, domains=3).reshape(2, N, S, 2)
    valid = np.random.default_rng(0).random((N, S)) < 0.8  # holes, as at document boundaries
    valid[7] = False
    segments = np.where(valid, 1 + np.arange(S) // 11, 0).astype(np.int32)
    row = np.nonzero(valid)[0].astype(np.int32)
    assignments = Assignments(indices[:, valid], row, 4 * row + segments[valid])
    return indices, valid, segments, assignments, count_activations(random_routing(3, tokens=200, domains=3), E) / 200


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
@pytest.mark.parametrize(("unit", "max_weight"), [("token", 1.5), ("row", 50.0), ("document", 50.0)])
def test_device_weights_equal_the_solvers(corpus, unit, max_weight, divergence):
    indices, valid, segments, assignments, forget = corpus
    settings = Matching(unit=unit, max_weight=max_weight, divergence=divergence, min_effective_sample_size=0.5)
    counts, every = count_activations(assignments.indices, E), np.ones((2, E), bool)
    calibration, solved, _ = match_frequencies(assignments, counts, every, forget, settings)[0]
    compute = jax.jit(lambda indices, mask, segments: token_weights(indices, calibration, mask=mask, segments=segments))
    arrays = jnp.asarray(indices, jnp.int32), jnp.asarray(valid), jnp.asarray(segments)
    weights = np.asarray(compute(*arrays))
    assert weights.dtype == np.float32 and weights.shape == valid.shape
    np.testing.assert_allclose(weights[valid], solved, rtol=1e-5, atol=1e-5)
    assert (weights[~valid] == 0).all() and np.ptp(solved) > 0.1
    np.testing.assert_allclose(weights[valid].mean(), 1.0, rtol=1e-5)
    part = compute(arrays[0][:, 5:9], arrays[1][5:9], arrays[2][5:9])
    np.testing.assert_allclose(weights[5:9], part, rtol=1e-5, atol=1e-6)  # whatever batch a row comes in
    with pytest.raises(ValueError, match="3 layers; the calibration was made for 2"):
        token_weights(jnp.zeros((3, 5, 2), jnp.int32), calibration)
    if unit == "token":
        flat = token_weights(jnp.asarray(assignments.indices, jnp.int32), calibration)
        np.testing.assert_allclose(flat, solved, rtol=1e-5, atol=1e-5)
        return
    units = np.where(valid, 0 if unit == "row" else segments, -1)
    assert all(np.ptp(row[at == u]) == 0 for row, at in zip(weights, units, strict=True) for u in set(at.tolist()))
    with pytest.raises(ValueError, match=r"need indices \[L, B, S, K\]"):
        token_weights(jnp.zeros((2, 5, 2), jnp.int32), calibration)
    if unit == "document":
        with pytest.raises(ValueError, match="need segments"):
            token_weights(arrays[0], calibration)


def test_small_formulas_by_hand():
    np.testing.assert_allclose(effective_sample_size(np.array([1.0, 3.0])), 16 / 20)
    np.testing.assert_allclose(effective_sample_size(np.array([1.0, 3.0]), np.array([2.0, 1.0])), 25 / (3 * 11))
    frequency = weighted_frequency(np.array([[[0, 1], [1, 2]]]), np.array([1.0, 3.0]), 4)
    np.testing.assert_allclose(frequency, [[0.25, 1.0, 0.75, 0.0]])


@pytest.mark.parametrize("apply", ["weights", "both"])
def test_the_expected_loss_is_that_of_the_present_weights(setting, tmp_path, apply):
    """Rows are drawn by the old weights and tokens weighed by new ones: E[sum v r] / E[count] is the mean of w r. Under
    the original routing they are the offline ones: tests/unlearning/test_weights_in_step.py.
    """
    weights_of(setting, name="matching", rule="all", routing="online", apply=apply).save(tmp_path)
    found = RetainWeights.load(tmp_path)
    valid, rng = setting["retain"].valid, np.random.default_rng(0)
    indices = jnp.asarray(rng.permuted(np.tile(np.arange(4), (2, *valid.shape, 1)), axis=-1)[..., :2], jnp.int32)
    losses = rng.random(valid.shape)
    present = np.asarray(token_weights(indices, found.step_calibration, mask=jnp.asarray(valid)))
    v = present * found.step_weights
    total, count = found.row_probability @ (v * losses).sum(1), found.row_probability @ valid.sum(1)
    np.testing.assert_allclose(total / count, (present * losses)[valid].mean(), rtol=1e-5)
    mean = found.row_probability @ v.sum(1) / count
    np.testing.assert_allclose(mean, present[valid].mean(), rtol=1e-5)
    assert abs(mean - 1) > 1e-3  # the routing is another one, so the mean is no longer one


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ({"name": "ratio", "routing": "online"}, "weighting 'ratio', which has no multipliers"),
        ({"name": "permuted", "routing": "online"}, "weighting 'permuted', which has no multipliers"),
        ({"name": "matching", "apply": "sampling", "routing": "online"}, "set apply to 'both' or 'weights'"),
        ({"name": "hidden", "routing": "online"}, r"routing would have no effect: it belongs to .*matching"),
        ({"name": "loss", "routing": "recalibrated"}, "routing would have no effect"),
        ({"name": "matching", "routing": {"name": "online", "every": 5}}, r"routing\.every would have no effect"),
    ],
)
def test_settings_that_can_not_be_followed_are_refused(weighting, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(weighting)


# --- solved anew


def recalibrated(name="matching", **settings):
    return CalibrationConfig({"name": name, "routing": {"name": "recalibrated", "every": 3}, **settings})


ALL = recalibrated(rule="all")


@pytest.fixture(scope="module")
def moved(tiny_model, routed):
    """`setting` of the model with other routers."""
    noise = jax.random.normal(jax.random.key(5), tiny_model.params["layers"]["router"].shape)
    return routed(tiny.with_router(tiny_model, lambda router: router + 2.0 * router.std() * noise))


def anew(config, setting, current, last):
    solve = Recalibration(config, setting["model"], setting["forget"], setting["retain"], tiny.mesh_of(1, 1, 1), 8)
    return solve(current, last)


def test_under_the_original_model_nothing_changes(setting):
    last = retain_weights(ALL, **setting)
    weights, drift = anew(ALL, setting, setting["model"], last)
    assert np.array_equal(weights.weights, last.weights)
    for name in ("forget", "retain"):
        np.testing.assert_array_equal(drift.overlap[name], [1.0, 1.0])
        np.testing.assert_array_equal(drift.frequency_change[name], [0.0, 0.0])
    assert drift.selected_overlap == 1 and not drift.unchanged
    assert drift.gap["after"] == drift.gap["before"] < drift.gap["unweighted"]
    np.testing.assert_allclose(drift.gap["unweighted"], last.calibration.certificate.gap_before)
    np.testing.assert_allclose(drift.gap["after"], last.calibration.certificate.gap_after, atol=1e-6)
    assert ALL.recalibrates_every == 3 and CalibrationConfig("matching").recalibrates_every is None


@pytest.mark.parametrize("name", ["matching", "ratio", "permuted", "random_experts"])
def test_the_new_weights_are_those_of_the_current_model(setting, moved, name):
    config = recalibrated(name, rule={"name": "difference", "top": 2})
    expected = retain_weights(config, **moved)
    weights, drift = anew(config, setting, moved["model"], retain_weights(config, **setting))
    np.testing.assert_allclose(weights.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(weights.row_probability, expected.row_probability, rtol=1e-12)
    assert np.array_equal(weights.selected, expected.selected)
    assert drift.selected == expected.selected.sum()


def test_the_drift_is_that_of_the_two_routings(setting, moved):
    weights, drift = anew(ALL, setting, moved["model"], retain_weights(ALL, **setting))
    for layer in range(2):
        chosen = (one["assignments"].indices[layer].tolist() for one in (setting, moved))
        pairs = [(set(a), set(b)) for a, b in zip(*chosen, strict=True)]
        jaccard = np.mean([len(a & b) / len(a | b) for a, b in pairs])
        np.testing.assert_allclose(drift.overlap["retain"][layer], jaccard, rtol=1e-12)
    for name in ("forget", "retain"):
        before, after = (one[f"{name}_statistics"].frequency for one in (setting, moved))
        np.testing.assert_allclose(drift.frequency_change[name], np.abs(after - before).sum(1), rtol=1e-12)
        assert (drift.overlap[name] < 0.9).all()
    assert drift.gap["after"] < drift.gap["before"]
    assert drift.effective_sample_size == weights.effective_sample_size
    read = json.loads(json.dumps(encode(drift)))
    assert read["overlap"]["retain"] == drift.overlap["retain"].tolist() and read["layers"] == [0, 1]
    assert f"{drift.selected} experts selected" in drift.text() and "\n" not in drift.text()


def test_where_nothing_is_selected_any_more_the_last_weights_stay(setting, moved):
    last = retain_weights(ALL, **setting)
    weights, drift = anew(recalibrated(rule={"name": "ratio", "tau": 1e6}), setting, moved["model"], last)
    assert weights is last
    assert drift.unchanged and drift.selected == 0 and drift.gap["after"] == 0
    assert "the last weights are kept" in drift.text()
    assert drift.effective_sample_size == last.effective_sample_size
