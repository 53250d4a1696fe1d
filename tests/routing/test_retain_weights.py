"""What unlearning consumes, for every weighting and every way to apply it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.routing.config import APPLICATIONS, WEIGHTINGS, CalibrationConfig
from trace_jax.routing.retain_weights import RetainWeights, apply_weights, retain_weights
from trace_jax.routing.selection import select_experts
from trace_jax.routing.statistics import expert_assignments, expert_statistics
from trace_jax.routing.weights import ratio_weights, token_weights


@pytest.fixture(scope="module")
def setting(tiny_model, random_rows):
    """Keyword arguments of `retain_weights`: forget text of few words, retain text of all."""
    forget, retain = random_rows(1, rows=16, high=12), random_rows(2, rows=24)
    retain.valid[5] = False  # a row without anything to learn from
    return {
        "model": tiny_model, "forget": forget, "retain": retain,
        "forget_statistics": expert_statistics(tiny_model, sequential_batches(forget, 8)),
        "retain_statistics": expert_statistics(tiny_model, sequential_batches(retain, 8)),
        "batch_size": 8,
    }  # fmt: skip


@pytest.fixture(scope="module")
def computed(setting):
    def make(**settings):
        return retain_weights(CalibrationConfig(**settings), **setting)

    return make


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_has_mean_one_on_valid_positions_and_zero_elsewhere(setting, computed, weighting):
    valid = setting["retain"].valid
    found = computed(weighting=weighting)
    assert found.weights.dtype == found.loss_weights.dtype == np.float32
    assert found.weights.shape == valid.shape
    assert (found.weights[~valid] == 0).all()
    assert (found.loss_weights[~valid] == 0).all()
    assert (found.weights >= 0).all()
    np.testing.assert_allclose(found.weights[valid].mean(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.row_probability.sum(), 1.0)
    assert 0 < found.effective_sample_size <= 1
    assert (found.certificate is not None) == (weighting in ("entropy", "permuted", "random_experts"))
    assert (weighting == "uniform") == bool(np.ptp(found.weights[valid]) == 0)


def test_uniform_is_exactly_one_with_rows_drawn_evenly(setting, computed):
    found = computed()
    assert np.array_equal(found.weights, setting["retain"].valid.astype(np.float32))
    assert np.array_equal(found.loss_weights, found.weights)
    assert (found.row_probability == 1 / 24).all()


@pytest.mark.parametrize("unit", ["token", "row", "window"])
def test_stored_weights_equal_those_recomputed_on_the_device(setting, computed, unit):
    found = computed(weighting="entropy", rule="all", unit=unit, strength=0.5, apply="weights")
    retain, model = setting["retain"], setting["model"]
    indices = forward(
        model.params, model.config, jnp.asarray(retain.tokens), mask=jnp.asarray(retain.segments), collect=("indices",)
    ).router.indices
    weights = token_weights(indices, found.calibration, mask=jnp.asarray(retain.valid))
    np.testing.assert_allclose(weights, found.weights, rtol=1e-5)
    np.testing.assert_allclose(found.frequency[found.selected], found.certificate.weighted, rtol=1e-9)


@pytest.mark.parametrize("apply", APPLICATIONS)
def test_equal_frequencies_leave_plain_uniform_training(setting, apply):
    same = {**setting, "forget_statistics": setting["retain_statistics"]}
    retain = setting["retain"].take(np.delete(np.arange(24), 5))
    same["retain"] = retain
    for unit in ("token", "row"):
        config = CalibrationConfig(weighting="entropy", rule="all", unit=unit, apply=apply)
        found = retain_weights(config, **same)
        assert np.array_equal(found.weights, retain.valid.astype(np.float32))
        assert np.array_equal(found.loss_weights, retain.valid.astype(np.float32))
        assert (found.row_probability == 1 / 23).all()


def expectation(losses, valid, probability, weights, rows_per_batch):
    """Exact expectations of (sum of weighted losses, number of valid positions), over every batch that can be drawn."""
    total = count = 0.0
    for batch in itertools.product(range(len(losses)), repeat=rows_per_batch):
        chance = np.prod(probability[list(batch)])
        total += chance * sum((weights[i] * losses[i]).sum() for i in batch)
        count += chance * sum(valid[i].sum() for i in batch)
    return total, count


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (1, 4, 2, 3)])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_drawing_rows_aims_at_the_same_loss_as_weighting_them(lengths, rows_per_batch):
    """E[sum] / E[count] is the corpus mean of w r for "weights" and "both", at any batch size and any row lengths."""
    generator = np.random.default_rng(0)
    valid = np.arange(4) < np.array(lengths)[:, None]
    losses, weights = generator.random((4, 4)), np.where(valid, generator.exponential(size=(4, 4)), 0.0)
    weights /= weights[valid].mean()
    wanted = (weights * losses)[valid].mean()
    for apply in ("weights", "both"):
        total, count = expectation(losses, valid, *apply_weights(weights, valid, apply), rows_per_batch)
        np.testing.assert_allclose(total / count, wanted, rtol=1e-12)
    row_weights = np.where(valid, weights.sum(1, keepdims=True) / valid.sum(1, keepdims=True), 0.0)
    total, count = expectation(losses, valid, *apply_weights(row_weights, valid, "sampling"), rows_per_batch)
    np.testing.assert_allclose(total / count, (row_weights * losses)[valid].mean(), rtol=1e-12)


def test_with_rows_of_one_length_single_draws_have_the_same_mean_exactly():
    """Then the number of valid positions is fixed and the estimator itself, not only its parts, is unbiased."""
    generator = np.random.default_rng(1)
    valid, losses, weights = np.ones((5, 3), bool), generator.random((5, 3)), generator.exponential(size=(5, 3))
    weights /= weights.mean()
    for apply in ("weights", "both"):
        probability, multiplier = apply_weights(weights, valid, apply)
        batch_loss = (multiplier * losses).sum(1) / 3
        np.testing.assert_allclose(probability @ batch_loss, (weights * losses).mean(), rtol=1e-12)


def test_rows_are_drawn_by_mean_weight_and_never_when_empty(setting, computed):
    found = computed(weighting="entropy", unit="row", strength=0.5, apply="sampling")
    valid = setting["retain"].valid
    mean = found.weights.sum(1) / np.maximum(valid.sum(1), 1)
    np.testing.assert_allclose(found.row_probability, mean / mean.sum(), rtol=1e-5)
    assert found.row_probability[5] == 0
    assert np.array_equal(found.loss_weights, valid.astype(np.float32))
    both = computed(weighting="entropy", unit="row", strength=0.5, apply="both")
    np.testing.assert_allclose(both.loss_weights, found.loss_weights, rtol=1e-6)


def test_permuted_has_the_histogram_of_entropy(setting, computed):
    valid = setting["retain"].valid
    entropy, permuted = (computed(weighting=w, strength=0.5) for w in ("entropy", "permuted"))
    np.testing.assert_allclose(np.sort(permuted.weights[valid]), np.sort(entropy.weights[valid]), rtol=1e-6)
    assert not np.allclose(permuted.weights, entropy.weights)


def test_random_experts_are_as_many_per_layer(setting, computed):
    entropy, control = (computed(weighting=w, seed=3) for w in ("entropy", "random_experts"))
    assert np.array_equal(control.selected.sum(1), entropy.selected.sum(1))
    assert not np.array_equal(control.selected, entropy.selected)


def test_ratio_follows_its_formula(setting, computed):
    found = computed(weighting="ratio", tau=1.1, max_ratio=3.0)
    forget, retain = setting["forget_statistics"], setting["retain_statistics"]
    expected = ratio_weights(
        expert_assignments(setting["model"], sequential_batches(setting["retain"], 8)),
        selected=select_experts(forget, retain, rule="ratio", tau=1.1), forget_frequency=forget.frequency,
        retain_frequency=retain.frequency, max_ratio=3.0,
    )  # fmt: skip
    np.testing.assert_allclose(found.weights[setting["retain"].valid], expected, rtol=1e-6)


def test_loss_weights_follow_the_models_losses(setting, computed):
    retain, model = setting["retain"], setting["model"]
    hidden = forward(
        model.params, model.config, jnp.asarray(retain.tokens), mask=jnp.asarray(retain.segments), collect=("hidden",)
    ).hidden
    targets = jnp.asarray(np.pad(retain.tokens[:, 1:], ((0, 0), (0, 1))))
    nll = np.asarray(token_nll(model.params, model.config, hidden, targets))[retain.valid]
    np.testing.assert_allclose(computed(weighting="loss").weights[retain.valid], nll / nll.mean(), rtol=1e-4)


def test_domain_rows_carry_half_of_the_mass(setting, computed):
    found = computed(weighting="domain")
    inside = setting["retain"].domain == 1
    np.testing.assert_allclose(found.weights[inside].sum(), found.weights[~inside].sum(), rtol=1e-5)


def test_ngram_prefers_rows_that_read_like_the_forget_text(setting, computed):
    found = computed(weighting="ngram")
    retain = setting["retain"]
    share = np.where(retain.valid, retain.tokens < 12, False).sum(1) / np.maximum(retain.valid.sum(1), 1)
    filled = retain.valid.any(1)
    row = found.weights.sum(1) / np.maximum(retain.valid.sum(1), 1)
    assert np.corrcoef(share[filled], np.log(row[filled]))[0, 1] > 0.5


def test_hidden_weighs_whole_rows(setting, computed):
    found = computed(weighting="hidden", strength=0.5)
    valid = setting["retain"].valid
    assert all(np.ptp(w[v]) == 0 for w, v in zip(found.weights, valid, strict=True) if v.any())
    with pytest.raises(ConfigError, match="unit must be 'row'"):
        CalibrationConfig(weighting="hidden", unit="token")


def test_the_sample_size_bound_holds_for_matching_and_for_ngrams(computed):
    for weighting in ("entropy", "hidden", "ngram"):
        assert computed(weighting=weighting, min_effective_sample_size=0.9).effective_sample_size >= 0.9


def test_the_batch_size_changes_no_weight(setting):
    config = CalibrationConfig(weighting="entropy", rule="all", unit="row", strength=0.5)
    one = retain_weights(config, **setting)
    other = retain_weights(config, **{**setting, "batch_size": 5})
    assert np.array_equal(one.weights, other.weights)


def test_weights_are_the_same_after_saving_over_others(computed, tmp_path):
    for weighting in ("entropy", "ratio", "uniform"):  # into one directory, as when a setting changes
        found = computed(weighting=weighting)
        found.save(tmp_path)
        loaded = RetainWeights.load(tmp_path)
        for name in ("weights", "row_probability", "loss_weights", "selected"):
            assert np.array_equal(getattr(loaded, name), getattr(found, name))
        assert loaded.effective_sample_size == found.effective_sample_size
        assert (loaded.frequency is None) == (found.frequency is None)
        assert (loaded.certificate is None) == (found.certificate is None)


def test_statistics_of_another_corpus_are_refused(setting):
    with pytest.raises(ValueError, match="statistics of another corpus"):
        retain_weights(CalibrationConfig(), **{**setting, "retain": setting["forget"]})
