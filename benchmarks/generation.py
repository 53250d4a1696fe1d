"""Tokens per second of greedy generation, against transformers on the same model, prompts and threads.

    python benchmarks/generation.py --shape olmoe-small --rounds 5

transformers uses the quickest of its implementations of experts, sdpa attention and its default cache. Both sides take
turns; the medians are compared. Needs torch and transformers. Prints one line and writes
benchmarks/results/generation.json (a shape's row replaces its earlier one).
"""

import argparse
import statistics

import jax
import numpy as np
import torch
import transformers
from sides import OLMOE_SMALL, RESULTS, both_sides, environment, quickest_experts, timed, write_row

from trace_jax.models.generate import generate

# name: (prompts, tokens a prompt, new tokens)
SHAPES = {"olmoe-small": (8, 64, 64), "verbatim": (100, 64, 128)}


def their_tokens(model, prompts: np.ndarray, new: int) -> np.ndarray:
    ids = torch.tensor(prompts, dtype=torch.int64)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, prompts.shape[1] :].numpy()


def measure(prompts: int, length: int, new: int, rounds: int) -> dict:
    theirs, ours = both_sides()
    ids = np.random.default_rng(0).integers(3, OLMOE_SMALL["vocab_size"], (prompts, length)).astype(np.int32)
    choice = quickest_experts(theirs, lambda: their_tokens(theirs, ids, 6))
    compile_seconds = timed(lambda: generate(ours.params, ours.config, ids, max_new_tokens=new))
    our_seconds, their_seconds = [], []
    for _ in range(rounds):
        our_seconds.append(timed(lambda: generate(ours.params, ours.config, ids, max_new_tokens=new)))
        their_seconds.append(timed(lambda: their_tokens(theirs, ids, new)))
    same = generate(ours.params, ours.config, ids, max_new_tokens=new) == their_tokens(theirs, ids, new)
    rate, their_rate = (prompts * new / statistics.median(s) for s in (our_seconds, their_seconds))
    return {
        "prompts": prompts,
        "prompt_tokens": length,
        "new_tokens": new,
        "tokens_per_second": round(rate),
        "transformers_tokens_per_second": round(their_rate),
        "ratio": round(rate / their_rate, 2),
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    result = {**measure(*SHAPES[arguments.shape], arguments.rounds), "environment": environment()}
    print(
        f"{arguments.shape}: {result['tokens_per_second']:,} tokens/s, transformers {transformers.__version__} "
        f"({result['transformers_experts']}) {result['transformers_tokens_per_second']:,}: ratio {result['ratio']} "
        f"({result['ratio_of_best_rounds']} best against best), jax {jax.__version__}, {result['threads']} threads, "
        f"load {result['environment']['load_average']}, {result['equal_tokens']:.1%} of tokens equal"
    )
    if not arguments.no_write:
        write_row(RESULTS / "generation.json", arguments.shape, result)


if __name__ == "__main__":
    main()
