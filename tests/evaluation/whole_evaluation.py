"""Everything that can be evaluated, small: probes with all that a text benchmark has, MUSE, TOFU, WMDP and MMLU."""

import dataclasses
import json

import jax
import numpy as np

from trace_jax.data.rows import train_tokenizer
from trace_jax.evaluation.config import EvaluationConfig, MultipleChoiceConfig, MuseConfig, TofuConfig
from trace_jax.models.arrays import init_params
from trace_jax.models.model import Model
from trace_jax.tasks.benchmarks import build_tasks

WORDS = ["river", "stone", "apple", "cloud", "tiger", "amber", "lemon", "metal"]  # of one length: few programs
VOCABULARY = 300


def write_benchmarks(directory, *, count=4, seed=0):
    """The sections of an evaluation on `count` made-up items of every set."""
    rng = np.random.default_rng(seed)

    def words(number):
        return " ".join(rng.choice(WORDS, number))

    def write(name, make, several=count):
        file = directory / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(make(i)) + "\n" for i in range(several)))
        return str(file)

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
    return {
        "muse": MuseConfig(str(directory / "muse")),
        "tofu": TofuConfig(str(directory / "tofu"), max_new_tokens=6),
        "multiple_choice": MultipleChoiceConfig(sources),
    }


def whole_evaluator(tiny, sections, *, splits=("validation", "test"), mesh=None, batch_size=8):
    """An evaluator of all of it; `tiny` as in conftest.py."""
    subjects = ("forget", "neighbour", "general")
    probes = {
        split: tiny.make_probes(50 * place, questions=("forget", "neighbour"), text=subjects)
        for place, split in enumerate(splits)
    }
    settings = EvaluationConfig(batch_size=batch_size, max_gradients=2, bootstrap=200, **sections)
    return tiny.make_evaluator(settings, probes, benchmark="presidents", tasks=build_tasks(settings), mesh=mesh)


def make_model(tiny, seed):
    """Parameters sharp enough that what is likeliest is so clearly."""
    config = dataclasses.replace(tiny.config, vocab_size=VOCABULARY)
    params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(seed)))
    return Model(config, params, train_tokenizer([" ".join(WORDS)] * 3, VOCABULARY))
