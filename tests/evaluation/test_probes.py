"""The built-in tasks name what they measure, measure relative to references, and leave out what they can't measure."""

import dataclasses
import math

import numpy as np
import pytest

from tests import handmade, tiny
from trace_jax.data.corpora import Probes, Prompts, prompts_of
from trace_jax.evaluation import probes
from trace_jax.evaluation.intervals import find
from trace_jax.evaluation.likelihood import score_questions, score_sequences
from trace_jax.evaluation.probes import QuestionAccuracy, TextLikelihood, Verbatim, rouge_l
from trace_jax.evaluation.task import Evaluator, TaskScores
from trace_jax.models.generate import generate


def names(measurements, split):
    return [m.name for m in measurements if m.split == split]


def test_quick_measurements_of_the_handbook():
    """`test_task.py` has their values."""
    evaluator = handmade.make_evaluator(benchmark="handbook")
    own, later = ({name: handmade.scores(seed)[name] for name in ("questions", "text")} for seed in (0, 1))
    quick = ["forget_accuracy", "neighbour_accuracy", "forget_nll", "neighbour_nll", "general_nll"]
    assert names(evaluator.measure(own), "test") == quick
    evaluator = dataclasses.replace(evaluator, original=own)
    result = evaluator.measure(later)
    quick[3:] = [
        "forget_probability_ratio",
        *(f"{s}_{n}" for s in ("neighbour", "general") for n in ("nll", "utility")),
    ]
    assert names(result, "validation") == names(result, "test") == quick
    assert [m.split for m in result] == ["validation"] * 8 + ["test"] * 8
    assert all(m.low < m.value < m.high for m in result if m.name.endswith("nll"))
    one = find(evaluator.measure(own), "general_utility", "test")
    assert (one.value, one.low, one.high) == (1, 1, 1)


def test_full_measurements_of_a_text_benchmark():
    evaluator = handmade.make_evaluator(benchmark="presidents")
    original, unlearned, retrained = map(handmade.scores, range(3))
    alone = evaluator.measure(unlearned)
    assert "no retrained model to compare with, so no PrivLeak" in find(alone, "privleak_auc", "test").note
    assert "no reference attack" in find(alone, "membership_loss_auc", "test").note
    result = dataclasses.replace(evaluator, original=original, retrained=retrained).measure(unlearned)
    attacks = ("loss", "min_k", "min_k_plus_plus", "zlib", "gradient_norm", "routing", "reference")
    scores = [f"membership_{attack}_{score}" for attack in attacks for score in ("auc", "tpr_at_fpr_1")]
    likelihoods = ["forget_nll", "forget_probability_ratio"]
    likelihoods += [f"{subject}_{score}" for subject in ("neighbour", "general") for score in ("nll", "utility")]
    memorised = ["verbatim", "extraction_strength", "exact_memorization"]
    expected = ["cloze_accuracy", "neighbour_accuracy", *likelihoods, *memorised, *scores, "privleak_auc", "privleak"]
    assert names(result, "test") == expected
    ratio, nll = (find(result, name, "test").value for name in ("forget_probability_ratio", "forget_nll"))
    assert ratio == pytest.approx(math.exp(find(evaluator.measure(original), "forget_nll", "test").value - nll))
    counts = {"verbatim": 3, "extraction_strength": 6, "membership_loss_auc": 14, "membership_gradient_norm_auc": 4}
    assert {name: find(result, name, "test").n for name in counts} == counts
    assert all(m.low <= m.value + 1e-9 and m.value <= m.high + 1e-9 for m in result)


def test_probes_with_nothing_to_score_give_no_measurement():
    rows = tiny.make_rows(3)
    nothing = rows.take(np.arange(0))
    silent = dataclasses.replace(rows, valid=np.zeros_like(rows.valid))  # rows, but nothing scored
    questions, prompts = {"forget": handmade.make_questions(0)}, {"forget": handmade.make_prompts(0)}
    for holdout in (nothing, silent):
        members = {"forget": rows, "holdout": holdout}
        test = Probes(questions, {"general": silent, "forget": nothing}, prompts, members)
        evaluator = handmade.make_evaluator({"validation": Probes({}, {}, {}, {}), "test": test})
        assert evaluator.measure(evaluator.score(handmade.make_model(), full=True)) == []
    evaluator = handmade.make_evaluator({})
    assert evaluator == Evaluator(handmade.SETTINGS, ()) and evaluator.measure({}) == []


def test_sets_that_share_batches_keep_their_own_scores():
    """Questions of different lengths too."""
    sets = {("validation", "forget"): handmade.make_questions(4, length=12)}
    sets |= {("test", subject): handmade.make_questions(5, seed=3 + i) for i, subject in enumerate("ab")}
    scores = QuestionAccuracy(sets, "", {}).score(handmade.make_model(), batch_size=4, mesh=None)
    sets["validation", "forget"] = handmade.make_questions(4)
    for key, questions in sets.items():
        alone = score_questions(handmade.make_model(), questions, batch_size=4)
        np.testing.assert_allclose(scores.arrays["/".join((*key, "log_likelihood"))], alone, rtol=1e-4)


def test_accuracy_has_its_interval_over_groups():
    correct, group = np.repeat([True, False, True, True], 5), (np.arange(20) // 5).astype(np.int32)
    questions = dataclasses.replace(handmade.make_questions(20), answer=np.zeros(20, int), group=group)
    scores = TaskScores({"test/forget/log_likelihood": np.where(correct, 1.0, -1.0)[:, None] * [1.0, 0.0]})
    task = QuestionAccuracy({("test", "forget"): questions}, "", {})
    (result,) = task.measure(scores, original=None, retrained=None, resamples=2000, seed=0)
    assert (result.name, result.value, result.n) == ("forget_accuracy", 0.75, 20)
    assert result.low == pytest.approx(0.25)  # four groups: a resample with one right group is still common


def test_utility_is_capped_at_one_where_the_text_is_not_to_be_forgotten():
    task = TextLikelihood({("test", subject): tiny.make_rows(2) for subject in ("forget", "general")}, "")

    def scores(nll):
        arrays = {"nll": np.full(2, 4 * nll), "tokens": np.full(2, 4.0)}
        return TaskScores({f"test/{s}/{name}": x for s in ("forget", "general") for name, x in arrays.items()})

    for nll, forget, general in ((1.5, math.exp(0.5), 1.0), (2.5, math.exp(-0.5), math.exp(-0.5))):
        result = task.measure(scores(nll), original=scores(2.0), retrained=None, resamples=100, seed=0)
        assert find(result, "forget_probability_ratio", "test").value == pytest.approx(forget)
        assert find(result, "general_utility", "test").value == pytest.approx(general)
        assert find(result, "general_nll", "test").value == pytest.approx(nll)


# --- verbatim


def verbatim(model, prompts, batch_size=2):
    arrays = Verbatim({"test": prompts}, "").score(model, batch_size=batch_size, mesh=None).arrays
    return arrays["test/score"], arrays["test/generated"]


def test_a_continuation_that_the_model_would_write_scores_one():
    """Also of prompts of any length, of which as much is compared as there is to come."""
    model, prompts = handmade.make_model(), handmade.make_prompts(3)
    greedy = np.asarray(generate(model.params, model.config, prompts.prompt, max_new_tokens=4))
    truth = greedy.copy()
    truth[1:] = (greedy[1:] + 1) % handmade.V
    score, generated = verbatim(model, Prompts(prompts.prompt, truth))
    words = [[" ".join(f"w{i}" for i in row) for row in rows] for rows in (greedy, truth)]
    assert score[0] == 1.0 and (score[1:] < 1).all()
    assert score == pytest.approx(rouge_l(*words))
    np.testing.assert_array_equal(generated, greedy)

    rng, lengths = np.random.default_rng(0), ((5, 4), (3, 2), (5, 1))
    ragged = prompts_of([tuple(rng.integers(3, handmade.V, n).tolist() for n in pair) for pair in lengths])
    options = {"lengths": ragged.lengths[:, 0], "max_new_tokens": 4}
    greedy = np.asarray(generate(model.params, model.config, ragged.prompt, **options))
    ragged.continuation[:, 0] = greedy[:, 0]  # one token right, whatever follows
    score, generated = verbatim(model, ragged)
    np.testing.assert_array_equal(generated, greedy)
    words = [[" ".join(f"w{i}" for i in row) for row in ragged.unpadded(x)] for x in (greedy, ragged.continuation)]
    assert [len(text.split()) for text in words[0]] == [4, 2, 1]
    assert score == pytest.approx(rouge_l(*words)) and (score > 0).all() and score[2] == 1.0
    part = ragged.take(np.array([2, 0]))
    assert part.unpadded(part.continuation) == [ragged.continuation[2, :1].tolist(), ragged.continuation[0].tolist()]


# --- extraction strength and exact memorisation


def test_by_hand():
    texts = [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1, 1], [0], []
    flags = [np.array(text, bool) for text in texts]
    np.testing.assert_array_equal(probes.extraction_strength(flags), [1, 0, 0, 2 / 5, 0, np.nan])
    np.testing.assert_array_equal(probes.exact_memorization(flags), [1, 0, 3 / 4, 3 / 5, 0, np.nan])


def test_the_extractable_suffix_is_what_the_model_writes_after_the_rest():
    """Teacher-forced flags say what greedy decoding gives: from k on it writes the true text, from k - 1 it doesn't."""
    model = handmade.make_model()

    def written(start):
        while len(start) < 9:
            start = [*start, int(handmade.log_probabilities(model.params, start)[-1].argmax())]
        return start

    greedy = written([1, 7, 9])
    other = written([1, 7, 9, next(t for t in (3, 4) if t != greedy[3])])
    flags = [s.greedy for s in score_sequences(model, [other, greedy, greedy, greedy], [3] * 4, batch_size=4)][:2]
    assert probes.extraction_strength(flags) == pytest.approx([5 / 6, 1])
    assert probes.exact_memorization(flags) == pytest.approx([5 / 6, 1])
