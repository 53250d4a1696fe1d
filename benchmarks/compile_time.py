"""Seconds to trace and compile the unlearning step, against the number of layers.

    python benchmarks/compile_time.py [--layers 2 4 8 16 32] [--shape quickstart]

Up to 4 layers are unrolled; more run in a loop whose body is compiled once. Processor seconds stand beside those on the
clock: they hold also where other programs take part of the cores. Prints a line for each number of layers and writes
benchmarks/results/compile_time.json.
"""

import argparse
import dataclasses
import time

import jax
from sides import RESULTS, environment, write_row
from steps import prepared_step
from train_step import SHAPES

from trace_jax.parallel.mesh import make_mesh
from trace_jax.unlearning.config import UnlearningConfig

GOAL = 20.0


def measure(shape: str, layers: int) -> dict[str, float]:
    """Of one step: seconds on the clock to trace and to compile, processor seconds of both, size of the program."""
    config, rows, length = SHAPES[shape]
    model, mesh = dataclasses.replace(config, num_layers=layers), make_mesh(jax.devices()[:1])
    step = prepared_step(UnlearningConfig(), model, mesh, rows=rows, length=length)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    lowered = step.lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end, end_cpu = time.perf_counter(), time.process_time()
    return {
        "trace_seconds": round(traced - begin, 2),
        "compile_seconds": round(end - traced, 2),
        "processor_seconds": round(end_cpu - begin_cpu, 2),
        "program_lines": len(compiled.as_text().splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="quickstart")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    measure(options.shape, 1)  # the first compilation of a process also sets the compiler up
    rows = {}
    print(f"{options.shape}: layers, seconds to trace, to compile (processor seconds of both), lines of the program")
    for layers in options.layers:
        rows[layers] = row = measure(options.shape, layers)
        traced, compiled, cpu, lines = row.values()
        print(f"{layers:4} {traced:8.2f} {compiled:8.2f} ({cpu:.2f}) {lines:8,}", flush=True)
    if not options.no_write:
        row = {"goal_seconds": GOAL, "layers": rows, "environment": environment()}
        write_row(RESULTS / "compile_time.json", options.shape, row)


if __name__ == "__main__":
    main()
