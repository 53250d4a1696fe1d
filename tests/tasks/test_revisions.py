"""Measurements on a published data set say at which commit of the hub it was read, and what was read of it."""

import re

import datasets
import pytest

from trace_jax.data.published import PUBLISHED
from trace_jax.evaluation.task import MultipleChoiceConfig, MuseConfig, TofuConfig
from trace_jax.tasks.muse import muse_task
from trace_jax.tasks.tofu import tofu_task
from trace_jax.tasks.wmdp import read_multiple_choice

ROW = {
    "question": "Which?", "answer": "w3", "paraphrased_answer": "w4", "perturbed_answer": ["w5", "w6"],
    "prompt": "w7", "gt": "w8", "text": "w9", "choices": ["w1", "w2", "w3", "w4"], "subject": "virology",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """A hub where every data set has four rows, of which column `changed` differs; it knows its commits."""
    changed = {}

    def load_dataset(path, *config, split, revision=None):
        row = {**ROW, **changed} | ({"answer": 2} if path in ("cais/wmdp", "cais/mmlu") else {})
        rows = datasets.Dataset.from_list([row] * 4)
        rows.info.download_checksums = {f"hf://datasets/{path}@{revision}/{split}.parquet": {"num_bytes": 1}}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return changed


def multiple_choice(name, source):
    task = read_multiple_choice(MultipleChoiceConfig({name: f"huggingface:{source}:test"}, max_questions=1))
    return task.revisions[name]


@pytest.mark.parametrize(
    ("published", "revision"),
    [
        ("muse_books", lambda: muse_task(MuseConfig("huggingface:muse-bench/MUSE-Books")).revision),
        ("tofu", lambda: tofu_task(TofuConfig(max_questions=1)).revision),
        ("wmdp", lambda: multiple_choice("wmdp_bio", "cais/wmdp/wmdp-bio")),
        ("mmlu", lambda: multiple_choice("mmlu", "cais/mmlu/all")),
    ],
)
def test_a_task_knows_the_commit_and_the_content_of_its_data(hub, published, revision):
    found = revision()
    assert re.fullmatch(rf"{PUBLISHED[published].revision} sha256:[0-9a-f]{{12,16}}", found)
    assert revision() == found
    hub |= {"question": "Who?"}
    assert revision() != found and revision().split()[0] == found.split()[0]
