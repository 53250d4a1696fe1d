"""Time of an unlearning step with calibrated weights (`trace`) against plain GradDiff (`uniform`), side by side.

    python benchmarks/unlearning_step.py [--steps 40] [--rounds 5]

Both run the same compiled step on the shape of the quickstart; drawing rows and finding weights may differ.
Rounds alternate, so that a machine that slows down slows both. Writes benchmarks/results/unlearning_step.json.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from trace_jax.data.rows import Rows
from trace_jax.io.environment import describe
from trace_jax.io.files import write_json
from trace_jax.models.architecture import ModelConfig, init_params
from trace_jax.models.model import Model
from trace_jax.parallel.processes import keep_freed_memory
from trace_jax.routing.weights import RetainWeights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.unlearn import unlearn

GOAL = 1.02


def random_rows(count: int, vocab_size: int, rng: np.random.Generator) -> Rows:
    tokens = rng.integers(3, vocab_size, (count, 128)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    valid[:, -1] = False
    return Rows(tokens, np.ones_like(tokens), valid, np.zeros(count, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    model_config, rng = ModelConfig(), np.random.default_rng(0)
    model = Model(model_config, init_params(model_config, jax.random.key(0)))
    forget, retain = (random_rows(n, model_config.vocab_size, rng) for n in (480, 2000))
    weights = np.where(retain.valid, rng.exponential(size=retain.tokens.shape), 0.0)
    weights *= retain.valid.sum() / weights.sum()
    calibrated = RetainWeights(weights[retain.valid], retain.valid, apply="both")
    config = UnlearningConfig(steps=options.steps, checkpoint_every=options.steps)
    seconds = {"uniform": [], "trace": []}
    for _ in range(options.rounds + 1):  # the first round compiles
        for name, given in (("uniform", None), ("trace", calibrated)):
            start = time.perf_counter()
            found = unlearn(model, forget, retain, config=config, weights=given)
            seconds[name].append(found.seconds_per_step)
            print(
                f"{name:8} {found.seconds_per_step * 1e3:8.1f} ms a step ({time.perf_counter() - start:.1f} s in all)"
            )
    ratios = [t / u for t, u in zip(seconds["trace"][1:], seconds["uniform"][1:], strict=True)]
    row = {
        "what": "TRACE step over GradDiff step", "goal": GOAL, "ratio": statistics.median(ratios), "ratios": ratios,
        "seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
        "steps": options.steps, "environment": describe(),
    }  # fmt: skip
    print(
        f"ratio {row['ratio']:.3f} (goal {GOAL}), over {options.rounds} rounds {min(ratios):.3f} to {max(ratios):.3f}"
    )
    write_json(Path(__file__).parent / "results" / "unlearning_step.json", row)


if __name__ == "__main__":
    main()
