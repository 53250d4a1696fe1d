"""A whole evaluation gives the same numbers on any number of devices."""

import dataclasses

import jax
import numpy as np
import pytest
from whole_evaluation import make_model, whole_evaluator, write_benchmarks

from trace_jax.parallel.mesh import make_mesh

# What is counted, chosen or written, and so is the same or is not.
EXACT = ("generated", "extraction_strength", "exact_memorization", "rouge", "verbmem", "knowmem", "tokens")


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """As few programs as have all of it: compiling them is what takes time here."""
    given = write_benchmarks(tmp_path_factory.mktemp("benchmarks"), count=2)
    return given | {"muse": dataclasses.replace(given["muse"], profiles=("muse",))}


@pytest.fixture(scope="module")
def one_device(tiny, sections):
    return whole_evaluator(tiny, sections, splits=("test",), batch_size=32).score(make_model(tiny, 0), full=True)


def check(found, expected):
    """Arrays by path: choices and texts are equal, likelihoods to float tolerance."""
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        if any(name in path for name in EXACT) or wanted.dtype.kind in "bi":
            np.testing.assert_array_equal(found[path], wanted, err_msg=path)
        else:
            np.testing.assert_allclose(found[path], wanted, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(("devices", "sizes"), [(2, {"expert": 2}), (8, {"expert": 2, "tensor": 2})])
def test_a_whole_evaluation_is_that_of_one_device(tiny, sections, one_device, devices, sizes):
    """Two devices without the tasks that write text, which take the longest to compile."""
    expected = one_device
    given = sections if devices == 8 else {"multiple_choice": sections["multiple_choice"]}
    mesh = make_mesh(jax.devices()[:devices], **sizes)
    evaluator = whole_evaluator(tiny, given, splits=("test",), batch_size=32, mesh=mesh)
    found = evaluator.score(make_model(tiny, 0), full=True)
    assert list(found) == ["questions", "text", "verbatim", "memorization", "membership", *given]
    for name, scores in found.items():
        check(scores.arrays, expected[name].arrays)
        for part, lines in expected[name].items.items():
            texts, same = ([_words(line) for line in x] for x in (lines, scores.items[part]))
            assert texts == same
    one, other = (evaluator.measure({name: scores[name] for name in found}) for scores in (expected, found))
    assert [(m.name, m.split, m.n) for m in one] == [(m.name, m.split, m.n) for m in other]
    accuracies = [(a.value, b.value) for a, b in zip(one, other, strict=True) if a.name.endswith("accuracy")]
    accuracies += [(a.value, b.value) for a, b in zip(one, other, strict=True) if a.name.startswith(("wmdp", "mmlu"))]
    assert len(accuracies) >= 6 and all(a == b for a, b in accuracies)
    np.testing.assert_allclose([m.value for m in other], [m.value for m in one], rtol=1e-4, atol=1e-5)


def _words(line):
    """What a line says without its float numbers: texts, choices and counts."""
    return {key: value for key, value in line.items() if isinstance(value, str | int)}
