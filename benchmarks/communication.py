"""What devices send each other in an unlearning step, against the formula in docs/scaling.md, and whether the loss is
that of one device.

    python benchmarks/communication.py [--meshes 4x1x1 1x4x1 1x1x2 2x2x2]

Devices are simulated: the bytes are read off the compiled program of each mesh (data x expert x tensor), loops
multiplied out, as what one device sends with ring algorithms. The step is GradDiff with an NLL retain loss, everything
trains, nothing but weights is computed again. Single numbers (losses, norms) are in no formula: they are the rest of
the all-reduces. Prints a line for each mesh and writes benchmarks/results/communication.json.
"""

import argparse
import dataclasses
import math

import jax
from sides import RESULTS, environment, write_row
from steps import prepared_step
from train_step import SHAPES

from trace_jax.models.architecture import ModelConfig
from trace_jax.models.grouped_matmul import resolve_implementation
from trace_jax.models.sharding import sent_bytes
from trace_jax.parallel.mesh import DATA, EXPERT, TENSOR, make_mesh
from trace_jax.plan.hlo import traffic
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.step import unlearning_step

KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def measure(model: ModelConfig, sizes: dict[str, int], rows: int, length: int) -> tuple[dict[str, float], float]:
    """(bytes that one device sends by kind, loss of the first step)."""
    devices = math.prod(sizes.values())
    mesh = make_mesh(jax.devices()[:devices], data=sizes[DATA], expert=sizes[EXPERT], tensor=sizes[TENSOR])
    step = prepared_step(UnlearningConfig(retain_loss="nll"), model, mesh, rows=rows, length=length)
    sent = dict.fromkeys(KINDS, 0.0)
    for collective in traffic(step.lower().compile().as_text(), devices).collectives:
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.bytes
    _, metrics = unlearning_step(step.state, *step.arguments, settings=step.settings, mesh=mesh)
    return sent, float(metrics["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", nargs="+", default=["4x1x1", "1x4x1", "1x1x2", "2x2x2"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--grouped-matmul", choices=("auto", "blocked", "ragged"), default="auto")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    meshes = [tuple(int(n) for n in text.split("x")) for text in options.meshes]
    jax.config.update("jax_num_cpu_devices", max(math.prod(mesh) for mesh in meshes))
    experts = resolve_implementation(options.grouped_matmul)
    config, rows, length = SHAPES["quickstart"]
    config = dataclasses.replace(config, num_layers=options.layers, grouped_matmul=options.grouped_matmul)
    _, alone = measure(config, {DATA: 1, EXPERT: 1, TENSOR: 1}, rows, length)
    results = {}
    for name, mesh in zip(options.meshes, meshes, strict=True):
        sizes = dict(zip((DATA, EXPERT, TENSOR), mesh, strict=True))
        tokens = 2 * rows * length // (sizes[DATA] * sizes[EXPERT])
        expected = sent_bytes(config, sizes, tokens)
        sent, loss = measure(config, sizes, rows, length)
        results[name] = {
            "sent": sent,
            "formula": expected,
            "rest": {kind: round(sent[kind] - expected.get(kind, 0.0), 1) for kind in sent},
            "loss_over_that_of_one_device": loss / alone,
        }
        print(f"{name}: loss {loss:.6f}, of one device {alone:.6f}; bytes sent by a device (above the formula)")
        for kind, size in sent.items():
            print(f"  {kind:15} {size:14,.0f} ({size - expected.get(kind, 0.0):+,.0f})", flush=True)
    if not options.no_write:
        row = {"rows": [rows, rows], "length": length, "meshes": results, "environment": environment()}
        write_row(RESULTS / "communication.json", f"quickstart, {options.layers} layers, {experts}", row)


if __name__ == "__main__":
    main()
