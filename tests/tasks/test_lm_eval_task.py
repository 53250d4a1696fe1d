"""WMDP's whole path, model class, task file and harness, on a model that knows something: a little handbook."""

import functools

import jax
import numpy as np
import pytest

from trace_jax.checkpoints.export import save_pretrained
from trace_jax.config import ConfigError, as_dict, resolve
from trace_jax.data.batches import mixture_batches
from trace_jax.data.config import DataConfig
from trace_jax.data.packing import pack_documents
from trace_jax.data.probes import encode_questions
from trace_jax.data.tokenizer import Vocabulary, encode_documents, train_tokenizer
from trace_jax.evaluation.likelihood import score_questions
from trace_jax.io.files import read_json, write_json
from trace_jax.main import main
from trace_jax.models.config import ModelConfig
from trace_jax.models.model import SpecialTokens
from trace_jax.parallel.mesh import make_mesh
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import save_trained
from trace_jax.tasks.handbook import build_handbook
from trace_jax.unlearning.optimizer import TrainingConfig
from trace_jax.unlearning.train import train_model

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from trace_jax.tasks.lm_eval import TraceLM, export_tasks  # noqa: E402

DATA = DataConfig(forget_substances=6, neighbour_substances=9, retain_rows=8, row_length=64, vocab_size=512)
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=24,
    num_experts=4,
    experts_per_token=2,
    expert_hidden_size=48,
)
TRAINING = TrainingConfig(steps=220, batch_size=8, learning_rate=1e-2, checkpoint_every=1000)


@pytest.fixture(scope="module")
def benchmark():
    return build_handbook(DATA)


@pytest.fixture(scope="module")
def vocabulary(benchmark):
    pages = [page.text for topic in ("forget", "neighbour") for page in benchmark.train[topic]]
    return Vocabulary(train_tokenizer(pages, 512), SpecialTokens(), 512)


@pytest.fixture(scope="module")
def model(benchmark, vocabulary, tmp_path_factory):
    """A model that has learnt the pages of the handbook, and nothing else."""
    pages = encode_documents(vocabulary, [*benchmark.train["forget"], *benchmark.train["neighbour"]])
    rows = {"pages": pack_documents(pages, DATA.row_length, special=vocabulary.special)}
    batches = mixture_batches(rows, {"pages": 1.0}, TRAINING.batch_size, seed=0)
    trained, _ = train_model(
        MODEL,
        TRAINING,
        batches.__getitem__,
        seed=0,
        mesh=make_mesh(jax.devices()[:1], data=1, expert=1, tensor=1),
        directory=tmp_path_factory.mktemp("training"),
        identity="a",
        title="training",
        tokenizer=vocabulary.tokenizer,
    )
    return trained


@pytest.fixture(autouse=True)
def _data_cache(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def ours(model, benchmark, vocabulary):
    """Scores of our own evaluation, by task."""
    return {
        f"handbook_{subject}": score_questions(model.params, MODEL, encode_questions(vocabulary, items))
        for subject, items in benchmark.test.questions.items()
    }


def through_the_harness(model, folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=["handbook"], task_manager=manager, bootstrap_iters=0)


def check(found, ours):
    assert set(found["samples"]) == set(ours)
    for task, scores in ours.items():
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        given = np.array([[ll for ll, _ in sample["filtered_resps"]] for sample in samples])
        np.testing.assert_allclose(given, scores.log_likelihood, atol=1e-4)
        assert [sample["acc"] for sample in samples] == scores.correct.tolist()
        assert [sample["target"] for sample in samples] == scores.answer.tolist()
        assert found["results"][task]["acc,none"] == pytest.approx(scores.correct.mean())


def test_the_harness_scores_the_handbook_as_we_do_question_by_question(model, ours, tmp_path):
    assert all(scores.correct.mean() > 0.6 for scores in ours.values()), "far above chance, which is .25"
    check(through_the_harness(TraceLM(model), export_tasks(DATA, tmp_path)), ours)


def test_so_does_the_class_for_transformers_on_the_exported_model(model, ours, tmp_path):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    save_pretrained(model, tmp_path / "exported")
    theirs = HFLM(pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=16)
    check(through_the_harness(theirs, export_tasks(DATA, tmp_path / "tasks")), ours)


def test_the_command_evaluates_the_model_of_a_run(model, ours, tmp_path, capsys, monkeypatch):
    from trace_jax.tasks import lm_eval as module

    monkeypatch.setattr(module, "TaskManager", functools.partial(TaskManager, include_defaults=False))  # quicker
    config = resolve(ExperimentConfig, {"name": "little", "data": as_dict(DATA), "model": as_dict(MODEL)})
    write_json(tmp_path / "config.json", {"identity": config.identity(), "config": as_dict(config)})
    save_trained(tmp_path / "target", model, "a")
    write_json(tmp_path / "target" / "target.stage.json", {"identity": "a"})
    assert main(["lm-eval", "--workdir", str(tmp_path), "--method", "target"]) == 0
    text, kept = capsys.readouterr().out, read_json(tmp_path / "lm_eval" / "target.json")
    expected = {name: scores.correct.mean() for name, scores in ours.items()}
    assert {name: result["acc,none"] for name, result in kept["handbook"]["results"].items()} == pytest.approx(expected)
    assert all(f"{name} {len(scores)}" in text for name, scores in ours.items())
    monkeypatch.setattr(module, "TraceLM", None)  # what is kept needs no model
    assert main(["lm-eval", "--workdir", str(tmp_path), "--method", "target"]) == 0
    assert capsys.readouterr().out == text
    assert main(["lm-eval", "--workdir", str(tmp_path), "--method", "uniform"]) == 2
    assert "uniform is given; name one that is finished" in capsys.readouterr().err


def test_own_text_has_no_questions(tmp_path):
    data = DataConfig(benchmark="text", forget="a", retain="b")
    with pytest.raises(ConfigError, match="has no questions; handbook and presidents have"):
        export_tasks(data, tmp_path)
