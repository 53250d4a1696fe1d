"""Dry runs say what is missing and what is wrong; every published benchmark passes one at full size, and one a run.

There are no weights, data are small directories of the same columns, and nothing is downloaded.
"""

import itertools
import re
import sys
from types import SimpleNamespace

import pytest
from published import METHODS

from tests.run.toy import SMALL, WORDS, save_checkpoint
from tests.tiny import write_lines
from trace_jax.config import ConfigError, as_dict, resolve
from trace_jax.data import sources
from trace_jax.data.published import PUBLISHED as DATASETS
from trace_jax.evaluation.task import TofuConfig
from trace_jax.io.files import read_json, write_json
from trace_jax.main import main
from trace_jax.models.families import PUBLISHED
from trace_jax.parallel.mesh import ParallelConfig
from trace_jax.run.check import dry_run
from trace_jax.run.experiment import ExperimentConfig, load_config
from trace_jax.run.methods import run
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.objectives import RMU, AdaptiveRMU

CONFIGS = ("wmdp_cyber", "wmdp_bio", "muse_books", "muse_news", "tofu")
TEXT, PAIR = {"text": "a text of some length, " * 10}, {"question": "Who was it?", "answer": "Nobody"}
# What the sets have beside the columns that are read.
EXTRA = {"wmdp_bio": {"title": "a title", "abstract": "an abstract", "doi": "10.1/1"}}
CHOICES = {"question": "Which is it?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "virology"}
# Every column that MUSE and TOFU read.
ASKED = {**TEXT, **PAIR, "prompt": "It was", "gt": "nobody", "paraphrased_answer": "No", "perturbed_answer": ["He"]}
FILES = {"tofu": [f"{split}_perturbed/train" for split in ("forget10", "retain", "real_authors", "world_facts")]}
FILES["muse"] = [f"knowmem/{use}_{kind}" for use in ("forget", "retain") for kind in ("qa", "qa_icl")]
FILES["muse"] += ["verbmem/forget", "privleak/forget", "privleak/holdout"]


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
                rows = [{**row, **{column: f"{use} {i} {text}" for column, text in row.items()}} for i in range(5)]
                datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
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
        assert config.methods == (("trace",) if method == "trace" else ("uniform",)) == (config.export,)
        if method != "trace":
            published = load_config(f"configs/{name}.py:{model},{method}:published")
            assert published.name == f"{config.name}-published" and published.unlearning != config.unlearning
    assert load_config(f"configs/{name}.py").name == f"{name}-qwen1.5-moe-a2.7b-trace"
    with pytest.raises(ConfigError, match="no method 'trace:published'"):
        load_config(f"configs/{name}.py:olmoe-1b-7b,trace:published")


@pytest.mark.parametrize("name", CONFIGS)
def test_methods_differ_in_the_method_alone(name):
    """Not in what trains (that of SEUF is what it is), nor in the retain side, nor in rows and steps."""

    def alike(method):
        values = as_dict(load_config(f"configs/{name}.py:deepseek-v2-lite,{method}").unlearning)
        own = ("objective", "learning_rate") + (("trainable",) if method == "seuf" else ())
        return {key: value for key, value in values.items() if key not in own}

    trace = alike("trace")
    assert all(alike(method) == {key: trace[key] for key in alike(method)} for method in METHODS)
    trace, graddiff = (load_config(f"configs/{name}.py:olmoe-1b-7b,{m}") for m in ("trace", "graddiff"))
    assert trace.unlearning == graddiff.unlearning and trace.evaluation == graddiff.evaluation


@pytest.mark.parametrize(
    ("name", "model", "method"),
    [
        *((name, model, "trace") for name, model in zip(itertools.cycle(CONFIGS), PUBLISHED, strict=False)),
        *(("wmdp_cyber", "qwen1.5-moe-a2.7b", method) for method in METHODS if method not in ("trace", "seuf")),
        ("wmdp_cyber", "deepseek-v2-lite", "seuf"),
        ("wmdp_bio", "mixtral-8x7b", "rmu:published"),
        ("tofu", "qwen1.5-moe-a2.7b", "graddiff:published"),
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
        return load_config(f"configs/wmdp_cyber.py:{variant}:published").unlearning

    mixtral, qwen = unlearning("mixtral-8x7b,rmu"), unlearning("qwen1.5-moe-a2.7b,rmu")
    assert (mixtral.objective, mixtral.alpha, mixtral.steps) == (RMU(layer=8, form="wmdp", steering=300.0), 1600.0, 400)
    assert (qwen.objective.steering, qwen.alpha, qwen.retain_loss.name) == (3000.0, 1200.0, "hidden")
    assert unlearning("olmoe-1b-7b,rmu").objective == AdaptiveRMU(layer=8, form="wmdp", steering_scale=5.0)
    for model, beta in (("deepseek-v2-lite", 0.001), ("olmoe-1b-7b", 0.0225)):
        assert unlearning(f"{model},npo").objective.beta == beta
    assert load_config("configs/wmdp_cyber.py:mixtral-8x7b,rmu:published").data.min_length == 200


def test_two_topics_are_unlearned_by_turns_from_a_tiny_checkpoint(tmp_path):
    """The settings of a benchmark, at another size: a run, its export, and the card that names both topics."""
    marks = {"bos_token_id": None, "eos_token_id": [2, 1], "pad_token_id": 2}  # no beginning, several ends
    files = {}
    for order, name in enumerate(("bio", "cyber", "retain")):
        texts = [" ".join(WORDS[(i + j * (order + 2)) % 9] for j in range(30 + i)) for i in range(12)]
        files[name] = write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
    overrides = {**SMALL, "model": {"path": str(save_checkpoint(tmp_path / "tiny", **marks)), "dtype": "float32"}}
    overrides |= {"data.forget": [files["bio"], files["cyber"]], "data.retain": files["retain"]}
    for name in ("wmdp_bio", "wmdp_cyber", "mmlu"):
        asked = [{**CHOICES, "question": f"{name} {i}?", "answer": i // 2 % 4} for i in range(16)]
        file = write_lines(tmp_path / f"{name}.jsonl", asked)
        overrides[f"evaluation.multiple_choice.sources.{name}"] = file
    overrides |= {"unlearning.topics": "alternating", "evaluation.levels": (1.0,)}
    overrides["unlearning.stop_utility"] = 0.0  # is asked, and never reached
    text = str(run(load_config("configs/wmdp_bio.py", overrides), tmp_path / "run"))
    assert "export" in text and "At equal forgetting (wmdp half <= 1), test split" in text
    results = read_json(tmp_path / "run" / "results.json")
    assert results["board"]["forgetting"] == "wmdp_half" and list(results["board"]["utilities"]) == ["mmlu_half"]
    measured = results["methods"]["trace"]["measurements"]
    assert {(m["name"], m["split"], m["n"]) for m in measured if m.get("profile") == "lm-eval 0-shot"} == {
        ("wmdp_bio", "test", 16), ("wmdp_cyber", "test", 16), ("mmlu", "test", 16), ("mmlu_virology", "test", 16),
        *((f"{name}_half", split, n) for name, n in (("wmdp", 16), ("mmlu", 8)) for split in ("validation", "test")),
    }  # fmt: skip
    for row in front_rows(tmp_path / "run" / "methods" / "trace"):
        for m in row["evaluation"]:  # a rule reads the validation half
            if (m["name"], m["split"]) == ("wmdp_half", "validation"):
                assert row["forgetting"] == m["value"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "wmdp half (right: more forgotten)" in page and "mmlu half" in page
    counts = read_json(tmp_path / "run" / "references.json")["data"]["documents"]
    assert [counts[f"train/forget{topic}"] for topic in ("", "/0", "/1")] == [24, 12, 12]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "bio.jsonl and cyber.jsonl (24 documents" in card and "while holding on to retain.jsonl" in card


@pytest.fixture
def checked_of(tmp_path):
    """Makes a dry run of a published model, of a few retain texts and of a forget set that is missing, with changes."""

    def checked(data=(), **sections):
        retain = write_lines(tmp_path / "retain.jsonl", [{"text": f"public {i}"} for i in range(3)])
        data = {"benchmark": "text", "retain": retain, "forget": str(tmp_path / "forget.jsonl"), **dict(data)}
        usual = {"model": {"path": "", "published": "olmoe-1b-7b"}, "unlearning": {"trainable": "down_projections"}}
        config = resolve(ExperimentConfig, {"name": "x", "methods": ["uniform"], "data": data, **usual, **sections})
        return SimpleNamespace(**dict(zip(("text", "missing", "wrong"), dry_run(config), strict=True)))

    return checked


def test_what_is_missing_is_reported_with_what_it_must_be(checked_of):
    checked = checked_of()
    weights, forget = checked.missing
    assert "hf download allenai/OLMoE-1B-7B-0924" in weights and forget.endswith("forget.jsonl is not there")
    assert checked.wrong == []
    trained = "trainable parameters: 2,147,483,648 numbers; the model has 6,919,161,856 (31.04%)"
    for words in ("6,919,161,856 parameters", "1,282,017,280 active", trained):
        assert words in checked.text
    assert "8 forget rows and 16 retain rows of 128 tokens: 3,072 tokens" in checked.text
    assert "must have the columns text, or question and answer" in checked.text
    assert "3 documents: 3 texts" in checked.text


def test_a_length_in_epochs_waits_for_the_data(checked_of):
    settings = {"trainable": "down_projections", "epochs": 2, "schedule": "cosine"}
    assert "2 epochs of the forget rows of uniform" in checked_of(unlearning=settings).text


def test_everything_that_is_wrong_is_found_at_once(tmp_path, checked_of):
    forget = write_lines(tmp_path / "forget.jsonl", [{"txt": "x"}])
    holdout = write_lines(tmp_path / "holdout.jsonl", [{"question": "x"}])
    checked = checked_of({"forget": forget, "holdout": holdout})
    assert [line.partition(":")[0] for line in checked.wrong] == ["forget data", "holdout data"]
    assert "forget.jsonl:1: the keys are txt" in checked.wrong[0] and "the keys are question" in checked.text


def test_a_last_line_that_the_run_refuses_is_found(tmp_path, checked_of):
    texts = [{"text": f"secret {i}"} for i in range(120)]
    forget = [write_lines(tmp_path / f"{i}.jsonl", [*texts, *last]) for i, last in enumerate(([], [{"wrong": "key"}]))]
    checked = checked_of({"forget": forget})
    assert f"forget, topic 0: {forget[0]}: 120 documents: 120 texts" in checked.text
    assert "1.jsonl:121: the keys are wrong" in checked.wrong[0]


def test_text_that_attacks_read_is_looked_at(tmp_path, checked_of):
    benign = write_lines(tmp_path / "benign.jsonl", [{"text": "harmless"}])
    asked = write_lines(tmp_path / "asked.jsonl", [{"prompt": "What is it?"}])
    here = checked_of(attacks={"benign_relearning": {"source": benign}, "prompting": {}})
    assert f"attack, benign relearning: {benign}: can be used" in here.text and here.wrong == []
    checked = checked_of(attacks={"benign_relearning": {"source": "none"}, "prompting": {"paraphrases": asked}})
    assert "attack data: none is not there" in checked.missing
    assert re.match("attack data: .*asked.jsonl: row 1 has prompt; expected", checked.wrong[0])


def test_benchmarks_that_are_not_there_or_no_questions_are_found(tmp_path, checked_of):
    asked = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 4, "subject": "virology"}
    sources = {"wmdp_bio": "nowhere", "mmlu": write_lines(tmp_path / "mmlu.jsonl", [asked])}
    tasks = {"muse": {"data": "muse"}, "tofu": {"data": "tofu", "forget": "forget05"}}
    checked = checked_of(evaluation={**tasks, "multiple_choice": {"sources": sources}})
    assert checked.missing[2:] == [
        "evaluation data: muse/verbmem/forget.jsonl is not there",
        "evaluation data: tofu/forget05_perturbed/train.jsonl is not there",
        "evaluation data: nowhere is not there",
    ]
    (wrong,) = checked.wrong
    assert "mmlu.jsonl:1: expected question, choices, answer" in wrong and "evaluation, mmlu" in checked.text


def test_a_checkpoint_that_is_here_is_looked_at(tmp_path, checked_of):
    folder = tmp_path / "model"
    write_json(folder / "config.json", PUBLISHED["olmoe-1b-7b"])
    checked = checked_of(model={"path": str(folder)})
    assert len(checked.wrong) == 1 and "has neither model.safetensors" in checked.wrong[0]
    assert "6,919,161,856 parameters" in checked.text  # of its config.json
    with pytest.raises(ConfigError, match=r"is no mixtral-8x7b \(model\.published\)"):
        checked_of(model={"path": str(folder), "published": "mixtral-8x7b"})
    with pytest.raises(ConfigError, match="neither a preset"):
        checked_of(unlearning={"trainable": "no/such/parameter"})


MESH = ParallelConfig.mesh  # of all devices; runs of these tests are on one
REFUSED = {
    "the same file": ({"forget": "retain.jsonl"}, "60 of 60 forget documents also stand in retain"),
    "shared documents": ({"retain": "shared.jsonl"}, "3 of 20 forget documents also stand in retain"),
    "too few documents": ({"retain": "few.jsonl"}, "at least 3 different documents"),
    "too little text": ({"forget": "few.jsonl"}, "train/forget has 1 rows of 128 tokens, and at least 2 are needed"),
    "no such file": ({"forget": "nowhere.jsonl"}, "nowhere.jsonl is not there"),
    "no text in it": ({"forget": "empty"}, "the directory holds no file that ends in"),
    "no package": ({"forget": "huggingface:a/b"}, "huggingface:a/b: needs the package datasets: pip install datasets"),
    "no devices": ({"parallel.expert": 3}, "needs 6 devices; there are 8"),
    "a workdir of something else": ({"workdir": "empty/.."}, "is not empty and holds no run"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "empty").mkdir()
    rows = {name: [{"text": f"{name} {i} {' '.join(WORDS)}"} for i in range(60)] for name in ("secret", "public")}
    files = {
        "forget": rows["secret"][:20],
        "more": rows["secret"][20:],
        "retain": rows["public"],
        "shared": rows["public"] + rows["secret"][:3],
    }
    for name, lines in {**files, "few": [{"text": "nothing much"}] * 2}.items():
        write_lines(folder / f"{name}.jsonl", lines)
    return folder


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_run_refuses_ends_with_2(texts, monkeypatch, capsys, changes, message):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(ParallelConfig, "mesh", MESH)
    monkeypatch.chdir(texts)
    values = {"forget": "forget.jsonl", "retain": "retain.jsonl", "workdir": "new", **changes}
    arguments = ["--config", "text", "--dry-run", "--workdir", values.pop("workdir")]
    arguments += [f"--config.{name if '.' in name else f'data.{name}'}={value}" for name, value in values.items()]
    assert main(arguments) == 2
    out = capsys.readouterr().out
    assert message in out and "nothing is missing to run" not in out and not (texts / "new").exists()


RIVALS = {"unlearning": {"objective": {"name": "npo", "steering": 1.0}}}
ALIKE = {
    "a study": ("study", {"study.methods": "uniform,trace", "study.alphas": "1,4"}, "12, of 2 methods and 3 seeds", 0),
    "a series": ("series", {"series.kind": "scalability"}, "2, of 2 steps", 0),
    "a sequence": ("series", {"series.kind": "sustainability", "methods": "uniform,trace"}, "4, of 2 steps and 2 m", 0),
    "a step": ("series", {"series.kind": "scalability", "series.forget": ["few.jsonl"]}, "at least 2 are needed", 2),
    "no series": ("series", {"series": None}, "the configuration has no series: set --config.series.kind=", 2),
    "attacks in a study": ("study", {"attacks.router_swap": {}}, "a study attacks the runs whose settings tuning", 2),
    "a rival's setting": (
        "study",
        {"study.variants": {"a": RIVALS}},
        "variants.a: objective.steering would have no",
        2,
    ),
}


@pytest.mark.parametrize(("command", "changes", "message", "code"), ALIKE.values(), ids=ALIKE)
def test_studies_and_series_are_checked_as_runs_are(texts, monkeypatch, capsys, command, changes, message, code):
    monkeypatch.chdir(texts)
    usual = {"data.forget": "forget.jsonl", "data.retain": "retain.jsonl", "data.seed": 7}
    usual |= {"series.forget": ["forget.jsonl", "more.jsonl"]} if changes.get("series.kind") else {}
    given = [f"--config.{name}={value}" for name, value in {**usual, **changes}.items()]
    read, existing = [], sources._existing
    monkeypatch.setattr(sources, "_existing", lambda source: read.append(source) or existing(source))
    assert main([command, "--config", "text", "--dry-run", "--workdir", "new", *given]) == code
    assert message in capsys.readouterr().out and not (texts / "new").exists()
    if command == "study" and not code:
        assert sorted(read) == ["forget.jsonl", "retain.jsonl"], "each once"


def test_a_run_that_would_start_ends_with_0(tmp_path, capsys):
    assert main(["--config", "configs/quickstart.py", "--dry-run", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "unlearning with 480 forget rows" in out and "nothing is missing to run" in out


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"trainable": "seuf"}, 1),
        ({"trainable": {"name": "selected_experts", "experts": {"name": "affinity", "top": 3, "scope": "layer"}}}, 48),
        ({"trainable": "selected_experts"}, 128),  # the calibration's: 1 of 8 is assumed
    ],
)
def test_as_many_experts_are_assumed_to_train_as_the_rule_takes(checked_of, settings, chosen):
    assert f"assumed: {chosen} of 1,024 experts are chosen" in checked_of(unlearning=settings).text
