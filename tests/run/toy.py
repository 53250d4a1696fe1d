"""Whole experiments on a toy scale: on a model that is trained here, and on tiny checkpoints with a tokenizer."""

import contextlib

import jax
import pytest

from tests import tiny
from trace_jax.config import as_dict, resolve
from trace_jax.data.rows import train_tokenizer
from trace_jax.io.files import read_json
from trace_jax.parallel.mesh import ParallelConfig, make_mesh
from trace_jax.run.experiment import ExperimentConfig

VOCABULARY = 320
WORDS = ["river", "stone", "apple", "cloud", "lamp", "tiger", "violin", "harbour", "window"]
EVALUATION = {"max_rows": 8, "max_prompts": 4, "max_gradients": 0, "bootstrap": 100, "patching": False}
# For configs/huggingface.py and those like it.
SMALL = {"model.dtype": "float32", "data.row_length": 32}
SMALL |= {"unlearning.learning_rate": 1e-2, "unlearning.warmup_steps": 0}
SMALL |= {f"unlearning.{name}": 2 for name in ("steps", "evaluate_every", "checkpoint_every")}
SMALL |= {f"evaluation.{name}": value for name, value in EVALUATION.items()}


@contextlib.contextmanager
def on_one_device():
    """Runs are on the first device: their programs compile faster, and are those of a process that has no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParallelConfig, "mesh", lambda _: make_mesh(jax.devices()[:1]))
        yield


def experiment(data, **changes):
    sources = {name: str(data / f"{name}.jsonl") for name in ("forget", "retain", "neighbour", "holdout")}
    batches = {"forget_batch_size": 4, "retain_batch_size": 4}
    values = {
        "name": "toy",
        "methods": ["uniform", "trace_rows"],
        "data": {"benchmark": "text", "row_length": 32, "vocab_size": VOCABULARY, **sources},
        "model": as_dict(tiny.CONFIG) | {"vocab_size": VOCABULARY, "num_kv_heads": 2},
        "target": {"steps": 8, "batch_size": 8, "checkpoint_every": 3},
        "unlearning": {"steps": 6, **batches, "evaluate_every": 3, "checkpoint_every": 2},
        "evaluation": {"batch_size": 16, "levels": [0.99], **EVALUATION},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return resolve(ExperimentConfig, values)


def save_checkpoint(directory, family="olmoe", **changes):
    """A tiny random model of a family with a tokenizer, as published ones are."""
    import tiny_checkpoints  # needs torch

    directory.mkdir(exist_ok=True)
    model = tiny_checkpoints.build(family, vocab_size=VOCABULARY, **changes)
    tiny_checkpoints.save(model, family, directory)
    train_tokenizer([" ".join(WORDS)] * 3, VOCABULARY).save(str(directory / "tokenizer.json"))
    return directory


def measured(path, model):
    """What was measured on the test split, by name, of a method's model or of a reference."""
    results = read_json(path / "results.json")
    measurements = results["references"].get(model) or results["methods"][model]["measurements"]
    return {m["name"]: m for m in measurements if m["split"] == "test"}


def numbers(path):
    """results.json without what depends on the clock."""
    results = read_json(path / "results.json")
    for method in results["methods"].values():
        method.pop("seconds_per_step")
    return results
