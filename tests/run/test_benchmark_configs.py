"""Configurations of published benchmarks: every variant resolves, and every model passes a dry run at full size.

There are no weights, data are small directories of the same columns, and nothing is downloaded.
"""

import itertools
import re

import pytest
from published import METHODS

from tests.run.toy import SMALL, WORDS, save_checkpoint, write_lines
from trace_jax.data.published import PUBLISHED as DATASETS
from trace_jax.evaluation.task import TofuConfig
from trace_jax.io.files import read_json
from trace_jax.models.families import PUBLISHED
from trace_jax.run.check import dry_run
from trace_jax.run.experiment import load_config
from trace_jax.run.methods import run
from trace_jax.unlearning.objectives import RMU, AdaptiveRMU

CONFIGS = ("wmdp_cyber", "wmdp_bio", "muse_books", "muse_news", "tofu")
TEXT, PAIR = {"text": "a text of some length, " * 10}, {"question": "Who was it?", "answer": "Nobody"}
# What the sets have beside the columns that are read.
EXTRA = {"wmdp_bio": {"title": "a title", "abstract": "an abstract", "doi": "10.1/1"}}
CHOICES = {"question": "Which is it?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "virology"}
# Every column that MUSE and TOFU read.
ASKED = {**TEXT, **PAIR, "prompt": "It was", "gt": "nobody", "paraphrased_answer": "No", "perturbed_answer": ["He"]}
FILES = {
    "muse": [
        *("verbmem/forget", "privleak/forget", "privleak/holdout"),
        *(f"knowmem/{use}_{kind}" for use in ("forget", "retain") for kind in ("qa", "qa_icl")),
    ],
    "tofu": [f"{split}_perturbed/train" for split in ("forget10", "retain", "real_authors", "world_facts")],
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Overrides that put a small data set of the right columns in the place of every source of a config."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def replaced(name):
        config, overrides = load_config(f"configs/{name}.py"), {}
        for use in ("forget", "retain", "holdout"):
            if getattr(config.data, use):
                folder = tmp_path / f"{name}-{use}"
                folder.mkdir()
                row = {**(PAIR if name == "tofu" else TEXT), **EXTRA.get(name, {})}
                datasets.Dataset.from_list([row] * 5).to_parquet(folder / "train.parquet")
                overrides[f"data.{use}"] = f"huggingface:{folder}"
        for task, files in FILES.items():
            if getattr(config.evaluation, task) is not None:
                for file in files:
                    write_lines(tmp_path / task / f"{file}.jsonl", [ASKED] * 2)
                overrides[f"evaluation.{task}.data"] = str(tmp_path / task)
        for source in config.evaluation.multiple_choice.sources if config.evaluation.multiple_choice else ():
            file = write_lines(tmp_path / f"{source}.jsonl", [CHOICES] * 2)
            overrides[f"evaluation.multiple_choice.sources.{source}"] = file
        return overrides

    return replaced


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_resolves(name):
    for model, method in itertools.product(PUBLISHED, METHODS):
        config = load_config(f"configs/{name}.py:{model},{method}")
        assert config.name == f"{name}-{model}-{method}" and config.model.published == model
        assert config.methods == (("trace_rows",) if method == "trace" else ("uniform",)) == (config.export,)
    assert load_config(f"configs/{name}.py").name == f"{name}-qwen1.5-moe-a2.7b-trace"


@pytest.mark.parametrize(
    ("name", "model", "method"),
    [
        *((name, model, "trace") for name, model in zip(itertools.cycle(CONFIGS), PUBLISHED, strict=False)),
        *(("wmdp_cyber", "qwen1.5-moe-a2.7b", method) for method in METHODS if method not in ("trace", "seuf")),
        ("wmdp_cyber", "deepseek-v2-lite", "seuf"),
    ],
)
def test_a_dry_run_finds_nothing_missing_but_the_weights(name, model, method, local):
    text, (missing,), wrong = dry_run(load_config(f"configs/{name}.py:{model},{method}", local(name)))
    assert wrong == [] and f"weights: hf download {PUBLISHED[model]['_name_or_path']} --local-dir DIR" in missing
    assert ("questions and answers" if name == "tofu" else "5 texts") in text
    if method == "seuf":  # table 9 of arXiv 2411.18797: one expert and the router of its layer
        assert "(0.06%)" in text and "assumed: 1 of " in text


def test_muse_is_evaluated_and_news_has_both_series():
    assert load_config("configs/muse_books.py").evaluation.muse.data == "huggingface:muse-bench/MUSE-Books"
    assert load_config("configs/muse_news.py").series is None
    for kind, name in (("scalability", "scal"), ("sustainability", "sust")):
        config = load_config(f"configs/muse_news.py:olmoe-1b-7b,npo,{kind}")
        assert (config.name, config.series.kind) == (f"muse_news-olmoe-1b-7b-npo-{kind}", kind)
        assert config.series.forget[3] == f"huggingface:muse-bench/MUSE-News/{name}:forget_4"
        assert config.unlearning == load_config("configs/muse_news.py:olmoe-1b-7b,npo").unlearning


def test_every_benchmark_is_evaluated_on_itself():
    """At the addresses that the table of published data sets has."""
    assert load_config("configs/tofu.py").evaluation.tofu == TofuConfig("huggingface:locuslab/TOFU", "forget10")
    for topic in ("bio", "cyber"):
        config = load_config(f"configs/wmdp_{topic}.py").evaluation
        sources = {f"wmdp_{topic}": f"huggingface:cais/wmdp/wmdp-{topic}:test"}
        sources["mmlu"] = "huggingface:cais/mmlu/all:test"
        assert config.multiple_choice.sources == sources and not config.audit_text
        for source in sources.values():
            owner, name, subset, split = re.fullmatch("huggingface:(.+)/(.+)/(.+):(.+)", source).groups()
            (published,) = (p for p in DATASETS.values() if p.repository == f"{owner}/{name}")
            assert split in published.subsets[subset].rows


def test_published_numbers_reach_the_settings():
    def unlearning(variant):
        return load_config(f"configs/wmdp_cyber.py:{variant}").unlearning

    mixtral, qwen = unlearning("mixtral-8x7b,rmu"), unlearning("qwen1.5-moe-a2.7b,rmu")
    assert (mixtral.objective, mixtral.alpha, mixtral.steps) == (RMU(layer=8, steering=300.0), 1600.0, 400)
    assert (qwen.objective.steering, qwen.alpha, qwen.retain_loss.name) == (3000.0, 1200.0, "hidden")
    assert unlearning("olmoe-1b-7b,rmu").objective == AdaptiveRMU(layer=8, steering_scale=5.0)
    for model, beta in (("deepseek-v2-lite", 0.001), ("olmoe-1b-7b", 0.0225)):
        assert unlearning(f"{model},npo").objective.beta == beta
    assert load_config("configs/wmdp_cyber.py:mixtral-8x7b,rmu").data.min_length == 200


def test_two_topics_are_unlearned_by_turns_from_a_tiny_checkpoint(tmp_path):
    """The settings of a benchmark, at another size: a run, its export, and the card that names both topics."""
    marks = {"bos_token_id": None, "eos_token_id": [2, 1], "pad_token_id": 2}  # no beginning, several ends
    files = {}
    for order, name in enumerate(("bio", "cyber", "retain")):
        texts = [" ".join(WORDS[(i + j * (order + 2)) % 9] for j in range(30 + i)) for i in range(12)]
        files[name] = write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
    overrides = {
        **SMALL,
        "model": {"path": str(save_checkpoint(tmp_path / "tiny", **marks)), "dtype": "float32"},
        "data.forget": [files["bio"], files["cyber"]],
        "data.retain": files["retain"],
        "unlearning.topics": "alternating",
        **{
            f"evaluation.multiple_choice.sources.{name}": write_lines(tmp_path / f"{name}.jsonl", [CHOICES] * 3)
            for name in ("wmdp_bio", "wmdp_cyber", "mmlu")
        },
    }
    assert "export" in run(load_config("configs/wmdp_bio.py", overrides), tmp_path / "run")
    results = read_json(tmp_path / "run" / "results.json")["methods"]["trace_rows"]["measurements"]
    assert {(m["name"], m["n"]) for m in results if m.get("profile") == "lm-eval 0-shot"} == {
        ("wmdp_bio", 3), ("wmdp_cyber", 3), ("mmlu", 3), ("mmlu_virology", 3)
    }  # fmt: skip
    counts = read_json(tmp_path / "run" / "references.json")["data"]["documents"]
    assert [counts[f"train/forget{topic}"] for topic in ("", "/0", "/1")] == [24, 12, 12]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "bio.jsonl and cyber.jsonl (24 documents" in card and "while holding on to retain.jsonl" in card
