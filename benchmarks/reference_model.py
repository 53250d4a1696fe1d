"""What an unlearning run holds in memory for its reference model: live arrays, looked at in the middle of the run.

    python benchmarks/reference_model.py

Runs GradDiff with a KL retain loss, which needs the original model at every step, and counts the buffers that are
alive when the first step is taken, told apart by their addresses: the original model, the float32 weights that train
with both moments of AdamW, and the rest (batches, counters; with selected experts, their original rows). The reference
is the model that the run was given; a second copy, as other code keeps one, would be the size of the model. Prints a
line for each choice of trainable parameters and writes benchmarks/results/reference_model.json.
"""

import argparse
import dataclasses
from unittest import mock

import jax
import numpy as np
from sides import RESULTS, environment, write_row
from steps import random_batch

from trace_jax.data.rows import Rows
from trace_jax.models.architecture import ModelConfig, flatten, init_params
from trace_jax.models.model import Model
from trace_jax.routing.weights import RetainWeights
from trace_jax.unlearning import unlearn
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.step import unlearning_step
from trace_jax.unlearning.trainable import trainable_paths

LENGTH = 32


def held(arrays) -> dict[int, int]:
    """{address: bytes} of the buffers of arrays, each once."""
    return {array.unsafe_buffer_pointer(): array.nbytes for array in arrays}


def random_rows(count: int, vocab_size: int, rng: np.random.Generator) -> Rows:
    batch = random_batch(count, LENGTH, vocab_size, rng)
    return Rows(batch.tokens, batch.segments, batch.valid, np.zeros(count, np.int32))


def measure(trainable: str, config: ModelConfig) -> dict:
    """Bytes held when a run takes its first step."""
    params, rng = init_params(config, jax.random.key(0)), np.random.default_rng(0)
    original = held(jax.tree.leaves(params))
    forget, retain = (random_rows(64, config.vocab_size, rng) for _ in range(2))
    selected = np.arange(config.num_experts)[None].repeat(config.num_layers, 0) < config.num_experts // 8
    weights = RetainWeights(np.ones(retain.valid.sum()), retain.valid, selected=selected)
    training = trainable_paths(config, UnlearningConfig(trainable=trainable).trainable)
    before, found = held(jax.live_arrays()), []

    def looking(state, constants, *arguments, **settings):
        if not found:
            copies = held(constants.original.values()).keys() - original.keys()
            alive = held(jax.live_arrays())
            beside = {address: size for address, size in alive.items() if address not in before}
            changing = held(jax.tree.leaves(state))
            found.append((sum(alive[a] for a in copies), sum(beside.values()), sum(changing.values())))
        return unlearning_step(state, constants, *arguments, **settings)

    with mock.patch.object(unlearn, "unlearning_step", looking):
        unlearn.unlearn(
            Model(config, params),
            forget,
            retain,
            config=UnlearningConfig(steps=1, checkpoint_every=1, trainable=trainable, retain_loss="kl"),
            weights=weights if trainable == "selected_experts" else None,
        )
    copied, beside, changing = found[0]
    return {
        "model": sum(original.values()),
        "does_not_train": sum(leaf.nbytes for path, leaf in flatten(params).items() if path not in training),
        "copies_of_the_model": copied,
        "beside_the_model": beside,
        "weights_and_moments": changing,
        "rest": beside - changing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    config = dataclasses.replace(ModelConfig(), hidden_size=256, expert_hidden_size=256)
    results = {name: measure(name, config) for name in ("selected_experts", "experts", "all")}
    for name, row in results.items():
        print(
            f"{name:17} model {row['model']:,} bytes, {row['does_not_train']:,} of them in arrays that do not train; "
            f"copies for the reference {row['copies_of_the_model']:,} (goal 0); beside the model "
            f"{row['beside_the_model']:,}, of which weights that train and moments {row['weights_and_moments']:,}, "
            f"the rest {row['rest']:,}"
        )
    if not options.no_write:
        row = {"goal": 0, "bytes": results, "environment": environment()}
        write_row(RESULTS / "reference_model.json", "quickstart, D 256, F 256", row)


if __name__ == "__main__":
    main()
