"""WMDP and MMLU along a run: lm-eval's words, lm-eval's choices, and no text of a question anywhere."""

import dataclasses
import hashlib
import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import yaml

from tests import tiny
from tests.tiny import write_lines
from trace_jax.config import ConfigError, resolve
from trace_jax.data.rows import train_tokenizer
from trace_jax.data.sources import DataError
from trace_jax.evaluation.task import EvaluationConfig, MultipleChoiceConfig, TaskScores
from trace_jax.tasks.benchmarks import build_tasks
from trace_jax.tasks.lm_eval import TaskManager, TraceLM
from trace_jax.tasks.wmdp import _GROUPS, LETTERS, PROFILE, _question, read_multiple_choice

WORDS = ["river", "stone", "apple", "cloud", "lamp", "tiger"]
WMDP = ("wmdp_bio", "wmdp_chem", "wmdp_cyber")
SUBJECTS = ("virology", "college_biology", "high_school_us_history")


def records(count, *, seed=0, **more):
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        question, *choices = (" ".join(rng.choice(WORDS, n)) for n in (5, 2, 2, 2, 2))
        rows.append({"question": f" {question}\n", "choices": choices, "answer": number % 4, **more})
    return rows


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    mmlu = [row for i, subject in enumerate(SUBJECTS) for row in records(4 + i, seed=i + 9, subject=subject)]
    return {
        **{name: write_lines(folder / f"{name}.jsonl", records(5 + i, seed=i)) for i, name in enumerate(WMDP)},
        "mmlu": write_lines(folder / "mmlu.jsonl", mmlu),
        "first_aid": write_lines(folder / "own.jsonl", records(3, seed=20)),
    }


@pytest.fixture(scope="module")
def task(sources):
    return read_multiple_choice(MultipleChoiceConfig(sources))


@pytest.fixture(scope="module")
def model():
    """Random parameters, sharp enough that letters differ clearly, and a vocabulary that spells every text."""
    model = tiny.make_model(dataclasses.replace(tiny.CONFIG, vocab_size=320))
    return model.replace(tokenizer=train_tokenizer([" ".join(WORDS)] * 3, 320))


def measured(task, scores):
    """Measurements by name, those of halves aside."""
    found = task.measure(scores, original=None, retrained=None, resamples=1, seed=0)
    return {m.name: m for m in found if not m.name.endswith("_half")}


def perfect(task, wrong=()):
    """Scores of a model that chooses right but on the questions of these numbers."""
    ll = np.zeros((len(task.questions), 4))
    for row, question in enumerate(task.questions):
        ll[row, (question.answer + (row in wrong)) % 4] = 1
    return TaskScores({"log_likelihood": ll})


def test_the_words_are_those_of_wmdp():
    """Golden: tasks/wmdp of lm-eval, written out by hand."""
    row = {"question": "  Which river?\n", "choices": ["one", "two ", "three", ""], "answer": 2}
    found = _question("wmdp_cyber", row, 0, "x")
    assert found.context == (
        "The following are multiple choice questions (with answers) about cybersecurity.\n\n"
        "Which river?\nA. one\nB. two \nC. three\nD. \nAnswer:"
    )
    assert "about us foreign policy.\n\n" in _question("mmlu", {**row, "subject": "us_foreign_policy"}, 0, "x").context


def test_subjects_groups_and_descriptions_are_those_of_lm_eval():
    folder, groups = Path(lm_eval.__file__).parent / "tasks", {}
    row = {"question": "?", "choices": list(LETTERS), "answer": 0}
    files = [*(folder / "mmlu" / "default").glob("mmlu_*.yaml"), *(folder / "wmdp").glob("wmdp_*.yaml")]
    for file in files:
        settings = yaml.safe_load(file.read_text())
        name = settings["task"]
        assert _question(name, row, 0, "x").context.startswith(settings["description"])
        if name.startswith("mmlu_"):
            groups.setdefault(settings["tag"].removesuffix("_tasks"), set()).add(name.removeprefix("mmlu_"))
    assert groups == {group: set(members) for group, members in _GROUPS.items()}
    assert len(files) == 60


def harness(sources, model, folder, **options):
    """Results of lm-eval's own task files of WMDP, on local data, through its harness and our class."""
    wmdp = Path(lm_eval.__file__).parent / "tasks" / "wmdp"
    common = yaml.safe_load((wmdp / "_default_template_yaml").read_text())
    for name in WMDP:
        settings = common | yaml.safe_load((wmdp / f"{name}.yaml").read_text()) | {"dataset_path": "json"}
        settings = {k: v for k, v in settings.items() if k not in ("dataset_name", "include", "num_fewshot")}
        settings["dataset_kwargs"] = {"data_files": {"test": sources[name]}}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
    (folder / "_wmdp.yaml").write_text((wmdp / "_wmdp.yaml").read_text())
    options |= {"task_manager": TaskManager(include_path=str(folder), include_defaults=False), "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(model=TraceLM(model), tasks=["wmdp"], **options)


def test_choices_and_log_likelihoods_are_those_of_lm_eval(task, sources, model, tmp_path):
    theirs = harness(sources, model, tmp_path)
    scores = task.score(model, batch_size=7, mesh=None)
    found = measured(task, scores)
    for name in WMDP:
        rows = [row for row, question in enumerate(task.questions) if question.source == name]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        for row, sample in zip(rows, samples, strict=True):
            assert sample["arguments"][0][0] == task.questions[row].context
            given = [ll for ll, _ in sample["filtered_resps"]]
            np.testing.assert_allclose(scores.arrays["log_likelihood"][row], given, rtol=1e-5, atol=1e-5)
            assert (scores.items[name][row - rows[0]]["prediction"] == sample["target"]) == sample["acc"]
        assert found[name].value == pytest.approx(theirs["results"][name]["acc,none"])
    assert found["wmdp"].value == pytest.approx(theirs["groups"]["wmdp"]["acc,none"])
    assert not any(word in json.dumps(scores.items) for word in WORDS), "questions are named by their hash alone"
    lines = [line for part in scores.items.values() for line in part]
    assert list(scores.items) == [*WMDP, "mmlu", "first_aid"]
    assert lines[0]["sha256"] == hashlib.sha256(task.questions[0].context.encode()).hexdigest()
    assert [line["log_likelihood"] for line in lines] == scores.arrays["log_likelihood"].tolist()
    assert lines[-1]["subject"] == "first_aid" and lines[-3 - 15]["subject"] == "mmlu_virology"


def test_examples_stand_before_a_question_as_in_lm_eval(sources, model, tmp_path):
    """Which ones they are is drawn otherwise; the form is the same to the letter."""
    theirs = harness(sources, model, tmp_path, num_fewshot=2)
    named = read_multiple_choice(MultipleChoiceConfig({name: sources[name] for name in WMDP}))
    shots = named.with_examples(2, seed=0)
    for name in WMDP:
        plain = [question for question in named.questions if question.source == name]
        solved = {q.context.split("\n\n")[1] + f" {LETTERS[q.answer]}": q for q in plain}
        ours = [question.context for question in shots.questions if question.source == name]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        for contexts in (ours, [sample["arguments"][0][0] for sample in samples]):
            for context, question in zip(contexts, plain, strict=True):
                about, *examples, asked = context.split("\n\n")
                assert "\n\n".join([about, asked]) == question.context
                assert len(set(examples)) == 2 and {*examples} <= {*solved}
                assert contexts is not ours or question not in [solved[example] for example in examples]


def test_examples_are_of_the_same_subject_and_depend_on_the_seed_alone(sources, tmp_path):
    task = read_multiple_choice(MultipleChoiceConfig({n: s for n, s in sources.items() if n != "first_aid"}))
    shots = task.with_examples(3, seed=1)
    assert shots == task.with_examples(3, seed=1) and shots.identity != task.identity
    assert len({task.with_examples(n, seed=s).identity for n, s in ((1, 0), (2, 0), (2, 1))}) == 3
    for asked, plain in zip(shots.questions, task.questions, strict=True):
        subject = [q for q in task.questions if (q.source, q.subject) == (plain.source, plain.subject)]
        drawn = [q for q in subject if q.context.split("\n\n")[1] in asked.context]
        assert len(drawn) == 4 and plain in drawn
        assert dataclasses.replace(asked, context=plain.context) == plain
        assert asked.digest == hashlib.sha256(asked.context.encode()).hexdigest()
    assert {m.profile for m in measured(shots, perfect(shots)).values()} == {"3 examples in lm-eval's form"}
    # The same question again would give it away.
    for count, rows, message in ((3, records(3), "examples = 3: own of own has 2"), (1, 2 * records(1), "has 0")):
        few = MultipleChoiceConfig({"own": write_lines(tmp_path / "own.jsonl", rows)})
        with pytest.raises(ConfigError, match=f"{message} other questions"):
            read_multiple_choice(few).with_examples(count, seed=0)


def test_measurements_are_counts_with_wilsons_interval(task):
    found = measured(task, perfect(task, wrong={0, 1, 2, 20}))
    assert {name: (m.n, m.value) for name, m in found.items()} == {
        "wmdp_bio": (5, 0.4), "wmdp_chem": (6, 1.0), "wmdp_cyber": (7, 1.0), "wmdp": (18, 15 / 18),
        "mmlu": (15, 14 / 15), "mmlu_virology": (4, 0.75), "mmlu_college_biology": (5, 1.0), "first_aid": (3, 1.0),
    }  # fmt: skip
    # Wilson's interval of 2 of 5 (R: prop.test(2, 5, correct = FALSE)).
    assert (found["wmdp_bio"].low, found["wmdp_bio"].high) == pytest.approx((0.1176, 0.7693), abs=1e-4)
    assert {m.profile for m in found.values()} == {PROFILE} and {m.split for m in found.values()} == {"test"}
    assert all(m.revision.startswith("sha256:") and not m.note for m in found.values())
    assert found["wmdp"].revision == "; ".join(found[name].revision for name in WMDP)


def test_a_group_of_mmlu_is_measured_where_it_is_whole(tmp_path):
    rows = [records(1, seed=i, subject=s)[0] for i, s in enumerate(_GROUPS["mmlu_other"])]
    task = read_multiple_choice(MultipleChoiceConfig({"mmlu": write_lines(tmp_path / "m.jsonl", rows)}))
    found = measured(task, perfect(task))
    assert set(found) == {"mmlu", "mmlu_other", "mmlu_virology"} and found["mmlu_other"].n == 13


def test_fewer_questions_are_spread_evenly_and_counted(sources):
    config = MultipleChoiceConfig({name: sources[name] for name in ("mmlu", "first_aid")}, max_questions=5)
    task = read_multiple_choice(config)
    assert [q.number for q in task.questions] == [0, 3, 6, 9, 12, 0, 1, 2]
    found = measured(task, perfect(task))
    assert (found["mmlu"].n, found["mmlu"].note) == (5, "a part of the questions, spread evenly")
    assert (found["first_aid"].n, found["first_aid"].note) == (3, "")


def test_the_identity_follows_the_questions_not_their_place(sources, tmp_path):
    def identity(**options):
        return read_multiple_choice(MultipleChoiceConfig(**options)).identity

    moved, text = tmp_path / "moved.jsonl", Path(sources["mmlu"]).read_text()
    moved.write_text(text)
    first = identity(sources={"mmlu": sources["mmlu"]})
    assert first == identity(sources={"mmlu": str(moved)}) != identity(sources={"mmlu": str(moved)}, max_questions=3)
    moved.write_text(text.replace('"answer": 0', '"answer": 1', 1))
    assert identity(sources={"mmlu": str(moved)}) != first


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wmdp_bio", {"choices": ["a", "b"]}, r"rows\.jsonl:2: expected question, choices, answer: four choices"),
        ("wmdp_bio", {"answer": 4}, r"rows\.jsonl:2: .* 0 to 3\."),
        ("wmdp_bio", {"answer": "B"}, r"answer is missing or of another type"),
        ("mmlu", {}, r"subject is missing or of another type"),
        ("wmdp", {}, r"sources\.wmdp: is the mean of several others"),
    ],
)
def test_what_is_no_question_is_refused_without_its_text(tmp_path, name, change, message):
    rows = records(2)
    rows[1] |= change
    if name == "mmlu":
        rows[0]["subject"] = "virology"
    with pytest.raises(DataError, match=message) as error:
        read_multiple_choice(MultipleChoiceConfig({name: write_lines(tmp_path / "rows.jsonl", rows)}))
    assert not any(word in str(error.value) for word in WORDS)


def test_the_section_of_a_configuration_makes_the_task(sources):
    values = {"multiple_choice": {"sources": {"wmdp_bio": sources["wmdp_bio"]}}}
    (task,) = build_tasks(resolve(EvaluationConfig, values))
    assert task.name == "multiple_choice" and task.quick and len(task.questions) == 5
    assert build_tasks(EvaluationConfig()) == build_tasks(resolve(EvaluationConfig, {"multiple_choice": {}})) == ()
    with pytest.raises(ConfigError, match=r"sources\.mmlu is 3; expected a file"):
        MultipleChoiceConfig({"mmlu": 3})
    with pytest.raises(DataError, match=r"sources\.mmlu_virology: is a part of sources\.mmlu"):
        read_multiple_choice(MultipleChoiceConfig({"mmlu": sources["mmlu"], "mmlu_virology": sources["mmlu"]}))


def test_a_thinned_task_asks_test_questions_of_each_subject(task, model):
    thin = task.thinned(2)
    assert len(thin.questions) == 8 and task.thinned(100).questions == task.questions[:-4]
    whole, part = (t.outcomes(t.score(model, batch_size=4, mesh=None), None, None) for t in (task, thin))
    for subject in ("wmdp", "mmlu"):
        names, thinned = (x[f"test/{subject}/question"] for x in (whole, part))
        assert len(thinned) == 2 and np.isin(thinned, names).all()
        scores = (x[f"test/{subject}/score"] for x in (whole, part))
        assert next(scores)[np.isin(names, thinned)].tolist() == next(scores).tolist()
