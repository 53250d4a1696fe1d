"""A dry run says what is missing, refuses what is there and wrong, and needs no workdir."""

import re
from types import SimpleNamespace

import pytest

from tests.run.toy import write_lines
from trace_jax.config import ConfigError, resolve
from trace_jax.io.files import write_json
from trace_jax.main import main
from trace_jax.models.families import PUBLISHED
from trace_jax.run.check import FIRST, dry_run
from trace_jax.run.experiment import ExperimentConfig


@pytest.fixture
def checked_of(tmp_path):
    """Makes a dry run of a published model, of a few retain texts and of a forget set that is missing, with changes."""

    def checked(data=(), **sections):
        retain = write_lines(tmp_path / "retain.jsonl", [{"text": f"public {i}"} for i in range(3)])
        data = {"benchmark": "text", "retain": retain, "forget": str(tmp_path / "forget.jsonl"), **dict(data)}
        usual = {"model": {"path": "", "published": "olmoe-1b-7b"}, "unlearning": {"trainable": "down_projections"}}
        config = resolve(ExperimentConfig, {"name": "x", "methods": ["uniform"], "data": data, **usual, **sections})
        return SimpleNamespace(**dict(zip(("text", "missing", "wrong"), dry_run(config), strict=True)))

    return checked


def test_what_is_missing_is_reported_with_what_it_must_be(checked_of):
    checked = checked_of()
    weights, forget = checked.missing
    assert "hf download allenai/OLMoE-1B-7B-0924" in weights and forget.endswith("forget.jsonl is not there")
    assert checked.wrong == []
    trained = "trainable parameters: 2,147,483,648 numbers; the model has 6,919,161,856 (31.04%)"
    for words in ("6,919,161,856 parameters", "1,282,017,280 active", trained):
        assert words in checked.text
    assert "8 forget rows and 16 retain rows of 128 tokens: 3,072 tokens" in checked.text
    assert "must have the columns text, or question and answer" in checked.text
    assert "the first 3 documents are 3 texts" in checked.text


def test_a_length_in_epochs_waits_for_the_data(checked_of):
    settings = {"trainable": "down_projections", "epochs": 2, "schedule": "cosine"}
    assert "2 epochs of the forget rows of uniform" in checked_of(unlearning=settings).text


def test_everything_that_is_wrong_is_found_at_once(tmp_path, checked_of):
    forget = write_lines(tmp_path / "forget.jsonl", [{"txt": "x"}])
    holdout = write_lines(tmp_path / "holdout.jsonl", [{"question": "x"}])
    checked = checked_of({"forget": forget, "holdout": holdout})
    assert [line.partition(":")[0] for line in checked.wrong] == ["forget data", "holdout data"]
    assert "forget.jsonl:1: the keys are txt" in checked.wrong[0] and "the keys are question" in checked.text


def test_the_first_documents_are_looked_at_and_no_more(tmp_path, checked_of):
    texts = [{"text": f"secret {i}"} for i in range(FIRST)]
    forget = write_lines(tmp_path / "forget.jsonl", [*texts, {"wrong": "key"}])
    text = checked_of({"forget": [forget, forget]}).text
    assert f"forget, topic 1: {forget}: the first {FIRST} documents are {FIRST} texts" in text


def test_text_that_attacks_read_is_looked_at(tmp_path, checked_of):
    benign = write_lines(tmp_path / "benign.jsonl", [{"text": "harmless"}])
    asked = write_lines(tmp_path / "asked.jsonl", [{"prompt": "What is it?"}])
    here = checked_of(attacks={"benign_relearning": {"source": benign}, "prompting": {}})
    assert f"attack, benign relearning: {benign}: can be used" in here.text and here.wrong == []
    checked = checked_of(attacks={"benign_relearning": {"source": "none"}, "prompting": {"paraphrases": asked}})
    assert "attack data: none is not there" in checked.missing
    assert re.match("attack data: .*asked.jsonl: row 1 has prompt; expected", checked.wrong[0])


def test_benchmarks_that_are_not_there_or_no_questions_are_found(tmp_path, checked_of):
    asked = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 4, "subject": "virology"}
    sources = {"wmdp_bio": "nowhere", "mmlu": write_lines(tmp_path / "mmlu.jsonl", [asked])}
    tasks = {"muse": {"data": "muse"}, "tofu": {"data": "tofu", "forget": "forget05"}}
    checked = checked_of(evaluation={**tasks, "multiple_choice": {"sources": sources}})
    assert checked.missing[2:] == [
        "evaluation data: muse/verbmem/forget.jsonl is not there",
        "evaluation data: tofu/forget05_perturbed/train.jsonl is not there",
        "evaluation data: nowhere is not there",
    ]
    (wrong,) = checked.wrong
    assert "mmlu.jsonl:1: expected question, choices, answer" in wrong and "evaluation, mmlu" in checked.text


def test_a_checkpoint_that_is_here_is_looked_at(tmp_path, checked_of):
    folder = tmp_path / "model"
    write_json(folder / "config.json", PUBLISHED["olmoe-1b-7b"])
    checked = checked_of(model={"path": str(folder)})
    assert len(checked.wrong) == 1 and "has neither model.safetensors" in checked.wrong[0]
    assert "6,919,161,856 parameters" in checked.text  # of its config.json
    with pytest.raises(ConfigError, match=r"is no mixtral-8x7b \(model\.published\)"):
        checked_of(model={"path": str(folder), "published": "mixtral-8x7b"})
    with pytest.raises(ConfigError, match="neither a preset"):
        checked_of(unlearning={"trainable": "no/such/parameter"})


def test_the_command_needs_no_workdir_and_ends_with_2_for_wrong_data(tmp_path, capsys):
    text = ["--config", "configs/text.py", "--dry-run", f"--config.data.retain={write_lines(tmp_path / 'r.jsonl', [])}"]
    assert main([*text, "--config.data.forget=nowhere.jsonl"]) == 2
    out = capsys.readouterr().out
    assert "wrong:\n  retain data:" in out and "missing to run:\n  forget data: nowhere.jsonl is not there" in out
    assert main(["--config", "configs/quickstart.py", "--dry-run"]) == 0
    assert "nothing is missing to run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"trainable": "seuf"}, 1),
        ({"trainable": {"name": "selected_experts", "experts": {"name": "affinity", "top": 3, "scope": "layer"}}}, 48),
        ({"trainable": "selected_experts"}, 128),  # the calibration's: 1 of 8 is assumed
    ],
)
def test_as_many_experts_are_assumed_to_train_as_the_rule_takes(checked_of, settings, chosen):
    assert f"assumed: {chosen} of 1,024 experts are chosen" in checked_of(unlearning=settings).text
