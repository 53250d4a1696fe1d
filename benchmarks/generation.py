"""Tokens per second of greedy generation, against transformers on the same model, prompts and threads.

    python benchmarks/generation.py --shape olmoe-small --rounds 5

transformers uses the quickest of its implementations of experts, sdpa attention and its default cache. Both sides take
turns; the medians are compared. Needs torch and transformers. Prints one line and writes
benchmarks/results/generation.json (a shape's row replaces its earlier one).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers
from train_step import environment

from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.models.generate import generate

RESULTS = pathlib.Path(__file__).parent / "results" / "generation.json"
EXPERTS = ("eager", "grouped_mm", "batched_mm")
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "eos_token_id": None,
    "pad_token_id": 0,
}

# name: (prompts, tokens a prompt, new tokens)
SHAPES = {"olmoe-small": (8, 64, 64), "verbatim": (100, 64, 128)}


def their_tokens(model, prompts: np.ndarray, new: int) -> np.ndarray:
    ids = torch.tensor(prompts, dtype=torch.int64)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, prompts.shape[1] :].numpy()


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quickest_experts(model, prompts: np.ndarray) -> tuple[str, dict[str, float]]:
    """(name, seconds of a few tokens by name)."""
    seconds = {}
    for name in EXPERTS:
        model.set_experts_implementation(name)
        their_tokens(model, prompts, 2)
        seconds[name] = round(timed(lambda: their_tokens(model, prompts, 6)), 2)
    return min(seconds, key=lambda name: seconds[name]), seconds


def measure(prompts: int, length: int, new: int, rounds: int) -> dict:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**MODEL)
    theirs = transformers.OlmoeForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load_pretrained(directory)
    ids = np.random.default_rng(0).integers(3, MODEL["vocab_size"], (prompts, length)).astype(np.int32)
    experts, choice = quickest_experts(theirs, ids)
    theirs.set_experts_implementation(experts)
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
        "transformers_experts": experts,
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
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    result = {**measure(*SHAPES[arguments.shape], arguments.rounds), "environment": environment()}
    print(
        f"{arguments.shape}: {result['tokens_per_second']:,} tokens/s, transformers {transformers.__version__} "
        f"({result['transformers_experts']}) {result['transformers_tokens_per_second']:,}: ratio {result['ratio']} "
        f"({result['ratio_of_best_rounds']} best against best), jax {jax.__version__}, {result['threads']} threads, "
        f"load {result['environment']['load_average']}, {result['equal_tokens']:.1%} of tokens equal"
    )
    if not arguments.no_write:
        written = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        written[arguments.shape] = result
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
