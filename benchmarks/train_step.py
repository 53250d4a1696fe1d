"""Tokens per second of the forward pass and of a training step, for each grouped_matmul implementation.

    python benchmarks/train_step.py --shape quickstart --seconds 5
    python benchmarks/train_step.py --shape 1b --dtype bfloat16 --implementations triton  # needs a GPU of 80 GB

A training step is the forward pass, the mean NLL, its gradient and Adam, one device. The forward pass ends in
the NLL of every token. Prints one line per implementation and writes benchmarks/results/train_step.json (a shape's
rows replace the earlier ones of that shape), with device, cores and versions.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import optax
from sides import RESULTS, environment, processor, write_row

from trace_jax.models.architecture import ModelConfig, init_params
from trace_jax.models.decoder import forward
from trace_jax.models.grouped_matmul import implementations, program_platform, resolve_implementation
from trace_jax.models.loss import token_nll
from trace_jax.parallel.processes import keep_freed_memory

# name: (model, batch rows, tokens a row)
SHAPES = {
    "quickstart": (ModelConfig(), 32, 128),
    "olmoe-small": (
        ModelConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=8,
            head_size=32,
            num_experts=32,
            experts_per_token=4,
            expert_hidden_size=128,
            normalize_top_k=False,
        ),
        8,
        256,
    ),
    "1b": (  # that of OLMoE-1B-7B: 1.3 of 6.9 billion parameters are active
        ModelConfig(
            vocab_size=50_304,
            hidden_size=2048,
            num_layers=16,
            num_heads=16,
            num_kv_heads=16,
            head_size=128,
            num_experts=64,
            experts_per_token=8,
            expert_hidden_size=1024,
            normalize_top_k=False,
            qk_norm="full",
        ),
        8,
        1024,
    ),
}


def make_functions(config: ModelConfig):
    """(initial state of the optimizer, jitted forward, jitted training step)."""
    optimizer = optax.adam(1e-3, b2=0.98)

    def loss(params, tokens):
        hidden = forward(params, config, tokens, collect=("hidden",)).hidden
        return jnp.mean(token_nll(params, config, hidden[:, :-1], tokens[:, 1:]))

    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    return optimizer.init, jax.jit(loss), jax.jit(step, donate_argnums=(0, 1))


def compile_timed(fn, *arguments):
    """(compiled function, seconds)."""
    start = time.perf_counter()
    compiled = fn.lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def best_time(call, seconds: float) -> float:
    """Least time of one call within `seconds` of calls: other programs on the machine only ever add."""
    call()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def measure(config: ModelConfig, rows: int, length: int, seconds: float) -> dict:
    """One row of the table: tokens/s of forward and of the training step, compile seconds."""
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, config.vocab_size)
    init, loss, step = make_functions(config)
    loss, _ = compile_timed(loss, params, tokens)
    forward_time = best_time(lambda: loss(params, tokens), seconds)
    holder = [params, init(params), None]
    step, compile_seconds = compile_timed(step, *holder[:2], tokens)

    def one_step():
        holder[:] = step(*holder[:2], tokens)
        return holder[2]

    step_time = best_time(one_step, seconds)
    return {
        "forward_tokens_per_second": round(rows * length / forward_time),
        "step_tokens_per_second": round(rows * length / step_time),
        "step_compile_seconds": round(compile_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="quickstart")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and moments")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, per number")
    names = [name for name in implementations(program_platform()) if name != "auto"]
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--plain-malloc", action="store_true", help="without keep_freed_memory")
    arguments = parser.parse_args()
    if not arguments.plain_malloc:
        keep_freed_memory()
    config, rows, length = SHAPES[arguments.shape]
    config = dataclasses.replace(config, dtype=arguments.dtype)
    shape = arguments.shape if arguments.dtype == "float32" else f"{arguments.shape}, {arguments.dtype}"
    default = resolve_implementation("auto")
    cores = environment()["cores"]
    print(f"{shape}: {rows} x {length} tokens, {processor()}, {cores} cores, jax {jax.__version__}")
    print(f"{'grouped_matmul':16}{'forward tok/s':>15}{'step tok/s':>12}{'compile s':>11}")
    results = {}
    for name in arguments.implementations:
        row = measure(dataclasses.replace(config, grouped_matmul=name), rows, length, arguments.seconds)
        results[name] = row
        forward_rate, step_rate, compile_seconds = row.values()
        note = "  (default here)" if name == default else ""
        print(f"{name:16}{forward_rate:15,}{step_rate:12,}{compile_seconds:11}{note}", flush=True)
    if not arguments.no_write:
        row = {"environment": environment(), "rows": rows, "length": length, "results": results}
        write_row(RESULTS / "train_step.json", shape, row)


if __name__ == "__main__":
    main()
