"""lm-eval on our models: the same numbers and texts as lm-eval's own class for transformers gives, item by item."""

import dataclasses
import functools
import json
import shutil
import types
from unittest import mock

import lm_eval
import numpy as np
import pytest
import tiny_checkpoints
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

from tests import tiny
from tests.tiny import write_lines
from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError, as_dict, resolve
from trace_jax.data.corpora import encode_questions
from trace_jax.data.rows import train_tokenizer
from trace_jax.evaluation import likelihood
from trace_jax.io.files import read_json, write_json
from trace_jax.main import main
from trace_jax.models.model import TextCodec
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import save_trained
from trace_jax.tasks import lm_eval as module
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.lm_eval import TraceLM, evaluate_tasks, export_tasks, read_decoding, table
from trace_jax.tasks.text import TextConfig

VOCABULARY = 320
WORDS = ["river", "stone", "apple", "cloud", "lamp", "tiger", "violin", "harbour", "window", "garden", "candle"]
LOCAL = functools.partial(TaskManager, include_defaults=False)  # quicker: lm-eval's own thousands are not looked at
WITH_BOS = pytest.mark.parametrize("checkpoint", ["with_bos"], indirect=True)
# By name: family, marks of config.json, marks of the tokenizer, whether it puts BOS before a text.
TWO_ENDS = {"eos_token_id": [2, 1], "pad_token_id": 0}
KINDS = {
    "with_bos": ("mixtral", {}, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, True),
    "without_bos": ("olmoe", TWO_ENDS, {"bos_token": None, "eos_token": "<eos>"}, False),
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint as published ones are: with a tokenizer, and 64 tokens as the most that it reads."""
    family, marks, tokens, bos = KINDS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    tiny_checkpoints.save(tiny_checkpoints.build(family, vocab_size=VOCABULARY, **marks), family, directory)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, VOCABULARY)
    if not bos:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    return directory


@pytest.fixture(scope="module")
def ours(checkpoint):
    return TraceLM(load_pretrained(checkpoint), batch_size=5)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=3)


def requests(*arguments):
    return [types.SimpleNamespace(args=a, task_name="t") for a in arguments]


def text(rng, count):
    return " ".join(rng.choice(WORDS, count))


CONTEXTS = ["river stone", "river stone ", "apple\n\n", "", "Answer:", "x" * 90, "<bos>river", "<eos>river"]
CONTINUATIONS = [" A", " B", " C", " D", "A", " cloud lamp", " cloud tiger", "\n", " <eos>"]


def test_log_likelihoods_and_greediness_are_those_of_hf(ours, theirs):
    pairs = [(a, b) for a in CONTEXTS for b in CONTINUATIONS]
    rng = np.random.default_rng(0)
    pairs += [(text(rng, int(n)), " " + text(rng, int(m))) for n, m in ((2, 9), (30, 3), (14, 20))]
    ll, greedy = zip(*ours.loglikelihood(requests(*pairs)), strict=True)
    expected_ll, expected_greedy = zip(*theirs.loglikelihood(requests(*pairs), disable_tqdm=True), strict=True)
    np.testing.assert_allclose(ll, expected_ll, atol=1e-4)
    assert greedy == expected_greedy


def test_letters_of_one_question_take_one_pass(ours, monkeypatch):
    counted = mock.Mock(wraps=likelihood.score_sequences)
    monkeypatch.setattr(likelihood, "score_sequences", counted)
    four = ours.loglikelihood(requests(*(("river stone", f" {letter}") for letter in "ABCD")))
    assert len(counted.call_args.args[1]) == counted.call_count == 1
    one_by_one = [ours.loglikelihood(requests(("river stone", f" {letter}")))[0] for letter in "ABCD"]
    np.testing.assert_allclose([ll for ll, _ in four], [ll for ll, _ in one_by_one], atol=1e-5)
    assert len({ll for ll, _ in four}) == 4


def test_rolling_log_likelihoods_are_those_of_hf(ours, theirs):
    rng = np.random.default_rng(1)
    texts = [(text(rng, n),) for n in (1, 40, 120)] + [("",), ("<bos>river",)]
    expected = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests(*texts)), expected, rtol=1e-5, atol=1e-4)


GENERATION = [
    {"until": ["\n"], "max_gen_toks": 20},
    {"until": " stone", "max_gen_toks": 14, "do_sample": False, "temperature": 0.0},
    {"until": ["e", "<pad>"], "max_new_tokens": 12},
    {"until": [], "max_gen_toks": 1},
]


def test_written_texts_are_those_of_hf(checkpoint, ours, theirs):
    """One text at a time on their side: in a batch, they write on after a special token until all texts are done."""
    rng = np.random.default_rng(2)
    contexts = [text(rng, n) for n in (1, 70)] + ["<bos>river"]
    asked = [(context, dict(kind)) for context in contexts for kind in GENERATION]
    lone = HFLM(pretrained=theirs.model, tokenizer=theirs.tokenizer, batch_size=1)
    assert ours.generate_until(requests(*asked)) == lone.generate_until(requests(*asked), disable_tqdm=True)


def test_what_no_task_may_ask_for_is_said():
    greedy = read_decoding({"do_sample": False, "temperature": 1}, max_new_tokens=256)
    assert read_decoding({}, max_new_tokens=256) == greedy
    assert read_decoding({"temperature": 0.5, "top_p": 0.9}, max_new_tokens=7).temperature == 0.5
    for setting, value in (("num_beams", 4), ("repetition_penalty", 1.1)):
        with pytest.raises(ValueError, match=setting):
            read_decoding({setting: value}, max_new_tokens=1)


def test_more_than_the_model_can_read_is_said(ours, folder):
    with pytest.raises(ConfigError, match=r"writes 256 tokens, and the model reads 64 at once"):
        ours.generate_until(requests(("river", {})))
    with pytest.raises(ValueError, match="at most max_length = 64 after"):
        ours.loglikelihood(requests(("river", " x" * 100)))
    with pytest.raises(ConfigError, match="chat templates aren't supported"):
        lm_eval.simple_evaluate(
            ours, tasks=["quiz"], task_manager=LOCAL(include_path=str(folder)), apply_chat_template=True
        )
    with pytest.raises(ConfigError, match="no tokenizer"):
        TraceLM(ours._model.replace(tokenizer=None))


QUESTION = "{{question}}"
OPTIONS = "".join(f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate("ABCD"))
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "quiz": {
        "output_type": "multiple_choice", "doc_to_text": f"{QUESTION}\n{OPTIONS}Answer:", "doc_to_choice": [*"ABCD"],
        "doc_to_target": "answer", "num_fewshot": 1, "fewshot_split": "test",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "cloze": {
        "output_type": "multiple_choice", "doc_to_text": QUESTION, "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": QUESTION,
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "story": {
        "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local task files on one data file of 24 questions, and a group of two of them."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(3)
    choices = [[text(rng, int(n)) for n in rng.integers(1, 4, 4)] for _ in range(12)]
    rows = [{"question": text(rng, 3), "choices": four, "answer": i % 4} for i, four in enumerate(choices)]
    write_lines(folder / "questions.jsonl", rows)
    for name, settings in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **settings}))
    weighted = [{"metric": "acc", "weight_by_size": True}]
    write_json(folder / "both.yaml", {"group": "both", "task": ["quiz", "cloze"], "aggregate_metric_list": weighted})
    return folder


@WITH_BOS
def test_every_task_gives_what_it_gives_with_hf(ours, theirs, folder):
    options = {"task_manager": LOCAL(include_path=str(folder)), "bootstrap_iters": 10}
    mine, other = (lm_eval.simple_evaluate(model=model, tasks=list(TASKS), **options) for model in (ours, theirs))
    for name in TASKS:
        for one, two in zip(mine["samples"][name], other["samples"][name], strict=True):
            assert one["arguments"] == two["arguments"]
            if name == "story":
                assert one["resps"] == two["resps"]
            else:
                mine_ll, other_ll = (np.ravel(sample["filtered_resps"]).astype(float) for sample in (one, two))
                np.testing.assert_allclose(mine_ll, other_ll, rtol=1e-5, atol=1e-4)
        for metric, value in other["results"][name].items():
            if isinstance(value, float):
                assert mine["results"][name][metric] == pytest.approx(value, rel=1e-5), metric


@WITH_BOS
def test_finished_tasks_are_kept_until_something_changes(ours, folder, tmp_path, monkeypatch):
    counts, simple_evaluate, interrupt = [], lm_eval.simple_evaluate, []

    def counted(tasks, **options):
        if tasks == interrupt:
            raise KeyboardInterrupt
        counts.append(tasks)
        return simple_evaluate(tasks=tasks, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    monkeypatch.setattr(module, "TaskManager", LOCAL)
    copy, output = shutil.copytree(folder, tmp_path / "tasks"), tmp_path / "results.json"
    options = {"identity": "a", "output": output, "include": [copy], "bootstrap": 10}
    load = functools.partial(getattr, ours, "_model")
    first = evaluate_tasks(load, ["both"], **options)
    assert list(first) == ["both"] and counts == [["both"]]
    assert evaluate_tasks(pytest.fail, ["both"], **options) == first == read_json(output)  # nothing is loaded
    assert evaluate_tasks(load, ["both", "prose"], **options)["both"] == first["both"] == read_json(output)["both"]
    assert counts == [["both"], ["prose"]]
    evaluate_tasks(load, ["both"], limit=4, **{**options, "identity": "b"})
    evaluate_tasks(load, ["both"], limit=4, **options)
    (copy / "quiz.yaml").write_text((copy / "quiz.yaml").read_text() + "\n")
    evaluate_tasks(load, ["prose"], **options)
    assert counts[2:] == [["both"], ["both"], ["prose"]]
    assert read_json(output)["both"]["n-samples"]["quiz"] == {"original": 12, "effective": 4}
    interrupt.append("prose")
    with pytest.raises(KeyboardInterrupt):  # which costs one task
        evaluate_tasks(load, ["quiz", "prose"], **{**options, "output": tmp_path / "interrupted.json"})
    assert list(read_json(tmp_path / "interrupted.json")) == ["quiz"]
    with pytest.raises(ConfigError, match=r"no task 'quizz'\. Did you mean quiz.*include-path"):
        evaluate_tasks(pytest.fail, ["quizz"], identity="a", include=[folder])
    text = table(first)
    assert "|both" in text and "acc_norm" in text and "Stderr" in text and "n: quiz 12, cloze 12" in text
    assert "river" not in output.read_text() + text, "no question is written"


# --- the handbook's questions

DATA = HandbookConfig(forget_substances=6, neighbour_substances=9, retain_rows=8, row_length=64, vocab_size=512)
MODEL = dataclasses.replace(tiny.CONFIG, vocab_size=512)


@pytest.fixture(scope="module")
def benchmark():
    return DATA.build()


@pytest.fixture(scope="module")
def model(benchmark):
    """Random, and sharp enough that options differ clearly."""
    tokenizer = train_tokenizer([page.text for page in benchmark.train["forget"]], 512)
    return tiny.make_model(MODEL).replace(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def own(model, benchmark):
    """Log-likelihoods of our own evaluation, right answers, and whether they are the likeliest, by task."""
    scores = {}
    for subject, items in benchmark.test.questions.items():
        asked = encode_questions(TextCodec.of(model), items)
        ll = likelihood.score_questions(model, asked)
        scores[f"handbook_{subject}"] = ll, asked.answer, ll.argmax(axis=1) == asked.answer
    return scores


def test_the_harness_scores_the_handbook_as_we_do_question_by_question(model, own, tmp_path):
    assert all(0 < correct.mean() < 1 for _, _, correct in own.values())
    manager = LOCAL(include_path=str(export_tasks(DATA, tmp_path)))
    found = lm_eval.simple_evaluate(model=TraceLM(model), tasks=["handbook"], task_manager=manager, bootstrap_iters=0)
    assert set(found["samples"]) == set(own)
    for task, (log_likelihood, answer, correct) in own.items():
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        given = np.array([[ll for ll, _ in sample["filtered_resps"]] for sample in samples])
        np.testing.assert_allclose(given, log_likelihood, rtol=2e-5, atol=1e-4)
        assert [sample["acc"] for sample in samples] == correct.tolist()
        assert [sample["target"] for sample in samples] == answer.tolist()
        assert found["results"][task]["acc,none"] == pytest.approx(correct.mean())
    with pytest.raises(ConfigError, match="has no questions"):
        export_tasks(TextConfig(forget="a", retain="b"), tmp_path)


def test_the_command_evaluates_the_model_of_a_run(model, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "TaskManager", LOCAL)
    config = resolve(ExperimentConfig, {"name": "little", "data": as_dict(DATA), "model": as_dict(MODEL)})
    write_json(tmp_path / "config.json", {"identity": config.identity(), "config": as_dict(config)})
    save_trained(tmp_path / "target", model, "a")
    write_json(tmp_path / "target" / "target.stage.json", {"identity": "a", "files": {}})
    command = ["lm-eval", "--workdir", str(tmp_path), "--method", "target"]
    assert main(command) == 0
    text, stored = capsys.readouterr().out, read_json(tmp_path / "lm_eval" / "target.json")
    accuracies = {name: result["acc,none"] for name, result in stored["handbook"]["results"].items()}
    assert accuracies == pytest.approx({name: correct.mean() for name, (_, _, correct) in own.items()})
    assert all(f"{name} {len(correct)}" in text for name, (_, _, correct) in own.items())
    monkeypatch.setattr(module, "TraceLM", None)  # what is stored needs no model
    assert main(command) == 0 and capsys.readouterr().out == text
    assert main([*command[:-1], "uniform"]) == 2
    assert "uniform is given; name one that is finished" in capsys.readouterr().err
