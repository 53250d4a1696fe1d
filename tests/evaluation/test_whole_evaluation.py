"""A whole evaluation, with all that a text benchmark has, MUSE, TOFU, WMDP and MMLU.

Every number has its n and its interval, or says why it has none; all are the same on any number of devices.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests import handmade, tiny
from trace_jax.data.rows import train_tokenizer
from trace_jax.evaluation.task import EvaluationConfig, MultipleChoiceConfig, MuseConfig, TofuConfig
from trace_jax.models.model import Model
from trace_jax.parallel.mesh import make_mesh
from trace_jax.tasks.benchmarks import build_tasks

WORDS = ["river", "stone", "apple", "cloud", "tiger", "amber", "lemon", "metal"]  # of one length: few programs
CONFIG = dataclasses.replace(handmade.CONFIG, vocab_size=300)
BENCHMARKS = ("muse_", "muse_ou_", "tofu_", "wmdp", "mmlu")
PREFIXES = (*BENCHMARKS, "membership_", "privleak", "verbatim", "extraction_", "exact_")
# What is counted, chosen or written, and so is the same or is not.
EXACT = ("generated", "extraction_strength", "exact_memorization", "rouge", "verbmem", "knowmem", "tokens")


def make_evaluator(directory, *, count, mesh=None):
    """An evaluator of `count` made-up items of every set, one at a time: few programs, which take the time here."""
    rng = np.random.default_rng(count)

    def words(number):
        return " ".join(rng.choice(WORDS, number))

    def write(name, make):
        file = directory / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        return tiny.write_lines(file, map(make, range(count)))

    def question(i):
        return {"question": words(4), "choices": [words(1) for _ in "ABCD"], "answer": i % 4, "subject": "virology"}

    def answer(i):
        wrong = [words(2) for _ in range(2 + i % 2)]
        return {"question": words(3), "answer": words(2), "paraphrased_answer": words(2), "perturbed_answer": wrong}

    for side in ("forget", "retain"):
        for part in ("qa", "qa_icl"):
            write(f"muse/knowmem/{side}_{part}", lambda i: {"question": words(3), "answer": words(1)})
    write("muse/verbmem/forget", lambda i: {"prompt": words(4), "gt": words(8)})
    for side in ("forget", "holdout"):
        write(f"muse/privleak/{side}", lambda i: {"text": words(8)})
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        write(f"tofu/{name}_perturbed/train", answer)
    sources = {name: write(name, question) for name in ("wmdp_bio", "wmdp_chem", "wmdp_cyber", "mmlu")}
    sizes = {"batch_size": 1, "max_gradients": 2, "bootstrap": 200}
    muse, tofu = MuseConfig(str(directory / "muse")), TofuConfig(str(directory / "tofu"), max_new_tokens=6)
    settings = EvaluationConfig(**sizes, muse=muse, tofu=tofu, multiple_choice=MultipleChoiceConfig(sources))
    probes, tasks = {"test": handmade.make_probes()}, build_tasks(settings)
    return handmade.make_evaluator(probes, settings=settings, benchmark="presidents", tasks=tasks, mesh=mesh)


@pytest.fixture(scope="module")
def models():
    """The original, the unlearned and the retrained one."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, CONFIG.vocab_size)
    return [Model(CONFIG, handmade.make_params(seed, CONFIG), tokenizer) for seed in range(3)]


def score(models, directory, count):
    """An evaluator of so many items, and what it gives on each model."""
    evaluator = make_evaluator(directory, count=count)
    return evaluator, [evaluator.score(model, full=True) for model in models]


@pytest.fixture(scope="module")
def several(models, tmp_path_factory):
    return score(models, tmp_path_factory.mktemp("benchmarks"), 3)


def check_measurements(evaluator, original, unlearned, retrained):
    """Returns the names of those without an interval."""
    alone = evaluator.measure(unlearned)
    result = dataclasses.replace(evaluator, original=original, retrained=retrained).measure(unlearned)
    assert all(any(m.name.startswith(prefix) for m in result) for prefix in PREFIXES)
    assert {m.name for m in result} - {m.name for m in alone} >= {"privleak", "muse_privleak", "tofu_forget_quality"}
    assert len({(m.name, m.split) for m in result}) == len(result), "no two numbers of a split have one name"
    tasks = [m for m in result if m.name.startswith(BENCHMARKS)]
    assert all(m.revision.startswith("sha256:") and (m.split == "test" or m.name.endswith("_half")) for m in tasks)
    for m in (*alone, *result):
        assert m.n >= 1 and math.isfinite(m.value), m
        if math.isfinite(m.low) and math.isfinite(m.high):
            assert m.low - 1e-9 <= m.value <= m.high + 1e-9, m
        else:
            assert "no interval" in m.note or "too few items" in m.note, m
    return {m.name for m in result if math.isnan(m.low)}


def test_every_number_has_n_and_an_interval_or_says_why_not(several, models, tmp_path):
    evaluator, scores = several
    assert check_measurements(evaluator, *scores) >= {"tofu_forget_quality", "tofu_forget_ks"}
    evaluator, scores = score(models, tmp_path, 1)
    without = check_measurements(evaluator, *scores)
    assert {"tofu_model_utility", "muse_verbmem", "muse_privleak_auc"} <= without
    assert not any(name.startswith(("wmdp", "mmlu")) for name in without), "Wilson's interval has an n of one"


def without_floats(line):
    """Texts, choices and counts."""
    return {key: value for key, value in line.items() if isinstance(value, str | int)}


def test_a_whole_evaluation_is_that_of_one_device(several, models, tmp_path):
    one_device, (expected, *_) = several
    evaluator = make_evaluator(tmp_path, count=3, mesh=make_mesh(jax.devices()[:4], data=2, expert=2))
    result = evaluator.score(models[0], full=True)
    tasks = ["questions", "text", "verbatim", "memorization", "membership", "muse", "tofu", "multiple_choice"]
    assert sorted(result) == sorted(expected) == sorted(tasks)
    for name, scores in result.items():
        assert scores.arrays.keys() == expected[name].arrays.keys()
        for path, wanted in expected[name].arrays.items():
            if any(part in path for part in EXACT) or wanted.dtype.kind in "bi":
                np.testing.assert_array_equal(scores.arrays[path], wanted, err_msg=path)
            else:
                np.testing.assert_allclose(scores.arrays[path], wanted, rtol=1e-4, atol=1e-5, err_msg=path)
        for part, lines in expected[name].items.items():
            assert [*map(without_floats, lines)] == [*map(without_floats, scores.items[part])]
    one, other = one_device.measure(expected), evaluator.measure(result)
    assert [(m.name, m.split, m.n) for m in one] == [(m.name, m.split, m.n) for m in other]
    shares = [m.name.endswith("accuracy") or m.name.startswith(("wmdp", "mmlu")) for m in one]
    assert sum(shares) >= 6 and all(a.value == b.value for a, b, s in zip(one, other, shares, strict=True) if s)
    np.testing.assert_allclose([m.value for m in other], [m.value for m in one], rtol=1e-4, atol=1e-5)
