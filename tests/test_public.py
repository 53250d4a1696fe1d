"""Every public function answers an argument of another type with one sentence: what it is, and what is expected."""

import dataclasses
import inspect
import re
import typing
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trace_jax
from tests import tiny
from trace_jax.config import fits
from trace_jax.models.architecture import abstract_params
from trace_jax.models.model import Model, Source
from trace_jax.routing.statistics import Assignments, ExpertStatistics
from trace_jax.routing.weights import RetainWeights
from trace_jax.run.methods import run
from trace_jax.unlearning.unlearn import Unlearned

PUBLIC = {name: getattr(trace_jax, name) for name in trace_jax.__all__}
FUNCTIONS = [name for name, value in PUBLIC.items() if callable(value) and not isinstance(value, type)]
CALLS = [
    ("calibrate", {"assignments": np.zeros((2, 2, 2)), "max_weight": None}, "max_weight is None (NoneType)"),
    ("unlearn", {"config": {}}, "config is {} (dict); expected UnlearningConfig."),
    ("unlearn", {"forget": ["text"]}, "forget is ['text'] (list); expected Rows (pack(texts, model) makes them)."),
    ("generate_text", {"prompts": "one text"}, "prompts is 'one text' (str); expected a list, each item text."),
    ("generate_text", {"prompts": [1]}, "prompts is [1] (list); expected a list, each item text."),
    ("generate_text", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5 (float); expected a whole number."),
    ("load_config", {"name": None}, "name is None (NoneType); expected text or a mapping or ConfigDict."),
    ("load_pretrained", {"path": 3}, "path is 3 (int); expected text or a path."),
    ("run", {"config": "configs/quickstart.py"}, "config is 'configs/quickstart.py' (str); expected ExperimentConfig."),
    ("expert_statistics", {"rows": "text"}, "rows is 'text' (str); expected Rows (pack(texts, model) makes them) or a"),
    (
        "expert_sensitivity",
        {"rows": ["text"]},
        "rows is ['text'] (list); expected Rows (pack(texts, model) makes them)",
    ),
    ("pack", {"texts": "text"}, "texts is 'text' (str); expected a list, each item text or (text, text)."),
    ("pack", {"texts": [("a", "b", "c")]}, "texts is [('a', 'b', 'c')] (list); expected a list, each item text or"),
]


@pytest.mark.parametrize(("name", "given", "message"), CALLS, ids=[f"{name}-{list(a)[-1]}" for name, a, _ in CALLS])
def test_an_argument_of_another_type_is_answered_in_one_sentence(name, given, message):
    function = getattr(trace_jax, name)
    kinds = {"model": "Model", "forget": "Rows", "retain": "Rows", "config": "UnlearningConfig"}
    right: dict = {key: object.__new__(getattr(trace_jax, kind)) for key, kind in kinds.items()}
    right |= {"selected": np.zeros(2), "target": np.zeros(2), "prompts": ["text"], "max_new_tokens": 2, "batch_size": 2}
    right["workdir"] = "runs/a"
    arguments = {key: value for key, value in right.items() if key in inspect.signature(function).parameters}
    with pytest.raises(TypeError) as error:
        function(**arguments | given)
    assert str(error.value).startswith(f"{name}: {message}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_a_type_that_is_checked(name):
    function = getattr(trace_jax, name)
    hints = typing.get_type_hints(run if name == "run" else inspect.unwrap(function))
    unchecked = {parameter for parameter in inspect.signature(function).parameters if fits(object(), hints[parameter])}
    assert {parameter for parameter in unchecked if hints[parameter] is not typing.Any} <= {"watch"}
    with pytest.raises(TypeError, match=r"nothing_like_it|missing"):
        function(nothing_like_it=1)


def test_one_kind_of_array_stands_for_another():
    for kind in (jax.Array, np.ndarray):
        assert fits(np.zeros(2), kind) and fits(jnp.zeros(2), kind) and not fits([0.0, 0.0], kind)


def test_every_public_name_is_there():
    assert "unlearn" in FUNCTIONS and set(trace_jax.__all__) <= set(dir(trace_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trace_jax.nothing


def test_the_walks_of_contributing_pass_files_and_names_that_are_there():
    root = Path(__file__).resolve().parents[1]
    rows = re.findall(r"^\| `([a-z_/]+\.py)` \| (.*) \|$", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for file, text in rows:
        names = set(re.findall(r"`([A-Za-z_]+)", text))
        assert names and names <= set(re.findall(r"\w+", (root / "trace_jax" / file).read_text())), file


def test_an_object_in_the_hand_is_a_line_that_says_what_a_person_wants_to_know():
    config = dataclasses.replace(tiny.CONFIG, num_layers=3, dense_layers=(0,), dense_hidden_size=8)
    params = jax.tree.map(lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype), abstract_params(config))
    count = sum(array.size for array in jax.tree.leaves(params))
    model = Model(config, params, source=Source(Path("olmoe"), "olmoe"))
    assert repr(model) == f"Model(olmoe, {count:,} parameters, 2 layers x 4 experts (+ 1 dense), top 2, float32)"
    large = Model(config, {"a": jax.ShapeDtypeStruct((6_919_161_856,), np.float32)})
    assert repr(large).startswith("Model(6.92 B parameters, 2 layers")
    rows = tiny.make_rows(4, seed=1)
    made = f"Rows(4 rows x 12, 6 documents, {rows.valid.sum()} tokens to predict)"
    assert repr(rows) == made
    counts = np.array([[30, 10, 5, 5], [10, 20, 10, 10]])
    statistics = ExpertStatistics(counts, counts / 25, 25, 2, (1, 2))
    assert "(25 tokens, 2 layers x 4 experts, top 2, most used: layer 1 expert 0 by 120.0%)" in repr(statistics)
    indices = np.random.default_rng(0).integers(0, 2, (2, 200, 1)) + np.array([0, 2])
    routed = Assignments(indices, np.arange(200) // 50, np.arange(200) // 10)
    assert repr(routed) == "Assignments(200 tokens of 4 rows, 2 layers, top 2)"
    target = np.array([[0.9, 0.1, 0.9, 0.1]] * 2)
    found = trace_jax.calibrate(routed, selected=np.array([[False] * 4, [True, False] * 2]), target=target)
    weights = RetainWeights(np.array([1.5, 0.5]), np.ones((1, 2), bool), calibration=found)
    history = [{"step": step, "forget_loss": step / 2} for step in (1, 2, 3)]
    done = Unlearned(model, 3, 9, "reached", False, [], 0.1, history=history)
    assert repr(found) == f"Calibration({found.certificate.summary})" in repr(weights)
    assert repr(done) == f"Unlearned(step 3 of 9, reached, forget_loss 0.5 -> 1.5, {model})"
    assert "constants of a step" in repr(found.for_step()) and found.for_step()._repr_html_() is None
    for thing, maps in ((statistics, 1), (found, 2)):
        page = ET.fromstring(thing._repr_html_().replace("&emsp;", " "))
        assert len(page.findall(".//svg")) == maps and page.find("code").text == repr(thing)
