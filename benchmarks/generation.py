"""Tokens per second of greedy generation, against transformers on the same model, prompts and threads.

    python benchmarks/generation.py --shape olmoe-small --dtype bfloat16 --rounds 5

transformers uses the quickest of its implementations of experts, sdpa attention and its default cache. Both sides take
turns; the medians are compared. The bound is what the memory allows: every step reads the weights that all tokens
share, the head, the experts that any of the rows chose, and the cache, at the speed with which this machine sums an
array that no cache holds. Needs torch and transformers. Prints two lines and writes
benchmarks/results/generation.json (a row replaces its earlier one).
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from sides import OLMOE_SMALL, RESULTS, both_sides, environment, quickest_experts, timed, write_row

from trace_jax.models.architecture import flatten
from trace_jax.models.decoder import forward
from trace_jax.models.generate import generate, padded_size
from trace_jax.models.layers import init_cache
from trace_jax.models.model import Model

# name: (prompts, tokens a prompt, new tokens)
SHAPES = {"olmoe-small": (8, 64, 64), "verbatim": (100, 64, 128)}


def their_tokens(model, prompts: np.ndarray, new: int) -> np.ndarray:
    ids = torch.tensor(prompts, dtype=torch.int64)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, prompts.shape[1] :].numpy()


def bandwidth() -> float:
    """Bytes a second at which all cores together read an array of 1 GB: the best of ten."""
    total, array = jax.jit(jnp.sum), jnp.ones(2**28, jnp.float32)
    return array.nbytes / min(timed(lambda: total(array)) for _ in range(11))


def step_bytes(ours: Model, prompt: np.ndarray, written: np.ndarray) -> dict[str, float]:
    """What the mean step of decoding has to read, by kind."""
    config, (rows, length) = ours.config, prompt.shape
    texts = np.concatenate([prompt, written], axis=1)
    chosen = np.asarray(forward(ours.params, config, texts, collect=("indices",)).router.indices)[:, :, length - 1 : -1]
    union = [[len(np.unique(layer[:, step])) for step in range(layer.shape[1])] for layer in chosen]
    sizes = {path: leaf.nbytes for path, leaf in flatten(ours.params).items() if path != "embed"}
    of_experts = sum(size for path, size in sizes.items() if "/experts/" in path)
    cache = jax.eval_shape(lambda: init_cache(config, rows, padded_size(texts.shape[1])))
    return {
        "shared weights": sum(sizes.values()) - of_experts - sizes["head"],
        "head": sizes["head"],
        "chosen experts": of_experts * float(np.mean(union)) / config.num_experts,
        "cache": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.k, cache.v))),
    }


def measure(prompts: int, length: int, new: int, rounds: int, dtype: str) -> dict:
    theirs, ours = both_sides(dtype)
    ids = np.random.default_rng(0).integers(3, OLMOE_SMALL["vocab_size"], (prompts, length)).astype(np.int32)
    choice = quickest_experts(theirs, lambda: their_tokens(theirs, ids, 6))
    compile_seconds = timed(lambda: generate(ours.params, ours.config, ids, max_new_tokens=new))
    our_seconds, their_seconds = [], []
    for _ in range(rounds):
        our_seconds.append(timed(lambda: generate(ours.params, ours.config, ids, max_new_tokens=new)))
        their_seconds.append(timed(lambda: their_tokens(theirs, ids, new)))
    written = generate(ours.params, ours.config, ids, max_new_tokens=new)
    same, read, speed = written == their_tokens(theirs, ids, new), step_bytes(ours, ids, written), bandwidth()
    bound = prompts * speed / sum(read.values())
    rate, their_rate = (prompts * new / statistics.median(s) for s in (our_seconds, their_seconds))
    return {
        "prompts": prompts,
        "prompt_tokens": length,
        "new_tokens": new,
        "tokens_per_second": round(rate),
        "transformers_tokens_per_second": round(their_rate),
        "ratio": round(rate / their_rate, 2),
        "bound_tokens_per_second": round(bound),
        "share_of_bound": round(rate / bound, 3),
        "step_mb": {name: round(size / 1e6, 2) for name, size in read.items()},
        "bandwidth_gb_s": round(speed / 1e9, 1),
        "ratio_of_best_rounds": round(min(their_seconds) / min(our_seconds), 2),
        "rounds": rounds,
        "first_call_seconds": round(compile_seconds, 1),
        "equal_tokens": round(float(same.mean()), 4),
        "transformers_experts": min(choice, key=lambda name: choice[name]),
        "transformers_experts_seconds": choice,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    name = arguments.shape if arguments.dtype == "float32" else f"{arguments.shape}, {arguments.dtype}"
    measured = measure(*SHAPES[arguments.shape], arguments.rounds, arguments.dtype)
    result = {**measured, "environment": environment()}
    print(
        f"{name}: {result['tokens_per_second']:,} tokens/s, transformers {transformers.__version__} "
        f"({result['transformers_experts']}) {result['transformers_tokens_per_second']:,}: ratio {result['ratio']} "
        f"({result['ratio_of_best_rounds']} best against best), jax {jax.__version__}, {result['threads']} threads, "
        f"load {result['environment']['load_average']}, {result['equal_tokens']:.1%} of tokens equal"
    )
    parts = ", ".join(f"{part} {size:.1f}" for part, size in result["step_mb"].items())
    print(
        f"{result['share_of_bound']:.0%} of {result['bound_tokens_per_second']:,} tokens/s, the bound by memory: "
        f"{result['bandwidth_gb_s']} GB/s, MB a step: {parts}"
    )
    if not arguments.no_write:
        write_row(RESULTS / "generation.json", name, result)


if __name__ == "__main__":
    main()
