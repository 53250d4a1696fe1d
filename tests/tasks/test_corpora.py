"""Nothing held out is trained on, and the same settings give the same corpora anywhere."""

import dataclasses
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.corpora import Benchmark, Part, _fingerprint, build_corpora
from trace_jax.data.sources import DataError, Document
from trace_jax.tasks.handbook import HandbookConfig


@pytest.fixture(params=["handbook", "presidents"])
def corpora(request):
    return request.getfixturevalue(request.param)


def windows(rows, size=24):
    """Every run of `size` tokens without BOS that lies in one document."""
    found = set()
    for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
        for start in range(1, len(tokens) - size):
            if segments[start - 1] == segments[start + size - 1] > 0:
                found.add(tokens[start : start + size].tobytes())
    return found


def test_no_passage_of_a_held_out_document_is_in_training(corpora):
    trained = set().union(*(windows(rows.take(np.arange(0, len(rows), 4))) for rows in corpora.train.values()))
    for probes in (corpora.validation, corpora.test):
        held_out = [rows for subject, rows in probes.text.items() if subject != "forget"]
        held_out += [probes.members["holdout"]] if "holdout" in probes.members else []
        for rows in held_out:
            # Stock phrases recur between addresses; a copied passage would repeat nearly all of its windows.
            measured = windows(rows.take(np.arange(0, len(rows), 8)))
            assert len(measured & trained) < 0.01 * len(measured)
    assert len(windows(corpora.validation.text["forget"]) & windows(corpora.forget)) > 100


def test_the_unlearner_gets_the_rows_it_should_and_they_are_counted(corpora):
    # Every token and every EOS is a target once, but for the first token of a document.
    assert all(corpora.tokens[f"train/{source}"] == rows.valid.sum() for source, rows in corpora.train.items())
    assert corpora.documents["test/general"] == 14 and corpora.documents["validation/general"] == 7
    assert len(corpora.retain) == 2000 and corpora.retain.domain.sum() == 40
    assert corpora.forget is corpora.train["forget"] and not corpora.forget.domain.any()
    trained = {(row.tobytes()) for source in ("general", "neighbour") for row in corpora.train[source].tokens}
    rows = [row.tobytes() for row in corpora.retain.tokens]
    assert set(rows) <= trained and len(set(rows)) == 2000
    neighbours = {row.tobytes() for row in corpora.train["neighbour"].tokens}
    assert [row in neighbours for row in rows] == corpora.retain.domain.astype(bool).tolist()


def test_questions_are_scored_on_their_options(corpora):
    for subject, questions in corpora.test.questions.items():
        assert questions.tokens.shape[2] % 8 == 0, subject
        for q in range(0, len(questions), 17):
            texts = []
            options = (questions.tokens[q], questions.segments[q], questions.scored[q])
            for tokens, segments, scored in zip(*options, strict=True):
                assert tokens[0] == 1 and not scored[segments == 0].any() and scored.any()
                length = int(segments.sum())
                assert segments[:length].all() and not scored[length - 1]
                targets = np.flatnonzero(scored) + 1
                assert targets.tolist() == list(range(targets[0], length)), "the option is what ends the row"
                pieces = tokens[1 : targets[0]], tokens[targets]
                texts.append(tuple(corpora.tokenizer.decode(piece.tolist()) for piece in pieces))
            assert len({prompt for prompt, _ in texts}) == 1 and len({option for _, option in texts}) == 4
            assert all(option.startswith(" ") for _, option in texts)


SMALL = HandbookConfig(row_length=8, vocab_size=300, forget_substances=4, neighbour_substances=4, retain_rows=10)


def corpora_of(benchmark):
    with mock.patch.object(HandbookConfig, "build", lambda _: benchmark):
        return build_corpora(SMALL)


def small(**changes):
    """Of few addresses."""
    benchmark = SMALL.build()
    train = {**benchmark.train, "general": benchmark.train["general"][:4]}
    held_out = {"general": benchmark.test.held_out["general"][:1]}
    parts = {n: dataclasses.replace(getattr(benchmark, n), held_out=held_out) for n in ("validation", "test")}
    return corpora_of(dataclasses.replace(benchmark, train=train, **parts, **changes))


def test_another_process_builds_the_same_corpora(handbook):
    environment = {**os.environ, "PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", "from tests.tasks.test_corpora import small; print(small().fingerprint)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    corpora = small()
    assert done.stdout.strip() == corpora.fingerprint
    changed = dataclasses.replace(handbook.retain, domain=1 - handbook.retain.domain)  # and sees every array
    assert len({_fingerprint(handbook.tokenizer, [r]) for r in (handbook.retain, changed, handbook.forget)}) == 3
    # A small row and a small vocabulary are enough; more retain rows than there are are not.
    assert corpora.tokenizer.get_vocab_size() == 300 and corpora.forget.tokens.shape[1] == 8
    assert len(corpora.validation.questions["forget"]) == 3 and len(corpora.test.questions["forget"]) == 9
    with pytest.raises(ConfigError, match=r"retain_rows = 20000 with neighbour_share = 0\.9 needs 18000 neighbour row"):
        small(retain_rows=20000, neighbour_share=0.9)


def test_leakage_is_noticed_whatever_the_case_and_spacing():
    train = [Document("The Union\nof the States.", "a:1"), Document("Other text.", "a:2")]
    other, twin = Document("Of it", "b:1"), Document(" the union of  the states.", "b:2")
    leaking = Benchmark({"forget": train}, {"forget": 1.0}, Part({"general": [other, twin]}), Part({}))
    with pytest.raises(DataError, match="1 held-out documents are also trained on, for example b:2 = a:1"):
        corpora_of(leaking)
