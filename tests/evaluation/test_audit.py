"""Every item of a full evaluation is written for audit, its text only where that may be."""

import dataclasses
import json

import numpy as np
import pytest

from trace_jax.evaluation.audit import audit_items, hazardous
from trace_jax.evaluation.config import EvaluationConfig
from trace_jax.evaluation.measurement import find
from trace_jax.evaluation.store import ScoreStore
from trace_jax.evaluation.suite import make_evaluator

SETTINGS = EvaluationConfig(batch_size=8, max_rows=5, max_prompts=3, bootstrap=100)


@pytest.fixture(scope="module")
def audited(tiny, tmp_path_factory):
    """(evaluator, its measurements, lines per part)."""
    directory = tmp_path_factory.mktemp("scores")
    probes = {"test": tiny.make_probes(text=("forget", "general")), "validation": tiny.make_probes(3)}
    evaluator = make_evaluator(SETTINGS, tiny.config, probes, tiny.make_tokenizer(), benchmark="handbook", identity="a")
    found = evaluator.full(tiny.params, store=ScoreStore(directory, "model"))
    lines = {
        file.name.split(".")[1]: [json.loads(line) for line in file.read_text().splitlines()]
        for file in directory.glob("probes.*.jsonl")
    }
    return evaluator, found, lines


def of(lines, **chosen):
    return [line for line in lines if all(line[key] == value for key, value in chosen.items())]


def test_measurements_can_be_made_of_the_lines(audited):
    _, found, lines = audited
    questions = of(lines["questions"], split="test", subject="forget")
    assert [line["item"] for line in questions] == list(range(9))
    assert all(np.argmax(q["log_likelihood"]) == q["answer"] for q in questions if q["correct"])
    assert find(found, "forget_accuracy", "test").value == pytest.approx(np.mean([q["correct"] for q in questions]))
    rows = of(lines["rows"], split="test", subject="general")
    nll = sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)
    assert len(rows) == 5 and find(found, "general_nll", "test").value == pytest.approx(nll)
    verbatim = of(lines["verbatim"], split="validation")
    assert find(found, "verbatim", "validation").value == pytest.approx(np.mean([v["score"] for v in verbatim]))
    sides = [of(lines["members"], split="test", side=side) for side in ("forget", "holdout")]
    wins = np.mean([[(h["min_k"] < f["min_k"]) + 0.5 * (h["min_k"] == f["min_k"]) for h in sides[1]] for f in sides[0]])
    assert find(found, "privleak_auc", "test").value == pytest.approx(wins)
    assert find(found, "membership_min_k_auc", "test").value == pytest.approx(1 - wins)


def test_verbatim_lines_hold_what_was_generated_and_the_truth(audited):
    evaluator, _, lines = audited
    first = of(lines["verbatim"], split="test", item=0)[0]
    truth = " ".join(f"w{i}" for i in evaluator.prompts["test"].continuation[0])
    assert first["ground_truth"] == truth and len(first["generation"].split()) == 4


def test_no_text_is_written_where_it_may_not_be(tiny, audited, tmp_path):
    evaluator = dataclasses.replace(audited[0], config=dataclasses.replace(SETTINGS, audit_text=False))
    evaluator.full(tiny.params, store=ScoreStore(tmp_path, "model"))
    lines = [json.loads(line) for line in (tmp_path / "probes.verbatim.jsonl").read_text().splitlines()]
    assert lines and all(set(line) == {"split", "item", "score"} for line in lines)
    written = "".join(file.read_text() for file in tmp_path.glob("*.jsonl"))
    assert not any(f"w{i} " in written or f'w{i}"' in written for i in range(37))


def test_without_items_there_is_no_part(tiny):
    evaluator = make_evaluator(SETTINGS, tiny.config, {}, benchmark="text")
    assert audit_items(evaluator.score(tiny.params, full=True), {}, None) == {}


def test_text_of_wmdp_is_hazardous_wherever_it_comes_from():
    assert hazardous(["huggingface:cais/wmdp-corpora/cyber-forget-corpus:train"])
    assert hazardous(["a.jsonl", "data/WMDP-bio-forget.jsonl"])
    assert not hazardous(["a.jsonl", "huggingface:muse-bench/MUSE-Books"]) and not hazardous([])
