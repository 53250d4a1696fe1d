"""TOFU: its formulas by hand and as both programs have them; four local sets, and numbers made again from logits."""

import dataclasses
import json
import math

import numpy as np
import pytest
from rouge_score import rouge_scorer
from scipy import stats

from tests import tiny
from tests.handmade import log_probabilities
from tests.tiny import write_lines
from trace_jax.config import ConfigError, resolve
from trace_jax.data.sources import DataError
from trace_jax.evaluation.intervals import find
from trace_jax.evaluation.task import EvaluationConfig, TaskScores, TofuConfig, without_texts
from trace_jax.models.model import SpecialTokens
from trace_jax.tasks import tofu
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.tasks.tofu import SETS, tofu_task


def test_probabilities_and_absent_wrong_answers_by_hand():
    correct, wrong = np.log([0.5, 0.2, 0.9]), np.log([[0.25, 0.25], [0.4, 0.1], [0.9, 0.9]])
    assert tofu.probability_among(correct, wrong) == pytest.approx([0.5 / 1.0, 0.2 / 0.7, 1 / 3])
    wrong[0, 1] = np.nan  # an item with fewer wrong answers
    assert tofu.probability_among(correct, wrong)[:2] == pytest.approx([0.5 / 0.75, 0.2 / 0.7])
    for mean in ("geometric", "arithmetic"):
        assert np.exp(tofu.log_truth_ratio(correct, wrong, wrong_mean=mean))[0] == pytest.approx(0.5)


def test_truth_ratios_are_those_of_both_repositories():
    rng = np.random.default_rng(0)
    correct, wrong = -rng.exponential(1.0, 40), -rng.exponential(1.5, (40, 5))
    leaderboard = np.exp((-wrong).mean(1) - (-correct))  # p(correct) / p(wrong), losses averaged
    ours = tofu.log_truth_ratio(correct, wrong)
    np.testing.assert_allclose(np.exp(-ours), leaderboard)
    np.testing.assert_allclose(tofu.aggregated(ours, "true_better"), np.maximum(0, 1 - 1 / leaderboard))
    np.testing.assert_allclose(tofu.aggregated(ours, "closer_to_1_better"), np.minimum(leaderboard, 1 / leaderboard))
    averaged = np.exp(wrong).mean(-1) / np.exp(correct)  # utils.py: probabilities averaged
    np.testing.assert_allclose(np.exp(tofu.log_truth_ratio(correct, wrong, wrong_mean="arithmetic")), averaged)
    wrong_prob, correct_prob = np.exp(wrong.mean(1)), np.exp(correct)  # open-unlearning
    theirs = correct_prob / (correct_prob + wrong_prob + 1e-10)
    np.testing.assert_allclose(tofu.aggregated(ours, "prob_mean"), theirs, rtol=1e-6)


def test_a_model_that_gives_every_answer_nothing_knows_no_truth():
    """With 1e-10 in the denominator its ratio would be near 0, and its truth near 1."""
    ratio = tofu.log_truth_ratio(np.array([-80.0]), np.array([[-80.0, -80.0]]))
    assert (tofu.aggregated(ratio, "true_better"), tofu.aggregated(ratio, "closer_to_1_better")) == (0, 1)
    extreme = tofu.log_truth_ratio(np.array([-2000.0, -0.1]), np.array([[-0.1], [-2000.0]]))
    for aggregator in ("closer_to_1_better", "true_better", "prob_mean"):
        assert np.isfinite(tofu.aggregated(extreme, aggregator)).all()


def test_model_utility_is_the_harmonic_mean_of_nine_means():
    rng = np.random.default_rng(0)
    sets = {name: rng.random((n, 3)) for name, n in (("retain", 30), ("real_authors", 10), ("world_facts", 12))}
    found = tofu.model_utility([*sets.values()], resamples=400)
    nine = [column.mean() for values in sets.values() for column in values.T]
    assert found.value == pytest.approx(stats.hmean(nine))
    assert found.n == 52 and found.low < found.value < found.high
    naive, rng = [], np.random.default_rng(1)
    for _ in range(400):
        drawn = [values[rng.integers(0, len(values), len(values))] for values in sets.values()]
        naive.append(stats.hmean([m for values in drawn for m in values.mean(0)]))
    assert (found.low, found.high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.02)
    ones = np.ones((4, 3))
    zero = tofu.model_utility([ones, ones, ones * [1, 0, 1]], resamples=100)
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)
    lone = tofu.model_utility([np.full((1, 3), 0.5), np.full((5, 3), 0.5)])
    assert lone.value == pytest.approx(0.5) and math.isnan(lone.low)


# --- the task

COUNTS = {"forget": 5, "retain": 4, "real_authors": 3, "world_facts": 3}
RESAMPLING = {"resamples": 100, "seed": 0}


def words(rng, count):
    return " ".join(f"w{i}" for i in rng.integers(3, 37, count))


def write_sets(directory, *, forget="forget10", change=None):
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        rows = []
        for _ in range(count):
            row = {"question": words(rng, 4), "answer": words(rng, 3), "option1": "w3"}
            row["perturbed_answer"] = [words(rng, rng.integers(1, 4)) for _ in range(3)]
            rows.append(row | ({"paraphrased_answer": words(rng, 4)} if name in ("forget", "retain") else {}))
        if name == "forget":
            rows[0]["answer"] = "w7"  # one token
            rows[1]["perturbed_answer"] = rows[1]["perturbed_answer"][:1]
        if change is not None and name == change[0]:
            change[1](rows)
        write_lines(directory / f"{forget if name == 'forget' else name}_perturbed" / "train.jsonl", rows)
    return str(directory)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return TofuConfig(data=write_sets(tmp_path_factory.mktemp("tofu")), max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return tiny.make_model().replace(tokenizer=tiny.make_tokenizer(), special=SpecialTokens(bos=1, eos=(2,)))


@pytest.fixture(scope="module")
def scores(config, model):
    return tofu_task(config).score(model, batch_size=4, mesh=None)


def prompt_ids(model, question):
    return [1, *model.tokenizer.encode(f"Question: {question}\nAnswer:").ids]


def answer_log_probs(model, question, answer):
    prompt = prompt_ids(model, question)
    ids = [*prompt, *model.tokenizer.encode(answer).ids, 2]
    found = log_probabilities(model.params, ids)
    places = np.arange(len(prompt) - 1, len(ids) - 1)
    return found[places, ids[len(prompt) :]], found[places].argmax(-1) == ids[len(prompt) :]


def likeliest(model, ids):
    return int(log_probabilities(model.params, ids)[-1].argmax())


def test_answers_are_scored_after_the_question_with_their_end_token(config, model, scores):
    task = tofu_task(config)
    for name in SETS:
        for i, q in enumerate(task.sets[name]):
            for key, answers in (("answer", [q.answer]), ("correct", [q.correct]), ("wrong", q.wrong)):
                expected = [answer_log_probs(model, q.question, a)[0].mean() for a in answers]
                found = np.ravel(scores.arrays[f"{name}/{key}"][i])
                assert found[: len(expected)] == pytest.approx(expected, abs=1e-4)
                assert np.isnan(found[len(expected) :]).all()
            assert (q.correct == q.answer) == (name in ("real_authors", "world_facts"))  # else it is a paraphrase
            if name == "forget":  # how much of the answer is memorised
                greedy = answer_log_probs(model, q.question, q.answer)[1]
                assert scores.arrays["forget/exact_memorization"][i] == pytest.approx(greedy.mean())
                strength = next(1 - k / len(greedy) for k in range(len(greedy) + 1) if greedy[k:].all())
                assert scores.arrays["forget/extraction_strength"][i] == pytest.approx(strength)
    assert scores.arrays["forget/wrong"].shape == (5, 3)
    assert np.isnan(scores.arrays["forget/wrong"]).sum() == 2


def test_what_is_written_is_greedy_and_ends_at_the_end_token(config, model, scores):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for name in SETS:
        for i, q in enumerate(tofu_task(config).sets[name]):
            ids, written = prompt_ids(model, q.question), []
            while len(written) < 5 and (token := likeliest(model, [*ids, *written])) != 2:
                written.append(token)
            text = model.tokenizer.decode(written)
            assert scores.items[name][i]["generation"] == text
            expected = scorer.score(q.answer, text)
            recalls = [expected["rouge1"].recall, expected["rougeL"].recall]
            assert scores.arrays[f"{name}/rouge"][i] == pytest.approx(recalls)


def test_measurements_follow_from_the_scores(config, scores):
    changed = {k: v - 0.3 if k == "forget/correct" else v for k, v in scores.arrays.items()}
    retrained = TaskScores(changed)
    found = tofu_task(config).measure(scores, original=None, retrained=retrained, **RESAMPLING)
    assert len({(m.name, m.split) for m in found}) == len(found)
    assert {m.split for m in found if not m.name.endswith("_half")} == {"test"}
    assert {m.name.partition("_")[0] for m in found} == {"tofu"} and len(found) > 20
    assert {m.revision for m in found} == {tofu_task(config).revision}
    a = scores.arrays

    def value(name):
        return find(found, name, "test").value

    wrong = {name: np.exp(np.nanmean(a[f"{name}/wrong"], axis=1)) for name in SETS}
    ratio = {name: wrong[name] / np.exp(a[f"{name}/correct"]) for name in SETS}
    nine = []
    for name in SETS[1:]:
        p = np.exp(a[f"{name}/answer"])
        if name != "retain":
            p = p / (p + np.nansum(np.exp(a[f"{name}/wrong"]), axis=1))
        nine += [p.mean(), a[f"{name}/rouge"][:, 1].mean(), np.maximum(0, 1 - ratio[name]).mean()]
        parts = [f"tofu_{name}_{part}" for part in ("probability", "rougeL_recall", "truth_ratio")]
        assert [value(part) for part in parts] == pytest.approx(nine[-3:])
        assert find(found, parts[0], "test").n == COUNTS[name]
    assert value("tofu_model_utility") == pytest.approx(stats.hmean(nine))
    assert find(found, "tofu_model_utility", "test").n == sum(COUNTS[name] for name in SETS[1:])
    assert value("tofu_forget_truth_ratio") == pytest.approx(np.minimum(ratio["forget"], 1 / ratio["forget"]).mean())
    assert value("tofu_forget_truth_ratio_prob_mean") == pytest.approx((1 / (1 + ratio["forget"])).mean())
    averaged = np.nanmean(np.exp(a["retain/wrong"]), axis=1) / np.exp(a["retain/correct"])
    assert value("tofu_retain_truth_ratio_arithmetic") == pytest.approx(np.maximum(0, 1 - averaged).mean())
    test = stats.ks_2samp(ratio["forget"], ratio["forget"] * np.exp(0.3))
    quality = find(found, "tofu_forget_quality", "test")
    assert (quality.value, value("tofu_forget_ks")) == pytest.approx((test.pvalue, test.statistic))
    (same, *_) = tofu_task(config).measure(scores, original=None, retrained=scores, **RESAMPLING)
    assert (same.name, same.value) == ("tofu_forget_quality", 1)
    assert np.isnan(quality.low) and "no interval" in quality.note and quality.n == 5
    alone = tofu_task(config).measure(scores, original=None, retrained=None, **RESAMPLING)
    assert find(alone, "tofu_forget_quality", "test") is None
    assert "--retrained" in find(alone, "tofu_forget_truth_ratio", "test").note


def test_a_model_without_a_beginning_mark_starts_with_the_end_mark_as_in_training(config, model):
    markless = model.replace(special=SpecialTokens(bos=None, eos=(2,)))
    small = dataclasses.replace(config, max_questions=1)
    line = tofu_task(small).score(markless, batch_size=4, mesh=None).items["forget"][0]
    first = likeliest(model, [2, *prompt_ids(model, line["question"])[1:]])
    assert line["generation"].split()[:1] == ([] if first == 2 else [f"w{first}"])


def test_items_are_json_and_have_no_nan(config, scores):
    (task,) = build_tasks(EvaluationConfig(tofu=config))
    assert (task.name, task.quick) == ("tofu", True)
    assert {name: len(lines) for name, lines in scores.items.items()} == COUNTS
    line = json.loads(json.dumps(scores.items["forget"][1], allow_nan=False))
    assert line["wrong"][1:] == [None, None]
    assert {"question", "generation", "ground_truth", "rouge", "extraction_strength"} <= line.keys()
    lines = [line for part in without_texts(scores).items.values() for line in part]
    assert not any(isinstance(value, str) for line in lines for value in line.values())


def test_what_is_asked_can_be_chosen_and_is_in_the_hash(config, tmp_path):
    def change(rows):
        rows[0]["perturbed_answer"] = "w3 w4"  # one wrong answer may be a plain text

    data = write_sets(tmp_path, forget="forget01", change=("retain", change))
    task = tofu_task(TofuConfig(data=data, forget="forget01", max_questions=2))
    assert [len(task.sets[name]) for name in SETS] == [2] * 4 and task.sets["retain"][0].wrong == ("w3 w4",)
    other = {"data": data, "forget": "forget01"}
    changes = [{}, {"max_new_tokens": 6}, {"prompt": "Q: {question}\nA:"}, {"max_questions": 2}, other]
    assert len({tofu_task(dataclasses.replace(config, **c)).identity for c in changes}) == len(changes)
    with pytest.raises(DataError, match="forget10_perturbed"):
        tofu_task(TofuConfig(data=data))


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("retain", "paraphrased_answer", None, "retain_perturbed.*:2: paraphrased_answer"),
        ("forget", "answer", "  ", "forget10_perturbed.*:2: answer"),
        ("world_facts", "perturbed_answer", [], "world_facts.*:2: perturbed_answer"),
        ("real_authors", "perturbed_answer", [3], "real_authors.*:2: perturbed_answer"),
    ],
)
def test_rows_of_another_form_are_refused_by_their_place(tmp_path, name, key, value, message):
    def spoil(rows):
        rows[1][key] = value

    with pytest.raises(DataError, match=message):
        tofu_task(TofuConfig(data=write_sets(tmp_path, change=(name, spoil))))


def test_corpora_are_of_one_directory_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, full = (tofu.TofuCorpora(data=name).located() for name in ("sets", str(tmp_path / "sets")))
    assert given == full and tofu.TofuCorpora().located() == tofu.TofuCorpora()


def test_a_prompt_without_its_question_is_refused():
    for form in ("Question: ", "{question} {question}", "{0}", "{question", "{answer}"):
        with pytest.raises(ConfigError, match="prompt is"):
            resolve(EvaluationConfig, {"tofu": {"prompt": form}}, path="evaluation")
