"""The built-in tasks name what they measure, measure relative to references, and leave out what they can't measure."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.data.corpora import Probes, Prompts, prompts_of
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.fronts import front_from_history
from trace_jax.evaluation.likelihood import score_questions, score_rows, score_sequences
from trace_jax.evaluation.measurement import find
from trace_jax.evaluation.probes import (
    QuestionAccuracy,
    TextLikelihood,
    Verbatim,
    exact_memorization,
    extraction_strength,
)
from trace_jax.evaluation.rouge import rouge_l
from trace_jax.evaluation.task import TaskScores
from trace_jax.models.generate import generate
from trace_jax.models.model import Model
from trace_jax.tasks.benchmarks import scoreboard

SETTINGS = EvaluationConfig(batch_size=8, max_rows=5, max_prompts=3, max_members=5, max_gradients=3, bootstrap=100)


def names(measurements, split):
    return [m.name for m in measurements if m.split == split]


@pytest.fixture(scope="module")
def handbook(tiny):
    probes = {"test": tiny.make_probes(5), "validation": tiny.make_probes(0)}
    return probes, tiny.make_evaluator(SETTINGS, probes, benchmark="handbook")


def test_quick_measurements_of_the_handbook(tiny, handbook):
    probes, evaluator = handbook
    own = evaluator.score(tiny.make_model())
    assert names(evaluator.measure(own), "test") == ["forget_accuracy", "neighbour_accuracy", "general_nll"]
    evaluator, other = dataclasses.replace(evaluator, original=own), tiny.make_model(1)
    found = evaluator.measure(evaluator.score(other))
    quick = ["forget_accuracy", "neighbour_accuracy", "general_nll", "general_utility"]
    assert names(found, "validation") == names(found, "test") == quick
    assert [m.split for m in found] == ["validation"] * 4 + ["test"] * 4
    scores = score_questions(other.params, tiny.config, probes["test"].questions["forget"])
    accuracy = find(found, "forget_accuracy", "test")
    assert (accuracy.value, accuracy.n) == (scores.correct.mean(), 9)
    rows = probes["test"].text["general"].take(np.array([0, 1, 2, 4, 5]))  # seven rows thinned to five
    expected = score_rows(other.params, tiny.config, rows)
    nll = find(found, "general_nll", "test")
    assert nll.value == pytest.approx(expected.nll.sum() / rows.valid.sum(), rel=1e-5)
    assert nll.n == 5 and nll.low < nll.value < nll.high
    one = find(evaluator.measure(own), "general_utility", "test")
    assert (one.value, one.low, one.high) == (1, 1, 1)
    run = front_from_history([(0, evaluator.measure(own)), (4, found)], board=scoreboard("handbook"), split="test")
    assert set(run.utilities) == {"neighbour_accuracy", "general_utility", "mean_utility"}


def test_full_measurements_of_a_text_benchmark(tiny):
    text = ("forget", "neighbour", "general")
    probes = {"test": tiny.make_probes(questions=("forget",), text=text)}
    evaluator = tiny.make_evaluator(SETTINGS, probes, benchmark="presidents")
    original, unlearned, retrained = (evaluator.score(tiny.make_model(seed), full=True) for seed in range(3))
    alone = evaluator.measure(unlearned)
    assert "no retrained model" in find(alone, "privleak_auc", "test").note
    assert "no reference attack" in find(alone, "membership_loss_auc", "test").note
    found = dataclasses.replace(evaluator, original=original, retrained=retrained).measure(unlearned)
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
    ratio, nll, before = (
        find(m, name, "test").value
        for m, name in (
            (found, "forget_probability_ratio"),
            (found, "forget_nll"),
            (evaluator.measure(original), "forget_nll"),
        )
    )
    assert ratio == pytest.approx(math.exp(before - nll), rel=1e-5)
    assert find(found, "verbatim", "test").n == 3
    assert find(found, "extraction_strength", "test").n == 10  # two documents in each of five rows
    assert find(found, "membership_loss_auc", "test").n == 20
    assert find(found, "membership_gradient_norm_auc", "test").n == 6
    assert all(m.low <= m.value + 1e-9 and m.value <= m.high + 1e-9 for m in found)


def test_probes_with_nothing_to_score_give_no_measurement(tiny):
    rows = tiny.make_rows(3)
    nothing = rows.take(np.arange(0))
    silent = dataclasses.replace(rows, valid=np.zeros_like(rows.valid))  # rows, but nothing scored
    questions, prompts = {"forget": tiny.make_questions(0)}, {"forget": tiny.make_prompts(0)}
    for holdout in (nothing, silent):
        members = {"forget": rows, "holdout": holdout}
        test = Probes(questions, {"general": silent, "forget": nothing}, prompts, members)
        evaluator = tiny.make_evaluator(SETTINGS, {"validation": Probes({}, {}, {}, {}), "test": test})
        assert evaluator.measure(evaluator.score(tiny.make_model(), full=True)) == []


def test_sets_that_share_batches_keep_their_own_scores(tiny):
    """Questions of different lengths too."""
    sets = {("validation", "forget"): tiny.make_questions(4, length=14)}
    sets |= {("test", subject): tiny.make_questions(5, length=16, seed=3 + i) for i, subject in enumerate("ab")}
    scores = QuestionAccuracy(sets, "", {}).score(tiny.make_model(), batch_size=8, mesh=None)
    for (split, subject), questions in sets.items():
        alone = score_questions(tiny.params, tiny.config, questions)
        found = scores.arrays[f"{split}/{subject}/log_likelihood"]
        np.testing.assert_allclose(found, alone.log_likelihood, rtol=1e-4)


def test_accuracy_has_its_interval_over_groups(tiny):
    correct = np.repeat([True, False, True, True], 5)
    questions = dataclasses.replace(
        tiny.make_questions(20), answer=np.zeros(20, int), group=(np.arange(20) // 5).astype(np.int32)
    )
    scores = TaskScores({"test/forget/log_likelihood": np.where(correct, 1.0, -1.0)[:, None] * [1.0, 0.0]})
    task = QuestionAccuracy({("test", "forget"): questions}, "", {})
    (found,) = task.measure(scores, original=None, retrained=None, resamples=2000, seed=0)
    assert (found.name, found.value, found.n) == ("forget_accuracy", 0.75, 20)
    assert found.low == pytest.approx(0.25)  # four groups: a resample with one right group is still common


def test_utility_is_capped_at_one_where_the_text_is_not_to_be_forgotten(tiny):
    task = TextLikelihood({("test", subject): tiny.make_rows(2) for subject in ("forget", "general")}, "")

    def scores(nll):
        arrays = {"nll": np.full(2, 4 * nll), "tokens": np.full(2, 4.0)}
        return TaskScores({f"test/{s}/{name}": x for s in ("forget", "general") for name, x in arrays.items()})

    for nll, forget, general in ((1.5, math.exp(0.5), 1.0), (2.5, math.exp(-0.5), math.exp(-0.5))):
        found = task.measure(scores(nll), original=scores(2.0), retrained=None, resamples=100, seed=0)
        assert find(found, "forget_probability_ratio", "test").value == pytest.approx(forget)
        assert find(found, "general_utility", "test").value == pytest.approx(general)
        assert find(found, "general_nll", "test").value == pytest.approx(nll)


# --- verbatim


def verbatim(model, prompts, batch_size=2):
    arrays = Verbatim({"test": prompts}, "").score(model, batch_size=batch_size, mesh=None).arrays
    return arrays["test/score"], arrays["test/generated"]


def test_a_continuation_that_the_model_would_write_scores_one(tiny):
    prompts = tiny.make_prompts(5)
    greedy = np.asarray(generate(tiny.params, tiny.config, prompts.prompt, max_new_tokens=4))
    truth = greedy.copy()
    truth[1:] = (greedy[1:] + 1) % 37
    score, generated = verbatim(tiny.make_model(), Prompts(prompts.prompt, truth))
    words = [[" ".join(f"w{i}" for i in row) for row in rows] for rows in (greedy, truth)]
    assert score[0] == 1.0 and (score[1:] < 1).all()
    assert score == pytest.approx(rouge_l(*words))
    np.testing.assert_array_equal(generated, greedy)


def test_prompts_of_any_length_score_as_they_do_alone(tiny):
    rng = np.random.default_rng(0)
    shapes = ((5, 4), (9, 2), (3, 6), (5, 1))
    pairs = [tuple(rng.integers(3, 37, n).tolist() for n in shape) for shape in shapes]
    together, model = prompts_of(pairs), tiny.make_model()
    for row, (prompt, truth) in enumerate(pairs):
        greedy = generate(tiny.params, tiny.config, np.array([prompt]), max_new_tokens=len(truth))[0].tolist()
        together.continuation[row, : len(truth)] = [greedy[0], *truth[1:]]  # one token right, whatever follows
    score, generated = verbatim(model, together)
    for row, (P, C) in enumerate(shapes):
        alone = Prompts(together.prompt[row : row + 1, :P], together.continuation[row : row + 1, :C])
        expected, written = verbatim(model, alone)
        assert score[row] == pytest.approx(expected[0]) and score[row] > 0
        np.testing.assert_array_equal(generated[row, :C], written[0])
    assert score[3] == 1.0
    part = together.take(np.array([2, 0]))
    assert part.unpadded(part.continuation) == [
        together.continuation[2, :6].tolist(),
        together.continuation[0, :4].tolist(),
    ]


# --- extraction strength and exact memorisation: by hand, by a naive loop, and as open-unlearning counts them

T, F = True, False
HAND = [  # flags, (strength, memorisation), (the same in open-unlearning's profile)
    ([T, T, T, T], (1, 1), (1, 1)),
    ([F, F, F, F], (0, 0), (1 / 3, 0)),
    ([T, T, T, F], (0, 3 / 4), (1, 1)),  # its last token counts for nothing there
    ([F, T, F, T, T], (2 / 5, 3 / 5), (1 / 4, 2 / 4)),
    ([T, F, T, T], (2 / 4, 3 / 4), (1 / 3, 2 / 3)),
    ([T], (1, 1), (0, np.nan)),
    ([F], (0, 0), (0, np.nan)),
    ([], (np.nan, np.nan), (0, np.nan)),
]


@pytest.mark.parametrize("flags, exact, theirs", HAND)
def test_by_hand(flags, exact, theirs):
    flags = [np.array(flags, bool)]
    for profile, (strength, memorised) in (("exact", exact), ("open_unlearning", theirs)):
        np.testing.assert_allclose(extraction_strength(flags, profile), [strength])
        np.testing.assert_allclose(exact_memorization(flags, profile), [memorised])


def test_a_naive_search_over_suffixes_agrees():
    rng = np.random.default_rng(0)
    texts = [rng.random(rng.integers(1, 12)) < 0.7 for _ in range(200)]

    def naive(flags):
        return next(1 - k / len(flags) for k in range(len(flags) + 1) if flags[k:].all())

    def as_open_unlearning(flags):  # the last k that was tried stands when none fits
        flags, k = flags[:-1], 0
        for k in range(len(flags)):
            if flags[k:].all():
                break
        return 1 - k / len(flags) if len(flags) else 0

    np.testing.assert_allclose(extraction_strength(texts), [naive(t) for t in texts])
    np.testing.assert_allclose(extraction_strength(texts, "open_unlearning"), [as_open_unlearning(t) for t in texts])


def test_the_extractable_suffix_is_what_the_model_writes_after_the_rest(tiny):
    """Teacher-forced flags say what greedy decoding gives: from k on it writes the true text, from k - 1 it doesn't."""
    model = Model(tiny.config, tiny.params)
    prompt = np.array([[1, 7, 9]], np.int32)
    written = generate(tiny.params, tiny.config, prompt, max_new_tokens=6)[0].tolist()
    other = next(t for t in (3, 4) if t != written[0])
    start = [1, 7, 9, other]
    text = start + generate(tiny.params, tiny.config, np.array([start], np.int32), max_new_tokens=5)[0].tolist()
    scores = score_sequences(model, [text, [1, 7, 9, *written]], [3, 3])
    assert extraction_strength([s.greedy for s in scores]) == pytest.approx([5 / 6, 1])
    assert exact_memorization([s.greedy for s in scores]) == pytest.approx([5 / 6, 1])


def test_flags_may_come_from_a_device():
    assert exact_memorization([jnp.array([True, False])]).dtype == np.float64
