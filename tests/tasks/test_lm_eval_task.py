"""WMDP's whole path, model class, task file and harness, on the questions of a little handbook."""

import dataclasses
import functools

import jax
import lm_eval
import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from tests import tiny
from trace_jax.config import ConfigError, as_dict, resolve
from trace_jax.data.corpora import encode_questions
from trace_jax.data.rows import train_tokenizer
from trace_jax.evaluation.likelihood import score_questions
from trace_jax.io.files import read_json, write_json
from trace_jax.main import main
from trace_jax.models.architecture import init_params
from trace_jax.models.model import Model, SpecialTokens, TextCodec
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import save_trained
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.lm_eval import TraceLM, export_tasks
from trace_jax.tasks.text import TextConfig

DATA = HandbookConfig(forget_substances=6, neighbour_substances=9, retain_rows=8, row_length=64, vocab_size=512)
MODEL = dataclasses.replace(tiny.CONFIG, vocab_size=512)


@pytest.fixture(scope="module")
def benchmark():
    return DATA.build()


@pytest.fixture(scope="module")
def model(benchmark):
    """Random, and sharp enough that options differ clearly."""
    tokenizer = train_tokenizer([page.text for page in benchmark.train["forget"]], 512)
    params = jax.tree.map(lambda x: 2 * x, init_params(MODEL, jax.random.key(0)))
    return Model(MODEL, params, tokenizer, SpecialTokens())


@pytest.fixture(scope="module")
def ours(model, benchmark):
    """Log-likelihoods of our own evaluation, right answers, and whether they are the likeliest, by task."""
    sets = {
        subject: encode_questions(TextCodec.of(model), items) for subject, items in benchmark.test.questions.items()
    }
    scores = {f"handbook_{subject}": (score_questions(model, asked), asked.answer) for subject, asked in sets.items()}
    return {task: (ll, answer, ll.argmax(axis=1) == answer) for task, (ll, answer) in scores.items()}


def test_the_harness_scores_the_handbook_as_we_do_question_by_question(model, ours, tmp_path):
    assert all(0 < correct.mean() < 1 for _, _, correct in ours.values())
    manager = TaskManager(include_path=str(export_tasks(DATA, tmp_path)), include_defaults=False)
    found = lm_eval.simple_evaluate(model=TraceLM(model), tasks=["handbook"], task_manager=manager, bootstrap_iters=0)
    assert set(found["samples"]) == set(ours)
    for task, (log_likelihood, answer, correct) in ours.items():
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        given = np.array([[ll for ll, _ in sample["filtered_resps"]] for sample in samples])
        np.testing.assert_allclose(given, log_likelihood, rtol=2e-5, atol=1e-4)
        assert [sample["acc"] for sample in samples] == correct.tolist()
        assert [sample["target"] for sample in samples] == answer.tolist()
        assert found["results"][task]["acc,none"] == pytest.approx(correct.mean())
    with pytest.raises(ConfigError, match="has no questions"):
        export_tasks(TextConfig(forget="a", retain="b"), tmp_path)


def test_the_command_evaluates_the_model_of_a_run(model, ours, tmp_path, capsys, monkeypatch):
    from trace_jax.tasks import lm_eval as module

    monkeypatch.setattr(module, "TaskManager", functools.partial(TaskManager, include_defaults=False))  # quicker
    config = resolve(ExperimentConfig, {"name": "little", "data": as_dict(DATA), "model": as_dict(MODEL)})
    write_json(tmp_path / "config.json", {"identity": config.identity(), "config": as_dict(config)})
    save_trained(tmp_path / "target", model, "a")
    write_json(tmp_path / "target" / "target.stage.json", {"identity": "a"})
    command = ["lm-eval", "--workdir", str(tmp_path), "--method", "target"]
    assert main(command) == 0
    text, stored = capsys.readouterr().out, read_json(tmp_path / "lm_eval" / "target.json")
    expected = {name: correct.mean() for name, (_, _, correct) in ours.items()}
    assert {name: result["acc,none"] for name, result in stored["handbook"]["results"].items()} == pytest.approx(
        expected
    )
    assert all(f"{name} {len(correct)}" in text for name, (_, _, correct) in ours.items())
    monkeypatch.setattr(module, "TraceLM", None)  # what is stored needs no model
    assert main(command) == 0 and capsys.readouterr().out == text
    assert main([*command[:-1], "uniform"]) == 2
    assert "uniform is given; name one that is finished" in capsys.readouterr().err
