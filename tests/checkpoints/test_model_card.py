"""The card says what was done, with which numbers, and hands the licence on."""

from pathlib import Path

import pytest

from trace_jax.checkpoints.export import ModelCard, base_model_of, licence_of, readme

CARD = ModelCard(
    unlearned="The model was made to forget the presidents.",
    method="trace",
    settings={"learning_rate": 1e-5, "steps": "b | c\nd"},
    measured=[
        {"score": "verbatim memory", "before": 0.91, "after": 0.1},
        {"score": "utility", "before": 0.6, "after": 0.59},
    ],
)


def test_front_matter_and_tables():
    text = readme(CARD, base_model="org/base", licence={"license": "apache-2.0"}, note="3 of 9 tensors differ.")
    _, front, body = text.split("---\n", 2)
    assert front.splitlines() == [
        'license: "apache-2.0"',
        'library_name: "transformers"',
        'pipeline_tag: "text-generation"',
        'base_model: "org/base"',
        'tags: ["unlearning", "trace_jax"]',
    ]
    for line in (
        "The model was made to forget the presidents.",
        "Method: trace, by trace_jax.",
        "| learning_rate | 1e-05 |",
        "| steps | b \\| c d |",
        "| score | before | after |",
        "| verbatim memory | 0.91 | 0.1 |",
        "3 of 9 tensors differ.",
    ):
        assert line in body.splitlines()


def test_without_a_card_nothing_is_claimed():
    text = readme(None, base_model="base", licence={}, note="An unchanged re-export.")
    assert "An unchanged re-export." in text
    assert "unlearn" not in text.lower()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("---\nlicense: other\nlicense_name: 'x y'\nlicense_link: https://a.b/c\n---\n", 3),
        ("---\nlicense: mit\n# never closed\n", 0),
        ("# license: mit\n", 0),
        (None, 0),
    ],
)
def test_the_licence_fields_are_those_of_the_front_matter(text, want, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    found = licence_of(tmp_path)
    assert len(found) == want
    if want:
        assert found == {"license": "other", "license_name": "x y", "license_link": "https://a.b/c"}


@pytest.mark.parametrize(
    ("path", "config", "want"),
    [
        ("/cache/models--allenai--OLMoE-1B-7B-0924/snapshots/abc", {}, "allenai/OLMoE-1B-7B-0924"),
        ("/data/mine", {"_name_or_path": "org/base"}, "org/base"),
        ("/data/mine", {}, "mine"),
    ],
)
def test_the_base_model_is_named_as_well_as_can_be(path, config, want):
    assert base_model_of(Path(path), config) == want
