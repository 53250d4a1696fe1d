"""A page shows the texts that a run kept, and none that may not be shown; and which settings are not the usual ones."""

import json

import pytest

from tests.report.test_report import results, visible_text
from trace_jax.config import ConfigError, as_dict, resolve
from trace_jax.io.files import append_line, flush_lines
from trace_jax.report.page import render
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.page import changed_settings, loss_curves, side_by_side, text_examples

CONFIG = {"data": {"benchmark": "text", "forget": "mine.jsonl"}, "evaluation": {"audit_text": True}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    question = {"split": "test", "subject": "forget", "answer": 1, "question": "Which?", "options": ["a", "b"]}
    for place, likelihood, said in (
        ("scores/target", [-3.0, -1.0], "true"),
        ("methods/m/scores", [0.0, 0.0], "x" * 900),
    ):
        lines = [question | {"log_likelihood": likelihood}, {"split": "test", "subject": "neighbour", "answer": 0}]
        text = {"generation": said, "ground_truth": "true", "prompt": "It is"}
        texts = [{"split": split, **text} for split in ["validation"] * 9 + ["test"] * 20]
        (path / place).mkdir(parents=True)
        for name, written in (("questions.items", lines), ("verbatim.items", texts), ("muse.retain", texts)):
            (path / place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return path


def test_texts_are_those_of_the_forget_set_with_what_every_model_says(workdir):
    first, *others = text_examples(workdir, CONFIG, ["m"])
    assert (first["prompt"], first["options"], first["truth"]) == ("Which?", ["a", "b"], "b")
    assert first["answers"]["m"] == [0.5, 0.5] and first["answers"]["target model"][1] == pytest.approx(0.881, abs=1e-3)
    assert len(others) == 5 and others[0]["prompt"] == "It is" and others[0]["answers"]["target model"] == "true"
    assert len(others[0]["answers"]["m"]) < 700


def test_text_that_may_not_be_shown_is_not_even_where_it_was_kept(workdir):
    hidden = {"evaluation": {"audit_text": False}}, {"data": {"forget": ["a.jsonl", "data/WMDP-bio-forget.jsonl"]}}
    assert [text_examples(workdir, CONFIG | change, ["m"]) for change in hidden] == [[], []]


def test_changed_settings_are_named_whatever_their_depth():
    given = {"name": "x", "unlearning": {"objective": {"name": "npo", "beta": 0.3}, "steps": 7}, "seed": 0}
    changed = changed_settings(as_dict(resolve(ExperimentConfig, given)))
    assert (
        changed is not None
        and {"unlearning.steps", "unlearning.objective.beta", "unlearning.objective.name"} <= changed
    )
    assert not {"seed", "unlearning.alpha", "data.benchmark", "model.num_layers", "unlearning.optimizer.name"} & changed
    assert changed_settings({"name": "x", "no_such": 1}) is None


def test_curves_of_long_runs_are_thinned(tmp_path):
    for step in range(1, 1001):
        append_line(tmp_path / "methods" / "m" / "metrics.jsonl", {"kind": "step", "step": step, "loss": 1 / step})
    flush_lines()
    curve = loss_curves(tmp_path, ["m", "absent"])["m"]
    assert (
        len(curve["step"]) == 300 and curve["loss"][9] == 1 / curve["step"][9] and set(curve["forget_loss"]) == {None}
    )


def test_runs_side_by_side_have_one_comparison_and_the_settings_in_which_they_differ():
    config = results()["config"] | {"seed": 0}
    first = results(generated="today", conclusion="trace_rows is best.", config=config)
    changed = config | {"unlearning": {"learning_rate": 0.5}, "seed": 1}
    second = first | {"config": changed, "conclusion": "trace is best."}
    text = visible_text(render(side_by_side({"runs/a": first, "runs/b": second})))
    for words in (
        "2 runs side by side", "a: trace_rows is best. b: trace is best.", "a: target model", "b: permuted",
        "No ranking. One seed a run (0, 1), settings not tuned.", "Settings in which the runs differ",
        "a.unlearning.learning_rate 0.001", "b.unlearning.learning_rate 0.5",
    ):  # fmt: skip
        assert words in text
    others = second | {"config": config | {"evaluation": {"levels": [0.1]}}}, {**second, "forgetting": "x"}
    for other in others:
        with pytest.raises(ConfigError, match=r"^b: was compared on another measure or level than a\.$"):
            side_by_side({"a": first, "b": other})
    with pytest.raises(ConfigError, match="b: is a study or a series; single runs are set side by side"):
        side_by_side({"a": first, "b": {name: value for name, value in first.items() if name != "methods"}})
