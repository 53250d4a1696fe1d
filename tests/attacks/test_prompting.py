"""Prompting recovers what a model only refuses in the words of its evaluation, and nothing that is really gone."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.attacks.conftest import measured, value
from trace_jax.attacks.attack import Case, Context
from trace_jax.attacks.prompting import Prompting
from trace_jax.config import ConfigError
from trace_jax.data.corpora import build_corpora
from trace_jax.evaluation import probes as builtin
from trace_jax.evaluation.intervals import find
from trace_jax.evaluation.probes import Memorization, probe_tasks
from trace_jax.evaluation.task import EvaluationConfig, Evaluator, MultipleChoiceConfig, TaskScores
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.model import Model, Source
from trace_jax.parallel.mesh import PLAIN
from trace_jax.tasks import wmdp
from trace_jax.tasks.handbook import HandbookConfig
from trace_jax.tasks.text import TextConfig
from trace_jax.tasks.wmdp import LETTERS, read_multiple_choice

SETTINGS = EvaluationConfig(batch_size=8, max_prompts=4, bootstrap=100)


@dataclasses.dataclass(frozen=True)
class Mind:
    """A model by what it knows: `facts` (values by name), `texts` (tokens), and the queries that it refuses."""

    facts: dict
    texts: tuple = ()
    refused: frozenset = frozenset()


def asked_of(questions, tokenizer):
    """The text before the options of every question."""
    for tokens, scored in zip(questions.tokens[:, 0], questions.scored[:, 0], strict=True):
        yield tokenizer.decode(tokens[1 : np.flatnonzero(scored)[0] + 1].tolist())


def options_of(tokens, scored, tokenizer):
    return [tokenizer.decode(t[1:][s[:-1]].tolist()).strip() for t, s in zip(tokens, scored, strict=True)]


@pytest.fixture
def minds(monkeypatch, handbook):
    """Minds stand for parameters in both places where a model is asked."""
    tokenizer = handbook.tokenizer

    def score(model, questions, **_):
        params, result = model.params, []
        for q, text in enumerate(asked_of(questions, tokenizer)):
            options = options_of(questions.tokens[q], questions.scored[q], tokenizer)
            named = [name for name in re.findall(r"[A-Z][a-z]{3,}", text) if name in params.facts]
            right_options = set() if text in params.refused or not named else params.facts[named[-1]]
            copied = 0.5 * np.array([o in text for o in options])  # what stands in the query is likelier
            result.append(np.array([float(o in right_options) for o in options]) + copied)
        return np.array(result)

    def write(params, config, prompt, *, lengths=None, max_new_tokens, **_):
        rows = prompt if lengths is None else [row[:n] for row, n in zip(prompt, lengths, strict=True)]
        result = np.full((len(rows), max_new_tokens), 300)
        for written, row in zip(result, np.asarray(rows, object), strict=True):
            row = [int(t) for t in row]
            if tuple(row) in params.refused:
                continue
            for text in params.texts:
                for end in range(4, len(text)):
                    if text[end - 4 : end] == tuple(row[-4:]):  # it goes on from the last four tokens
                        written[: len(text[end:])] = text[end : end + max_new_tokens]
        return result

    def score_text(model, rows, **_):
        return np.where(rows.valid, 0.1 if model.params.texts else 9.0, 0).astype(np.float32)

    monkeypatch.setattr(builtin, "score_questions", score)
    monkeypatch.setattr(builtin, "score_rows", score_text)
    monkeypatch.setattr(Memorization, "score", lambda *_, **__: TaskScores({}))
    monkeypatch.setattr(Memorization, "measure", lambda *_, **__: [])
    monkeypatch.setattr(builtin, "generate", write)


@pytest.fixture(scope="module")
def handbook():
    return build_corpora(HandbookConfig(forget_substances=24, neighbour_substances=24, retain_rows=50))


def make_case(data, corpora, unlearned, original, directory, *, tasks=()):
    models = [Model(ModelConfig(vocab_size=2048), params, corpora.tokenizer) for params in (original, unlearned)]
    probes = {"validation": corpora.validation, "test": corpora.test}
    probes = probe_tasks(probes, SETTINGS, accuracies=data.board.questions, identity="probes")
    evaluator = Evaluator(SETTINGS, (*probes, *tasks))
    where = PLAIN.mesh(), 3, directory / "shared", "shared", dict
    context = Context(Prompting(), models[0], corpora, data, data.board, evaluator, *where)
    return Case(context, models[1], directory, "known")


def prompting(attack, case, **changes):
    """What the attack gives on a case, in a context that is changed."""
    case = dataclasses.replace(case, context=dataclasses.replace(case.context, attack=attack, **changes))
    return attack.points(case)


def forms_of(attack, case):
    return attack.prepare(dataclasses.replace(case.context, attack=attack))


@pytest.fixture
def case(minds, handbook, tmp_path):
    """make(kind): the handbook's case with an unlearned model that "refuses", has "lost" it, or is as "before"."""
    facts, refused = {}, set()
    for probes in (handbook.validation, handbook.test):
        for questions in probes.questions.values():
            for q, text in enumerate(asked_of(questions, handbook.tokenizer)):
                options = options_of(questions.tokens[q], questions.scored[q], handbook.tokenizer)
                facts.setdefault(re.findall(r"[A-Z][a-z]{3,}", text)[-1], set()).add(options[questions.answer[q]])
        refused |= set(asked_of(probes.questions["forget"], handbook.tokenizer))
    forgotten = {name for name in facts if any(name in text for text in refused)}
    unlearned = {
        "before": Mind(facts),
        "refuses": Mind(facts, refused=frozenset(refused)),
        "lost": Mind({name: values for name, values in facts.items() if name not in forgotten}),
    }
    data = HandbookConfig(forget_substances=24, neighbour_substances=24, retain_rows=50)
    return lambda kind: make_case(data, handbook, unlearned[kind], unlearned["before"], tmp_path / kind)


def test_other_queries_recover_what_was_only_refused(case):
    refuses = case("refuses")
    assert value(measured(refuses), "forget_accuracy") < 0.5
    points = prompting(Prompting(examples=(1, 3)), refuses)
    assert [p.at for p in points] == ["1 example", "3 examples", "half of the text", "75 % of the text", "paraphrase"]
    for point in points:
        for split in ("validation", "test"):
            assert value(point.measurements, "forget_accuracy", split) == 1, point.at
            assert value(point.measurements, "neighbour_accuracy", split) == 1
            assert value(point.original, "forget_accuracy", split) == 1
        names = {m.name for m in point.measurements}
        assert names == {"forget_accuracy", "neighbour_accuracy"}
        forget = refuses.context.corpora.test.questions["forget"]
        assert find(point.measurements, "forget_accuracy", "test").n == len(forget)


def test_what_is_lost_stays_lost_though_the_model_copies_what_it_reads(case):
    lost = case("lost")
    chance = value(measured(lost), "forget_accuracy")
    assert 0.2 < chance < 0.3
    for point in prompting(Prompting(), lost):
        # No option stands in any query, so a model that copies is where it was.
        assert value(point.measurements, "forget_accuracy") == chance, point.at
        assert value(point.measurements, "neighbour_accuracy") == value(point.original, "forget_accuracy") == 1


def test_the_seed_decides_on_the_examples_and_all_models_get_the_same(case, monkeypatch):
    seen = []
    score = builtin.score_questions
    monkeypatch.setattr(builtin, "score_questions", lambda m, q, **k: seen.append(q.tokens) or score(m, q, **k))
    settings, refuses, lost = Prompting(prefixes=()), case("refuses"), case("lost")
    prompting(settings, refuses)
    first, original, *paraphrases = seen
    np.testing.assert_array_equal(first, original)
    np.testing.assert_array_equal(*paraphrases)
    prompting(settings, lost)
    np.testing.assert_array_equal(seen[4], first)
    prompting(settings, dataclasses.replace(lost, identity="another"), seed=4, identity="another")
    assert seen[8].shape != first.shape or (seen[8] != first).any()
    prompting(settings, dataclasses.replace(lost, identity="another"), seed=4, identity="another")
    assert len(seen) == 12  # its scores were kept


def names_in(text):
    return set(re.findall(r"[A-Z][a-z]{3,}", re.sub(r"(?m)^\w+", "", text)))


def test_examples_of_one_split_are_from_the_other(case, own, tmp_path):
    _, tasks = forms_of(Prompting(examples=(2,)), case("lost"))[0]
    corpora = case("lost").context.corpora
    texts = {key: asked_of(questions, corpora.tokenizer) for key, questions in tasks[0].data.items()}
    asked = {key: [text.split("\n\n") for text in several] for key, several in texts.items()}
    for split, other in (("test", "validation"), ("validation", "test")):
        for subject in ("forget", "neighbour"):
            there = {name for *_, query in asked[other, subject] for name in names_in(query)}
            examples = [example for *examples, _ in asked[split, subject] for example in examples]
            assert len(examples) == 2 * len(asked[split, subject])
            assert all(names_in(example) and names_in(example) <= there for example in examples)
    config, corpora, _ = own
    [(at, tasks)] = forms_of(Prompting(examples=(1,), prefixes=()), make_case(config, corpora, 0, 0, tmp_path))
    assert at == "1 example"  # without a file text has no paraphrase
    for split, other in (("test", corpora.validation), ("validation", corpora.test)):
        beginnings = [row[1:].tobytes() for row in other.prompts["forget"].prompt]
        assert all(any(b in row.tobytes() for b in beginnings) for row in tasks[1].data[split].prompt)


def test_more_than_the_model_reads_is_refused_before_anything_is_scored(case):
    lost = case("lost")
    lost.directory.mkdir()
    (lost.directory / "config.json").write_text('{"max_position_embeddings": 32}')
    short = lost.context.original.replace(source=Source(lost.directory, "olmoe"))
    with pytest.raises(ConfigError, match=r"with 3 examples the longest query has \d+ .* the model reads 32 at"):
        prompting(Prompting(), lost, original=short)
    assert [path.name for path in lost.directory.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("name", "wrong"), [("prefixes", 0.0), ("prefixes", 1.0), ("prefixes", 1.5), ("examples", 0)])
def test_shares_and_counts_that_ask_for_nothing_are_refused(name, wrong):
    with pytest.raises(ConfigError, match=f"{name} "):
        Prompting(**{name: (wrong,)})


def test_multiple_choice_is_asked_behind_examples_and_its_text_is_written_nowhere(minds, own, tmp_path, monkeypatch):
    config, corpora, _ = own
    rows = [{"question": f"secret {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(8)]
    task = read_multiple_choice(MultipleChoiceConfig({"wmdp_bio": tiny.write_lines(tmp_path / "rows.jsonl", rows)}))
    right = {q.context.split("\n\n")[-1]: f" {LETTERS[q.answer]}" for q in task.questions}

    def score(model, texts, **_):
        """Knows every answer; what it refuses, it refuses in these words alone."""
        told = ((text not in model.params.refused, text.split("\n\n")[-1], answer) for text, answer in texts)
        return [(float(answers and answer == right[asked]), False) for answers, asked, answer in told]

    monkeypatch.setattr(wmdp, "score_texts", score)
    refuses = Mind({}, refused=frozenset(q.context for q in task.questions))
    case = make_case(config, corpora, refuses, Mind({}), tmp_path / "attack", tasks=(task,))
    assert value(measured(case), "wmdp_bio") == 0.25
    (point,) = prompting(Prompting(examples=(2,), prefixes=()), case)
    assert value(point.measurements, "wmdp_bio") == value(point.original, "wmdp_bio") == 1
    files = [file for file in case.directory.rglob("*") if file.is_file()]
    assert files and not any(b"secret" in file.read_bytes() for file in files)


@pytest.fixture(scope="module")
def own(data):
    """Own text, its settings and a file of paraphrases that continue with forget text."""
    files = {name: str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    config = TextConfig(**files, vocab_size=400, row_length=96)
    texts = [json.loads(line)["text"] for line in (data / "forget.jsonl").read_text().splitlines()]
    rows = [{"prompt": f"candle {t[:40]}", "continuation": t[40:90]} for t in texts[:6]]
    return config, build_corpora(config), tiny.write_lines(data / "own.jsonl", rows)


def test_continuations_of_text_recover_what_was_only_refused(minds, own, tmp_path):
    config, corpora, paraphrases = own
    rows = zip(corpora.forget.tokens, corpora.forget.segments, strict=True)
    chunks = [tuple(row[of == s].tolist()) for row, of in rows for s in range(1, of.max() + 1)]
    parts = (corpora.validation, corpora.test)
    prompts = frozenset(tuple(p) for probes in parts for p in probes.prompts["forget"].prompt.tolist())
    knows, refuses, lost = Mind({}, tuple(chunks)), Mind({}, tuple(chunks), prompts), Mind({})
    settings = Prompting(examples=(2,), paraphrases=paraphrases)
    for unlearned, recovered in ((refuses, True), (lost, False)):
        case = make_case(config, corpora, unlearned, knows, tmp_path / str(recovered))
        points = prompting(settings, case)
        assert [p.at for p in points] == ["2 examples", "half of the text", "75 % of the text", "paraphrase"]
        for point in points:
            result, original = (value(m, "verbatim") for m in (point.measurements, point.original))
            assert value(point.original, "forget_probability_ratio") == 1
            ratio = value(point.measurements, "forget_probability_ratio")
            assert ratio == pytest.approx(1 if recovered else np.exp(-8.9))
            assert (result == original > 0.3) if recovered else (result < 0.05 < original), point.at
    assert find(points[-1].measurements, "verbatim", "test").n == SETTINGS.max_prompts
    assert find(points[-1].measurements, "verbatim", "validation") is None


def test_other_paraphrases_are_scored_again(minds, own, tmp_path):
    config, corpora, paraphrases = own
    source, lines = tmp_path / "own.jsonl", Path(paraphrases).read_text().splitlines(keepends=True)
    case = make_case(config, corpora, Mind({}), Mind({}), tmp_path / "attack")
    lines_file = tmp_path / "attack" / "paraphrase" / "verbatim.items.jsonl"
    for count in (3, 2):
        source.write_text("".join(lines[:count]))
        (point,) = prompting(Prompting(examples=(), prefixes=(), paraphrases=str(source)), case)
        assert find(point.measurements, "verbatim", "test").n == count
        assert len(lines_file.read_text().splitlines()) == count and "ground_truth" in lines_file.read_text()
    hazard = tmp_path / "wmdp.jsonl"  # text of WMDP is copied nowhere
    hazard.write_text(lines[0])
    prompting(Prompting(examples=(), prefixes=(), paraphrases=str(hazard)), case)
    assert len(lines_file.read_text().splitlines()) == 1 and "ground_truth" not in lines_file.read_text()
