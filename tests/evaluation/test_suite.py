"""The evaluator names what it measures, measures relative to its references, and leaves out what it can't measure."""

import math

import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.probes import Probes
from trace_jax.evaluation import knowledge, utility
from trace_jax.evaluation.benchmarks import SCOREBOARDS
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.fronts import front_from_history
from trace_jax.evaluation.likelihood import QuestionScores, RowScores, score_questions, score_rows
from trace_jax.evaluation.measurement import find
from trace_jax.evaluation.suite import make_evaluator

SETTINGS = EvaluationConfig(batch_size=8, max_rows=5, max_prompts=3, max_members=5, max_gradients=3, bootstrap=100)


def names(measurements, split):
    return [m.name for m in measurements if m.split == split]


@pytest.fixture(scope="module")
def handbook(tiny):
    probes = {"test": tiny.make_probes(5), "validation": tiny.make_probes(0)}
    return probes, make_evaluator(SETTINGS, tiny.config, probes, tiny.make_tokenizer(), benchmark="handbook")


def test_handbook_quick_measurements(tiny, handbook):
    probes, evaluator = handbook
    evaluator = evaluator.with_references(original=evaluator.score(tiny.params))
    found = evaluator(tiny.make_params(1))
    quick = ["forget_accuracy", "neighbour_accuracy", "general_nll", "general_utility"]
    assert names(found, "validation") == names(found, "test") == quick
    assert [m.split for m in found] == ["validation"] * 4 + ["test"] * 4
    scores = score_questions(tiny.make_params(1), tiny.config, probes["test"].questions["forget"])
    accuracy = find(found, "forget_accuracy", "test")
    assert (accuracy.value, accuracy.n) == (scores.correct.mean(), 9)
    rows = probes["test"].text["general"].take(np.array([0, 1, 2, 4, 5]))  # seven rows thinned to five
    expected = score_rows(tiny.make_params(1), tiny.config, rows)
    nll = find(found, "general_nll", "test")
    assert nll.value == pytest.approx(expected.nll.sum() / rows.valid.sum(), rel=1e-5)
    assert nll.n == 5 and nll.low < nll.value < nll.high


def test_the_original_model_has_utility_one_and_starts_a_front(tiny, handbook):
    _, evaluator = handbook
    evaluator = evaluator.with_references(original=evaluator.score(tiny.params))
    found = evaluator(tiny.params)
    one = find(found, "general_utility", "test")
    assert (one.value, one.low, one.high) == (1, 1, 1)
    run = front_from_history([(0, found), (4, evaluator(tiny.make_params(1)))], benchmark="handbook", split="test")
    assert set(run.utilities) == {"neighbour_accuracy", "general_utility", "mean_utility"}


def test_without_the_original_there_is_no_utility(tiny, handbook):
    assert names(handbook[1](tiny.params), "test") == ["forget_accuracy", "neighbour_accuracy", "general_nll"]


def test_full_measurements_of_a_text_benchmark(tiny):
    text = ("forget", "neighbour", "general")
    probes = {"test": tiny.make_probes(questions=("forget",), text=text)}
    evaluator = make_evaluator(SETTINGS, tiny.config, probes, tiny.make_tokenizer(), benchmark="presidents")
    original = evaluator.score(tiny.params)
    retrained = evaluator.score(tiny.make_params(2), full=True)
    found = evaluator.with_references(original=original, retrained=retrained).full(tiny.make_params(1))
    attacks = ("loss", "min_k", "min_k_plus_plus", "zlib", "gradient_norm", "reference")
    assert names(found, "test") == [
        "cloze_accuracy",
        "forget_nll",
        "forget_probability_ratio",
        "neighbour_nll",
        "neighbour_utility",
        "general_nll",
        "general_utility",
        "verbatim",
        "extraction_strength",
        "exact_memorization",
        *(f"membership_{attack}_{score}" for attack in attacks for score in ("auc", "tpr_at_fpr_1")),
        "privleak_auc",
        "privleak",
    ]
    ratio = find(found, "forget_probability_ratio", "test").value
    nll = find(found, "forget_nll", "test").value
    original_nll = original.text["test", "forget"].nll.sum() / original.text["test", "forget"].tokens.sum()
    assert ratio == pytest.approx(math.exp(original_nll - nll), rel=1e-5)
    assert find(found, "verbatim", "test").n == 3
    assert find(found, "extraction_strength", "test").n == 10  # two documents in each of five rows
    assert find(found, "membership_loss_auc", "test").n == 20
    assert find(found, "membership_gradient_norm_auc", "test").n == 6
    assert all(m.low <= m.value + 1e-9 and m.value <= m.high + 1e-9 for m in found)


def test_without_a_retrained_model_the_auc_says_that_there_is_no_privleak(tiny, handbook):
    found = handbook[1].full(tiny.params)
    assert "no retrained model" in find(found, "privleak_auc", "test").note
    assert "no reference attack" in find(found, "membership_loss_auc", "test").note
    assert find(found, "membership_reference_auc", "test") is None
    assert find(found, "privleak", "test") is None


def test_empty_probes_give_no_measurement(tiny):
    rows = tiny.make_rows(3)
    nothing = rows.take(np.arange(0))
    silent = type(rows)(rows.tokens, rows.segments, np.zeros_like(rows.valid), rows.domain)  # rows, but nothing scored
    questions = {"forget": tiny.make_questions(0)}
    prompts = {"forget": tiny.make_prompts(0)}
    probes = {
        "validation": Probes({}, {}, {}, {}),
        "test": Probes(
            questions, {"general": silent, "forget": nothing}, prompts, {"forget": rows, "holdout": nothing}
        ),
    }
    evaluator = make_evaluator(SETTINGS, tiny.config, probes, benchmark="text")
    assert evaluator.full(tiny.params) == []


def test_members_without_a_scored_token_give_no_membership(tiny):
    rows = tiny.make_rows(3)
    silent = type(rows)(rows.tokens, rows.segments, np.zeros_like(rows.valid), rows.domain)
    probes = {"test": Probes({}, {}, {}, {"forget": rows, "holdout": silent})}
    assert make_evaluator(SETTINGS, tiny.config, probes, benchmark="text").full(tiny.params) == []


def test_sets_that_share_batches_keep_their_own_scores(tiny, handbook):
    probes, evaluator = handbook
    scores = evaluator.score(tiny.params)
    for split in ("validation", "test"):
        for subject in ("forget", "neighbour"):
            alone = score_questions(tiny.params, tiny.config, probes[split].questions[subject])
            np.testing.assert_allclose(scores.questions[split, subject].log_likelihood, alone.log_likelihood, rtol=1e-4)


def test_questions_of_different_lengths_share_batches(tiny):
    short, long = tiny.make_questions(4, length=14), tiny.make_questions(5, length=16, seed=3)
    probes = {s: Probes({"forget": q}, {}, {}, {}) for s, q in (("validation", short), ("test", long))}
    scores = make_evaluator(SETTINGS, tiny.config, probes, benchmark="handbook").score(tiny.params)
    for split, questions in (("validation", short), ("test", long)):
        alone = score_questions(tiny.params, tiny.config, questions)
        np.testing.assert_allclose(scores.questions[split, "forget"].log_likelihood, alone.log_likelihood, rtol=1e-4)


def test_accuracy_has_its_interval_over_groups():
    correct = np.repeat([True, False, True, True], 5)
    scores = QuestionScores(np.where(correct, 1.0, -1.0)[:, None] * [1.0, 0.0], np.zeros(20, int), np.arange(20) // 5)
    found = knowledge.accuracy(scores, resamples=2000)
    assert (found.value, found.n) == (0.75, 20)
    assert found.low == pytest.approx(0.25)  # four groups: a resample with one right group is still common


def test_utility_is_capped_at_one_and_compares_the_same_rows_only():
    valid = np.ones((2, 4), bool)
    original, better, worse = (RowScores(np.full((2, 4), nll, np.float32), valid) for nll in (2.0, 1.5, 2.5))
    assert utility.utility(better, original).value == 1.0
    assert utility.utility(worse, original).value == pytest.approx(math.exp(-0.5))
    assert utility.probability_ratio(better, original).value == pytest.approx(math.exp(0.5))
    other = RowScores(np.full((2, 4), 2.0, np.float32), np.tri(2, 4, dtype=bool))
    with pytest.raises(ValueError, match="same rows"):
        utility.utility(worse, other)


def test_every_scoreboard_can_be_measured():
    with pytest.raises(ConfigError, match="handbook"):
        make_evaluator(SETTINGS, None, {}, benchmark="wmdp")
    assert SCOREBOARDS["handbook"].forgetting == "forget_accuracy"
    assert SCOREBOARDS["presidents"].forgetting == "forget_probability_ratio"
