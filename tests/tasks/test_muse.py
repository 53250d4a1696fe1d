"""MUSE's scores from outputs: golden values, and both evaluators' definitions written out naively."""

import numpy as np
import pytest
from rouge_score import rouge_scorer

from trace_jax.evaluation.membership import privleak, privleak_auc
from trace_jax.tasks.muse import (
    PROFILES,
    STOPS,
    clean_up,
    knowmem_prompt,
    min_k_score,
    prediction,
    rouge_scores,
    truth_after,
)

MUSE, OU = PROFILES["muse"], PROFILES["open_unlearning"]
WORDS = [
    "runs",
    "running",
    "the",
    "Ministers",
    "minister",
    "2,000",
    "do",
    "n't",
    "Harry's",
    ".",
    "\n\n",
    "\nQuestion: x",
]


def random_texts(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 12))) for _ in range(count)]


def random_log_probs(count, seed, *, shift=0.0, shortest=3):
    rng = np.random.default_rng(seed)
    return [-rng.gamma(1.0, 2.0 + shift, rng.integers(shortest, 40)).astype(np.float32) for _ in range(count)]


# --- the two evaluators, written out


def naive_cut(text, words):
    for word in words:
        text = text.split(word)[0]
    return text


def naive_muse_rouge(decoded, truths, stops=()):
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    cut = [naive_cut(clean_up(text), stops) for text in decoded]
    scores = [scorer.score(truth, text)["rougeL"].fmeasure for truth, text in zip(truths, cut, strict=True)]
    return sum(scores) / len(scores) * 100


def naive_open_unlearning_rouge(decoded, truths, stops=()):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    cut = [naive_cut(clean_up(text), ["</s>", *stops]).strip() for text in decoded]
    return np.mean([scorer.score(truth, text)["rougeL"].fmeasure for truth, text in zip(truths, cut, strict=True)])


def naive_muse_auc(forget, holdout):
    from sklearn.metrics import auc, roc_curve

    def score(log_prob):
        values = [float(x) for x in log_prob]
        return float(-np.mean(np.sort(values)[: int(len(values) * 0.4)]))

    scores = np.array([score(x) for x in forget] + [score(x) for x in holdout])
    false, true, _ = roc_curve(np.array([0] * len(forget) + [1] * len(holdout)), -scores)
    return auc(false, true)


def naive_open_unlearning_auc(forget, holdout):
    from sklearn.metrics import roc_auc_score

    def score(log_prob):
        values = log_prob[:-1]
        return -np.mean(np.sort(values)[: max(1, int(len(values) * 0.4))]) if values.size else 0

    scores = np.array([score(x) for x in forget] + [score(x) for x in holdout])
    return roc_auc_score(np.array([0] * len(forget) + [1] * len(holdout)), scores)


def scored(sides, profile):
    return tuple(np.array([min_k_score(x, profile) for x in side]) for side in sides)


@pytest.mark.parametrize("stops", [(), STOPS])
def test_rouge_is_that_of_both_evaluators_on_random_texts(stops):
    decoded, truths = random_texts(60, 1), random_texts(60, 2)
    ours = rouge_scores([prediction(t, MUSE, stops=stops) for t in decoded], truths, MUSE).mean()
    assert ours == pytest.approx(naive_muse_rouge(decoded, truths, stops), abs=1e-9)
    theirs = rouge_scores([prediction(t, OU, stops=stops, end="</s>") for t in decoded], truths, OU).mean()
    assert theirs == pytest.approx(naive_open_unlearning_rouge(decoded, truths, stops), abs=1e-9)
    assert abs(ours - 100 * theirs) > 0.1, "the profiles must not agree by chance here"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_privleak_is_that_of_both_evaluators_on_random_log_probabilities(seed, ties):
    forget, holdout = random_log_probs(30, seed), random_log_probs(25, seed + 10, shift=0.5)
    before, after = random_log_probs(30, seed + 20), random_log_probs(25, seed + 30)
    if ties:  # values out of few, and texts that stand on both sides
        forget, holdout, before, after = (
            [np.round(x).clip(-4) for x in side] for side in (forget, holdout, before, after)
        )
        holdout[:5] = forget[:5]
    auc, reference = naive_muse_auc(forget, holdout), naive_muse_auc(before, after)
    sides, retrained = scored((forget, holdout), MUSE), scored((before, after), MUSE)
    assert privleak_auc(sides, MUSE.name, resamples=100).value == pytest.approx(auc, abs=1e-9)
    found = privleak(sides, retrained, MUSE.name, resamples=100)
    assert found.value == pytest.approx((auc - reference) / reference * 100, abs=1e-7)
    assert found.low < found.value < found.high and found.n == 55

    auc, reference = naive_open_unlearning_auc(forget, holdout), naive_open_unlearning_auc(before, after)
    sides, retrained = scored((forget, holdout), OU), scored((before, after), OU)
    assert privleak_auc(sides, OU.name, resamples=100).value == pytest.approx(auc, abs=1e-9)
    for other, ref in ((retrained, reference), (None, 0.5)):
        expected = ((1 - auc) - (1 - ref)) / (1 - ref + 1e-10) * 100
        assert privleak(sides, other, OU.name, resamples=100).value == pytest.approx(expected, abs=1e-7)


# --- golden values


def test_the_prompt_ends_in_a_space():
    prompt = knowmem_prompt("Who?", [("What?", "That"), ("Where?", "Here")])
    assert prompt == ("Question: What?\nAnswer: That\n\nQuestion: Where?\nAnswer: Here\n\nQuestion: Who?\nAnswer: ")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a b\n\nc", "a b"),
        ("a\nb\nQuestion x", "a\nb"),
        ("aQuestion: x\n\ny", "a"),
        ("Question: x", ""),
        ("\n\nx", ""),
        ("Question", "Question"),
        ("", ""),
    ],
)
def test_answers_end_at_the_first_stop(text, cut):
    assert prediction(text, MUSE, stops=STOPS) == cut
    assert prediction(text, OU, stops=STOPS) == cut.strip()
    assert prediction(text, MUSE) == text


def test_only_open_unlearning_strips_and_cuts_at_a_written_end_token():
    assert prediction(" a</s>b", MUSE, end="</s>") == " a</s>b"
    assert prediction(" a</s>b", OU, end="</s>") == "a"


def test_spaces_are_cleaned_up_as_transformers_does():
    from transformers import PreTrainedTokenizerFast

    text = "He does n't , he 'd . I 'm , we 've , they 're ! Is it Tom 's ? A ' b"
    assert clean_up(text) == PreTrainedTokenizerFast.clean_up_tokenization(None, text)
    # "do n't" is the words do, n, t; "don't" is don, t: two of two, F = 2 * 1 * 2/3 / (1 + 2/3) if it were left alone.
    assert rouge_scores([prediction("do n't", MUSE)], ["don't"], MUSE).tolist() == [100.0]


def test_the_profiles_print_other_numbers_for_one_answer():
    # Without stemmer "people" alone is common: precision 1/2, recall 1/2. With it both words are.
    assert rouge_scores(["people nations"], ["people nation"], MUSE) == pytest.approx([50.0])
    assert rouge_scores(["people nations"], ["people nation"], OU) == pytest.approx([1.0])
    assert rouge_scores(["", "a"], ["a", ""], OU).tolist() == [0.0, 0.0]


def test_the_truth_of_open_unlearning_is_the_whole_without_the_prompt():
    assert truth_after("Answer: ", "Answer: Harry ") == "Harry"
    assert truth_after("Answer: ", "Answer: ") == ""  # where the prompt alone fills the row
    assert truth_after("", "Harry") == "Harry"
    # The full stop takes the prompt's space away, so that the prompt isn't found and all of it is the truth.
    assert truth_after("Answer: ", "Answer: .5 kg") == "Answer:.5 kg"


def test_min_k_by_hand():
    log_prob = -np.arange(1.0, 6.0)  # 1 to 5
    assert min_k_score(log_prob, MUSE) == pytest.approx(4.5)  # of 5 the lowest 2: 5 and 4
    assert min_k_score(log_prob, OU) == pytest.approx(4.0)  # of 4 (without the last) the lowest one


@pytest.mark.parametrize(
    ("count", "muse", "open_unlearning"), [(0, 0.0, 0.0), (1, 3.0, 0.0), (2, 3.0, 2.0), (3, 4.0, 3.0)]
)
def test_short_texts(count, muse, open_unlearning):
    """int(0.4 n) is 0 for one and two tokens, where MUSE's code has no value; the lowest one counts."""
    log_prob = np.array({0: [], 1: [-3.0], 2: [-2.0, -3.0], 3: [-2.0, -3.0, -4.0]}[count])
    assert (min_k_score(log_prob, MUSE), min_k_score(log_prob, OU)) == (muse, open_unlearning)


def test_a_model_that_remembers_is_near_0_in_muse_and_near_1_in_open_unlearning():
    remembered, unseen = np.array([0.1, 0.2]), np.array([3.0, 2.0])
    aucs = [privleak_auc((remembered, unseen), profile.name).value for profile in (MUSE, OU)]
    assert aucs == [0.0, 1.0]
    # AUC 0 against 1/2: minus 100 percent in both.
    alike = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    assert privleak((remembered, unseen), alike, MUSE.name).value == -100.0
    assert privleak((remembered, unseen), None, OU.name).value == pytest.approx(-100.0)


def test_privleak_without_a_reference():
    sides = np.array([1.0, 2.0]), np.array([1.5, 3.0])
    assert privleak(sides, None, MUSE.name) is None, "MUSE's constants are for MUSE's models"
    remembered = np.array([0.1, 0.2]), np.array([3.0, 2.0])  # AUC 0 of the retrained model
    assert privleak(sides, remembered, MUSE.name) is None
    assert privleak(sides, sides, MUSE.name).value == privleak(sides, sides, OU.name).value == 0.0
    with pytest.raises(ValueError, match="same texts"):
        privleak(sides, (sides[0][:1], sides[1]), MUSE.name)


def test_one_text_on_a_side_has_no_interval():
    found = privleak((np.array([1.0]), np.array([2.0, 0.5])), None, OU.name)
    assert found.value == pytest.approx(0.0) and np.isnan(found.low)
