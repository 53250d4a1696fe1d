"""Memory and time of a step that trains 8 of 64 experts in each layer, against one that trains all of them.

    python benchmarks/selected_experts.py [--rounds 9]

Memory of the experts is what their arrays take in the state of the step (the float32 weights that train and both
moments of AdamW) and their gradient; beside it what the compiler reserves for the whole step. Both steps run on the
same rows in turns; least times are compared. Prints a line and writes benchmarks/results/selected_experts.json.
"""

import argparse
import statistics

import jax
import numpy as np
from sides import RESULTS, environment, timed, write_row
from steps import Step, prepared_step

from trace_jax.models.architecture import ModelConfig
from trace_jax.parallel.mesh import make_mesh
from trace_jax.parallel.processes import keep_freed_memory
from trace_jax.unlearning.config import UnlearningConfig

EXPERTS, SELECTED, LAYERS = 64, 8, 4
ROWS, LENGTH = 4, 128
MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=8,
    num_experts=EXPERTS,
    experts_per_token=8,
    expert_hidden_size=128,
)


def memory(step: Step) -> dict[str, int]:
    """Bytes: weights, moments and gradient of the trainable parameters, and temporaries of the compiled step."""
    weights = sum(array.nbytes for array in step.state.trainable.values())
    optimizer = sum(array.nbytes for array in jax.tree.leaves(step.state.optimizer) if array.ndim)
    analysis = step.lower().compile().memory_analysis()
    return {
        "weights": weights,
        "optimizer": optimizer,
        "gradient": weights,  # as many float32 as there are weights
        "step_arguments": analysis.argument_size_in_bytes,
        "step_temporary": analysis.temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    keep_freed_memory()
    rng, mesh = np.random.default_rng(0), make_mesh(jax.devices()[:1])
    selected = np.argsort(np.argsort(rng.random((LAYERS, EXPERTS)))) < SELECTED
    steps = {}
    for name, chosen in (("experts", None), ("selected_experts", selected)):
        config = UnlearningConfig(trainable=name, retain_loss="kl")
        steps[name] = prepared_step(config, MODEL, mesh, rows=ROWS, length=LENGTH, selected=chosen)
    bytes_of = {name: memory(step) for name, step in steps.items()}

    def take(name: str) -> float:
        def call():
            steps[name] = steps[name].run()

        return timed(call)

    for name in steps:
        take(name)
    seconds = [(take("selected_experts"), take("experts")) for _ in range(options.rounds)]
    few, every = zip(*seconds, strict=True)
    trained = {name: sizes["weights"] + sizes["optimizer"] + sizes["gradient"] for name, sizes in bytes_of.items()}
    row = {
        "what": f"training {SELECTED} of {EXPERTS} experts over training all",
        "memory_goal": SELECTED / EXPERTS,
        "memory_ratio": trained["selected_experts"] / trained["experts"],
        "time_goal": 1.0,
        "time_ratio": round(min(few) / min(every), 3),
        "time_ratio_of_medians": round(statistics.median(few) / statistics.median(every), 3),
        "bytes": bytes_of,
        "milliseconds": {
            "selected_experts": [round(1e3 * s, 1) for s in few],
            "experts": [round(1e3 * s, 1) for s in every],
        },
        "rows": [ROWS, ROWS],
        "length": LENGTH,
        "environment": environment(),
    }
    print(
        f"{SELECTED} of {EXPERTS} experts: weights that train, moments and gradient {trained['selected_experts']:,} "
        f"bytes against {trained['experts']:,}: ratio {row['memory_ratio']:.4f} (goal {row['memory_goal']}); step "
        f"{1e3 * min(few):.1f} against {1e3 * min(every):.1f} ms: ratio {row['time_ratio']} "
        f"({row['time_ratio_of_medians']} of medians; goal below 1)"
    )
    for name, sizes in bytes_of.items():
        print(
            f"  {name:18} {', '.join(f'{key} {size / 2**20:.1f} MiB' for key, size in sizes.items() if 'step' in key)}"
        )
    if not options.no_write:
        write_row(RESULTS / "selected_experts.json", f"{SELECTED} of {EXPERTS}", row)


if __name__ == "__main__":
    main()
