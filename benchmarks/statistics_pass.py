"""Time of the pass that counts expert activations, against the bare forward pass without output head.

    python benchmarks/statistics_pass.py [--shape quickstart] [--layers 8] [--batches 16] [--rounds 7]

`expert_statistics` is timed as a user calls it: batches placed on the device, counts read back and checked on the
host. The forward pass gets batches that lie on the device already, and ends in the last hidden states. Both take
turns; least times are compared, since other programs on the machine only ever add, and medians of processor time, which
hardly knows of them. Nothing that is counted comes after
the last layer's router, so up to 4 layers, which are unrolled, the compiler leaves that layer's experts out and the
ratio is below 1; `--layers` takes more of them, which run in a loop that can't. Then peak memory: how much higher it is
after eight times the corpus. Prints a line and writes benchmarks/results/statistics_pass.json.
"""

import argparse
import dataclasses
import resource
import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np
from sides import RESULTS, environment, timed, write_row
from steps import random_batch
from train_step import SHAPES

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import init_params
from trace_jax.models.decoder import forward
from trace_jax.models.model import Model
from trace_jax.parallel.processes import keep_freed_memory
from trace_jax.routing.statistics import expert_statistics

GOAL = 1.05


def corpus(count: int, rows: int, length: int, vocab_size: int) -> Iterator[Batch]:
    """Batches made one at a time, so that the corpus itself takes no memory."""
    rng = np.random.default_rng(0)
    return (random_batch(rows, length, vocab_size, rng) for _ in range(count))


def both_clocks(call) -> tuple[float, float]:
    """Seconds of one call: on the clock, and of the processor."""
    start = time.process_time()
    return timed(call), time.process_time() - start


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="quickstart")
    parser.add_argument("--layers", type=int, help="in place of the shape's own number")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    keep_freed_memory()
    config, rows, length = SHAPES[options.shape]
    config = dataclasses.replace(config, num_layers=options.layers or config.num_layers)
    name = f"{options.shape}, {config.num_layers} layers"
    model = Model(config, init_params(config, jax.random.key(0)))
    batches = list(corpus(options.batches, rows, length, config.vocab_size))
    placed = jax.device_put(batches)

    @jax.jit
    def bare(params, tokens, segments):
        return forward(params, config, tokens, mask=segments, collect=("hidden",)).hidden

    def count():
        return expert_statistics(model, batches).counts

    def run_bare():
        for batch in placed:
            jax.block_until_ready(bare(model.params, batch.tokens, batch.segments))

    count(), run_bare()
    seconds = [(*both_clocks(count), *both_clocks(run_bare)) for _ in range(options.rounds)]
    ours, our_cpu, bares, bare_cpu = zip(*seconds, strict=True)
    ratio, cpu = min(ours) / min(bares), statistics.median(our_cpu) / statistics.median(bare_cpu)

    sizes, peaks = (options.batches, 8 * options.batches), []
    for size in sizes:
        expert_statistics(model, corpus(size, rows, length, config.vocab_size))
        peaks.append(peak_mib())
    tokens = options.batches * rows * length
    row = {
        "what": "statistics pass over the bare forward pass", "goal": GOAL, "ratio": round(ratio, 3),
        "ratio_of_processor_time": round(cpu, 3), "tokens_per_second": round(tokens / min(ours)),
        "bare_tokens_per_second": round(tokens / min(bares)),
        "milliseconds_a_batch": [round(1e3 * s / options.batches, 2) for s in ours],
        "bare_milliseconds_a_batch": [round(1e3 * s / options.batches, 2) for s in bares],
        "corpus_tokens": [size * rows * length for size in sizes], "peak_mib": [round(p, 1) for p in peaks],
        "rows": rows, "length": length, "environment": environment(),
    }  # fmt: skip
    print(
        f"{name}: {row['tokens_per_second']:,} tokens/s, bare forward {row['bare_tokens_per_second']:,}: "
        f"ratio {ratio:.3f} ({cpu:.3f} in processor time; goal {GOAL}); peak memory {peaks[0]:.0f} MiB, after 8 times "
        f"the corpus {peaks[1]:.0f} MiB"
    )
    if not options.no_write:
        write_row(RESULTS / "statistics_pass.json", name, row)


if __name__ == "__main__":
    main()
