"""A whole experiment on a toy scale."""

from trace_jax.config import resolve
from trace_jax.io.files import read_json
from trace_jax.run.experiment import ExperimentConfig


def experiment(data, **changes):
    values = {
        "name": "toy",
        "methods": ["uniform", "trace_rows"],
        "data": {
            "benchmark": "text",
            "row_length": 32,
            "vocab_size": 320,
            **{k: str(data / f"{k}.jsonl") for k in ("forget", "retain", "neighbour", "holdout")},
        },
        "model": {
            "vocab_size": 320,
            "hidden_size": 16,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_size": 8,
            "num_experts": 4,
            "expert_hidden_size": 8,
        },
        "target": {"steps": 8, "batch_size": 8, "checkpoint_every": 3},
        "unlearning": {
            "steps": 6,
            "forget_batch_size": 4,
            "retain_batch_size": 4,
            "evaluate_every": 3,
            "checkpoint_every": 2,
        },
        "evaluation": {"batch_size": 16, "max_rows": 8, "max_prompts": 4, "bootstrap": 100, "levels": [0.99]},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return resolve(ExperimentConfig, values)


def numbers(path):
    """results.json without what depends on the clock."""
    results = read_json(path / "results.json")
    for method in results["methods"].values():
        method.pop("seconds_per_step")
    return results
