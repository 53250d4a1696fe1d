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

from trace_jax.models.architecture import ModelConfig, flat_specs
from trace_jax.models.grouped_matmul import resolve_implementation
from trace_jax.parallel.mesh import BATCH_AXES, DATA, EXPERT, RULES, TENSOR, make_mesh, spec_axes, storage_spec
from trace_jax.plan.hlo import traffic
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.step import unlearning_step

KINDS = ("all-gather", "reduce-scatter", "all-reduce")
BYTES = 4  # float32 and int32


def formula(model: ModelConfig, sizes: dict[str, int], tokens: int) -> dict[str, float]:
    """Bytes that one device sends in a step, by kind (docs/scaling.md, "Communication").

    Args:
      model: one whose dimensions the mesh divides, with grouped attention, float32.
      sizes: of the mesh axes.
      tokens: forget and retain tokens on one device.
    """
    sent = dict.fromkeys(KINDS, 0.0)
    for path, spec in flat_specs(model).items():
        inside, repeats = (spec.shape[1:], spec.shape[0]) if spec.axes[0] == "layers" else (spec.shape, 1)
        axes = spec.axes[-len(inside) :]
        own = [RULES.get(name, "") for name in axes]
        elements = math.prod(
            n // sizes[axis] if axis else n for n, axis in zip(inside, own, strict=True)
        )  # of the array as a device computes with it
        stored = storage_spec(inside, axes, sizes)
        gathered = {axis for d in range(len(axes)) for axis in spec_axes(stored, d) if axis != own[d]}
        left = [axis for axis in BATCH_AXES if axis not in (*gathered, *own)]
        size, others = math.prod(sizes[axis] for axis in gathered), math.prod(sizes[axis] for axis in left)
        gathers, scatters = {"embed": (1, 1), "head": (1, 2)}.get(path, (2, 1))
        sent["all-gather"] += repeats * gathers * (1 - 1 / size) * elements * BYTES
        sent["reduce-scatter"] += repeats * scatters * (1 - 1 / size) * elements * BYTES
        sent["all-reduce"] += repeats * 2 * (1 - 1 / others) * elements / size * BYTES
    D, K, L = model.hidden_size, model.experts_per_token, model.num_layers
    others = (sizes[EXPERT] - 1) * tokens * BYTES * L
    sent["all-gather"] += others * (2 * D + 3 * K)  # tokens, indices, gates; gradients of outputs, gates again
    if resolve_implementation(model.grouped_matmul) == "blocked":
        sent["all-gather"] += others * D  # tokens again
    sent["reduce-scatter"] += others * (2 * D + K)  # outputs; gradients of tokens and gates
    share = 2 * (1 - 1 / sizes[TENSOR]) * tokens * BYTES
    sent["all-reduce"] += share * (4 * D + K) * L  # two outputs, two inputs' gradients, gates'
    sent["all-reduce"] += share * (2 * D + 3)  # embedding, gradient of hidden states; maximum, sum, target
    return sent


def measure(model: ModelConfig, sizes: dict[str, int], rows: int, length: int) -> tuple[dict[str, float], float]:
    """(bytes that one device sends by kind, loss of the first step)."""
    devices = math.prod(sizes.values())
    mesh = make_mesh(jax.devices()[:devices], data=sizes[DATA], expert=sizes[EXPERT], tensor=sizes[TENSOR])
    step = prepared_step(UnlearningConfig(retain_loss="nll"), model, mesh, rows=rows, length=length)
    sent = dict.fromkeys(KINDS, 0.0)
    for collective in traffic(step.lower().compile().as_text(), devices)[1]:
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
        expected = formula(config, sizes, tokens)
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
