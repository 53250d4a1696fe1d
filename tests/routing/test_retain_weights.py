"""What unlearning consumes, for every weighting and every way to apply it, once or solved anew."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.io.codec import encode
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.routing.calibration import token_weights
from trace_jax.routing.config import APPLICATIONS, CalibrationConfig, Weighting
from trace_jax.routing.statistics import expert_assignments, expert_statistics
from trace_jax.routing.weights import Recalibration, RetainWeights, retain_weights


def weights_of(setting, **settings):
    config = CalibrationConfig(settings, seed=settings.pop("seed", 0))
    return retain_weights(config, **setting)


@pytest.mark.parametrize("name", Weighting.kinds)
def test_every_weighting_has_mean_one_on_valid_positions_and_zero_elsewhere(setting, name, tmp_path):
    valid = setting["retain"].valid
    found = weights_of(setting, name=name)
    assert found.weights.dtype == found.loss_weights.dtype == np.float32
    assert found.weights.shape == valid.shape
    assert (found.weights[~valid] == 0).all() and (found.loss_weights[~valid] == 0).all()
    assert (found.weights >= 0).all()
    np.testing.assert_allclose(found.weights[valid].mean(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.row_probability.sum(), 1.0)
    assert 0 < found.effective_sample_size <= 1
    matches = name in ("entropy", "permuted", "random_experts")
    assert (found.certificate is not None) == matches and (found.frequency is not None) == (matches or name == "ratio")
    if name == "uniform":
        assert np.array_equal(found.weights, valid.astype(np.float32))
        assert np.array_equal(found.loss_weights, found.weights) and (found.row_probability == 1 / 24).all()
    else:
        assert np.ptp(found.weights[valid]) > 0
    weights_of(setting, name="entropy").save(tmp_path)  # into one directory, as when a setting changes
    found.save(tmp_path)
    loaded = RetainWeights.load(tmp_path)
    for part in ("weights", "row_probability", "loss_weights", "selected", "frequency"):
        assert np.array_equal(getattr(loaded, part), getattr(found, part))
    assert loaded.effective_sample_size == found.effective_sample_size
    assert (loaded.certificate is None) == (found.certificate is None)


@pytest.mark.parametrize("unit", ["token", "row"])
def test_stored_weights_equal_those_recomputed_on_the_device(setting, unit):
    setting = {**setting, "assignments": None, "batch_size": 5}  # which are then found, at any batch size
    found = weights_of(setting, name="entropy", rule="all", unit=unit, strength=0.5, apply="weights")
    retain, model = setting["retain"], setting["model"]
    indices = forward(
        model.params, model.config, jnp.asarray(retain.tokens), mask=jnp.asarray(retain.segments), collect=("indices",)
    ).router.indices
    weights = token_weights(indices, found.calibration, mask=jnp.asarray(retain.valid))
    np.testing.assert_allclose(weights, found.weights, rtol=1e-5)
    np.testing.assert_allclose(found.frequency[found.selected], found.certificate.weighted, rtol=1e-9)


@pytest.mark.parametrize("apply", APPLICATIONS)
def test_equal_frequencies_leave_plain_uniform_training(setting, apply):
    retain = setting["retain"].take(np.delete(np.arange(24), 5))
    same = {**setting, "forget_statistics": setting["retain_statistics"], "retain": retain, "assignments": None}
    for unit in ("token", "row"):
        found = weights_of(same, name="entropy", rule="all", unit=unit, apply=apply)
        assert np.array_equal(found.weights, retain.valid.astype(np.float32))
        assert np.array_equal(found.loss_weights, retain.valid.astype(np.float32))
        assert (found.row_probability == 1 / 23).all()


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
            total += chance * sum((found.loss_weights[i] * losses[i]).sum() for i in batch)
            count += chance * sum(valid[i].sum() for i in batch)
        np.testing.assert_allclose(total / count, (w * losses)[valid].mean(), rtol=1e-6)


def test_rows_are_drawn_by_mean_weight_and_never_when_empty(setting):
    found, both = (
        weights_of(setting, name="entropy", unit="row", strength=0.5, apply=apply) for apply in ("sampling", "both")
    )
    valid = setting["retain"].valid
    mean = found.weights.sum(1) / np.maximum(valid.sum(1), 1)
    np.testing.assert_allclose(found.row_probability, mean / mean.sum(), rtol=1e-5)
    assert found.row_probability[5] == 0
    assert np.array_equal(found.loss_weights, valid.astype(np.float32))
    np.testing.assert_allclose(both.loss_weights, found.loss_weights, rtol=1e-6)


def test_permuted_deals_out_the_weights_of_entropy(setting):
    valid = setting["retain"].valid
    entropy, permuted = (weights_of(setting, name=name, strength=0.5) for name in ("entropy", "permuted"))
    np.testing.assert_allclose(np.sort(permuted.weights[valid]), np.sort(entropy.weights[valid]), rtol=1e-6)
    assert not np.allclose(permuted.weights, entropy.weights)
    again = weights_of({**setting, "solved": entropy, "assignments": setting["assignments"]}, name="permuted")
    assert np.array_equal(again.weights, permuted.weights) and np.array_equal(again.frequency, permuted.frequency)


def test_random_experts_are_as_many_per_layer(setting):
    entropy, control = (
        weights_of(setting, name=name, rule={"tau": 1.05}, seed=3) for name in ("entropy", "random_experts")
    )
    assert np.array_equal(control.selected.sum(1), entropy.selected.sum(1))
    assert not np.array_equal(control.selected, entropy.selected)
    one = weights_of(setting, name="entropy", rule={"name": "affinity", "top": 1, "scope": "model"})
    assert one.selected.sum() == 1


def test_loss_weights_follow_the_models_losses(setting):
    retain, model = setting["retain"], setting["model"]
    hidden = forward(
        model.params, model.config, jnp.asarray(retain.tokens), mask=jnp.asarray(retain.segments), collect=("hidden",)
    ).hidden
    targets = jnp.asarray(np.pad(retain.tokens[:, 1:], ((0, 0), (0, 1))))
    nll = np.asarray(token_nll(model.params, model.config, hidden, targets))[retain.valid]
    np.testing.assert_allclose(weights_of(setting, name="loss").weights[retain.valid], nll / nll.mean(), rtol=1e-4)


def test_rivals_of_rows_weigh_rows_by_what_they_look_at(setting):
    retain = setting["retain"]
    domain, hidden = (weights_of(setting, name=name) for name in ("domain", "hidden"))
    ngram = weights_of(setting, name="ngram", max_weight=1e9)
    inside = retain.domain == 1
    np.testing.assert_allclose(domain.weights[inside].sum(), domain.weights[~inside].sum(), rtol=1e-5)
    share = np.where(retain.valid, retain.tokens < 32, False).sum(1) / np.maximum(retain.valid.sum(1), 1)
    filled = retain.valid.any(1)
    row = ngram.weights.sum(1) / np.maximum(retain.valid.sum(1), 1)
    assert np.corrcoef(share[filled], np.log(row[filled]))[0, 1] > 0.3
    assert all(np.ptp(w[v]) == 0 for w, v in zip(hidden.weights, retain.valid, strict=True) if v.any())


@pytest.mark.parametrize("name", ["entropy", "hidden", "ngram"])
def test_the_sample_size_bound_holds_for_matching_and_for_ngrams(setting, name):
    assert weights_of(setting, name=name, min_effective_sample_size=0.9).effective_sample_size >= 0.9


def test_statistics_of_another_corpus_are_refused(setting):
    with pytest.raises(ValueError, match="statistics of another corpus"):
        weights_of({**setting, "retain": setting["forget"]}, name="uniform")


# --- solved anew


def recalibrated(name="entropy", **settings):
    return CalibrationConfig({"name": name, "routing": {"name": "recalibrated", "every": 3}, **settings})


ALL = recalibrated(rule="all", strength=0.5)


@pytest.fixture(scope="module")
def moved(tiny_model):
    """The model with other routers."""
    router = tiny_model.params["layers"]["router"]
    noise = 2.0 * router.std() * jax.random.normal(jax.random.key(5), router.shape)
    layers = {**tiny_model.params["layers"], "router": router + noise}
    return tiny_model.replace(params={**tiny_model.params, "layers": layers})


def under(model, corpora, config):
    statistics = {f"{n}_statistics": expert_statistics(model, sequential_batches(r, 8)) for n, r in corpora.items()}
    return retain_weights(config, model=model, **corpora, **statistics)


def test_under_the_original_model_nothing_changes(tiny_model, corpora, setting):
    last = retain_weights(ALL, **setting)
    weights, drift = Recalibration(ALL, tiny_model, **corpora)(tiny_model, last)
    assert np.array_equal(weights.weights, last.weights)
    for name in ("forget", "retain"):
        np.testing.assert_array_equal(drift.overlap[name], [1.0, 1.0])
        np.testing.assert_array_equal(drift.frequency_change[name], [0.0, 0.0])
    assert drift.selected_overlap == 1 and not drift.kept
    assert drift.gap["after"] == drift.gap["before"] < drift.gap["unweighted"]
    np.testing.assert_allclose(drift.gap["unweighted"], last.certificate.gap_before)
    np.testing.assert_allclose(drift.gap["after"], last.certificate.gap_after, atol=1e-6)


@pytest.mark.parametrize("name", ["entropy", "ratio", "permuted", "random_experts"])
def test_the_new_weights_are_those_of_the_current_model(tiny_model, moved, corpora, setting, name):
    config = recalibrated(name, rule={"name": "difference", "top": 2})
    last, expected = retain_weights(config, **setting), under(moved, corpora, config)
    weights, drift = Recalibration(config, tiny_model, **corpora)(moved, last)
    np.testing.assert_allclose(weights.weights, expected.weights, rtol=1e-6)
    np.testing.assert_allclose(weights.row_probability, expected.row_probability, rtol=1e-12)
    assert np.array_equal(weights.selected, expected.selected)
    assert drift.selected == expected.selected.sum()


def test_the_drift_is_that_of_the_two_routings(tiny_model, moved, corpora, setting):
    weights, drift = Recalibration(ALL, tiny_model, **corpora)(moved, retain_weights(ALL, **setting))
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
    read = json.loads(json.dumps(encode(drift)))
    assert read["overlap"]["retain"] == drift.overlap["retain"].tolist() and read["layers"] == [0, 1]
    assert f"{drift.selected} experts matched" in drift.text() and "\n" not in drift.text()


def test_where_nothing_is_selected_any_more_the_last_weights_stay(tiny_model, moved, corpora, setting):
    last = retain_weights(ALL, **setting)
    weights, drift = Recalibration(recalibrated(rule={"tau": 1e6}), tiny_model, **corpora)(moved, last)
    assert weights is last
    assert drift.kept and drift.selected == 0 and drift.gap["after"] == 0
    assert "the last weights are kept" in drift.text()
    assert drift.effective_sample_size == last.effective_sample_size


def test_how_often_is_read_where_weights_are_recalibrated_only():
    assert ALL.recalibrates_every == 3 and CalibrationConfig("entropy").recalibrates_every is None
    with pytest.raises(ConfigError, match=r"routing\.every would have no effect"):
        CalibrationConfig({"name": "entropy", "routing": {"name": "online", "every": 5}})
    with pytest.raises(ConfigError, match="routing would have no effect"):
        CalibrationConfig({"name": "loss", "routing": "recalibrated"})
