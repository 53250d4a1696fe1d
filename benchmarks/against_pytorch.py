"""Tokens per second of an unlearning step and of the forward pass, against transformers + PyTorch in the same run.

    python benchmarks/against_pytorch.py --rounds 7

Both sides hold the same small OLMoE in float32 and use every core. A step is GradDiff on 8 forget and 8 retain rows of
256 tokens (NLL on both sides), forward, backward, clipping at norm 1 and AdamW; PyTorch's AdamW is the fused one. The
forward pass ends in the NLL of every token. transformers uses sdpa attention and the quickest of its implementations of
experts, but for batched_mm, which copies the weights of every token's experts: over 10 GB at this size. Single products
of the sizes that both meet are timed as well. Sides take turns; least times are compared, since other programs on the
machine only ever add. Needs torch and transformers. Prints a line each and writes
benchmarks/results/against_pytorch.json.
"""

import argparse
import statistics
from functools import partial

import jax
import numpy as np
import torch
import transformers
from sides import RESULTS, both_sides, environment, quickest_experts, timed, write_row

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import flatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.parallel.mesh import PLAIN, make_mesh, place
from trace_jax.parallel.processes import keep_freed_memory
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.losses import Constants
from trace_jax.unlearning.step import set_up, unlearning_step

ROWS, LENGTH, LEARNING_RATE = 8, 256, 1e-5
EXPERTS = ("eager", "grouped_mm")


def our_step(model, forget: np.ndarray, retain: np.ndarray):
    """A function that takes one step and returns its metrics."""
    config = UnlearningConfig(retain_loss="nll", alpha=1.0, learning_rate=LEARNING_RATE)
    mesh = make_mesh(jax.devices()[:1])
    original = place(flatten(model.params), mesh)
    settings, constants, start = set_up(original, config, model.config, selected=None, parallel=PLAIN, mesh=mesh)
    constants = Constants(original, *place(constants[1:], mesh))
    rows = place(StepRows(_batch(forget), _batch(retain), _batch(retain).valid.astype(np.float32)), mesh)
    holder = [start(constants)]

    def step():
        holder[0], metrics = unlearning_step(holder[0], constants, rows, settings=settings, mesh=mesh)
        return metrics

    return step


def _batch(tokens: np.ndarray) -> Batch:
    valid = np.ones(tokens.shape, bool)
    valid[:, -1] = False
    return Batch(tokens, np.ones_like(tokens), valid)


def their_step(model, forget: np.ndarray, retain: np.ndarray):
    """As `our_step`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ids = torch.tensor(np.concatenate([forget, retain]), dtype=torch.int64)

    def step():
        optimizer.zero_grad(set_to_none=True)
        nll = _their_nll(model, ids)
        forget_loss, retain_loss = -nll[:ROWS].mean(), nll[ROWS:].mean()
        (forget_loss + retain_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {
            "forget_loss": forget_loss.item(),
            "retain_loss": retain_loss.item(),
            "gradient_norm": norm.item(),
        }

    return step


def _their_nll(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.unflatten(0, (ids.shape[0], -1))


def compare(name: str, ours, theirs, rounds: int) -> dict:
    """One row: the sides take turns, `rounds` times."""
    seconds = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    our_seconds, their_seconds = zip(*seconds, strict=True)
    tokens = 2 * ROWS * LENGTH
    row = {
        "tokens_per_second": round(tokens / min(our_seconds)),
        "transformers_tokens_per_second": round(tokens / min(their_seconds)),
        "ratio": round(min(their_seconds) / min(our_seconds), 2),
        "ratio_of_medians": round(statistics.median(their_seconds) / statistics.median(our_seconds), 2),
        "milliseconds": [round(1e3 * s, 1) for s in our_seconds],
        "transformers_milliseconds": [round(1e3 * s, 1) for s in their_seconds],
    }
    print(
        f"{name:8} {row['tokens_per_second']:8,} tokens/s, transformers {row['transformers_tokens_per_second']:8,}: "
        f"ratio {row['ratio']} ({row['ratio_of_medians']} of medians)",
        flush=True,
    )
    return row


def products(rounds: int) -> dict[str, list[int]]:
    """GFLOP/s of both sides in single products: a turn of our experts, a group of theirs, the output head."""
    found, rng = {}, np.random.default_rng(0)
    for batch, rows, width, columns in ((4, 128, 256, 256), (1, 512, 256, 256), (1, 4096, 256, 4096)):
        x, w = (rng.standard_normal((batch, *shape), np.float32) for shape in ((rows, width), (width, columns)))
        (our_x, our_w), (their_x, their_w) = map(jax.numpy.asarray, (x, w)), map(torch.from_numpy, (x, w))
        calls = partial(jax.jit(jax.numpy.matmul), our_x, our_w), partial(torch.bmm, their_x, their_w)
        seconds = [[timed(call) for call in calls] for _ in range(10 * rounds)]
        least = np.min(seconds, axis=0)
        name = f"{batch} x [{rows}, {width}] [{width}, {columns}]"
        found[name] = [round(2e-9 * batch * rows * width * columns / s) for s in least]
        print(f"products {name:28} {found[name][0]:5} GFLOP/s, PyTorch {found[name][1]:5}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    keep_freed_memory()
    theirs, ours = both_sides()
    rng = np.random.default_rng(0)
    forget, retain = rng.integers(3, ours.config.vocab_size, (2, ROWS, LENGTH)).astype(np.int32)
    both = np.concatenate([forget, retain])
    ids = torch.tensor(both, dtype=torch.int64)

    @jax.jit
    def our_nll(params, tokens):
        hidden = forward(params, ours.config, tokens, collect=("hidden",)).hidden
        return token_nll(params, ours.config, hidden[:, :-1], tokens[:, 1:])

    @torch.no_grad()
    def their_nll():
        return _their_nll(theirs, ids)

    experts = quickest_experts(theirs, their_nll, EXPERTS)
    nll, their = np.asarray(our_nll(ours.params, both)), their_nll().numpy()
    rows = {"forward": compare("forward", lambda: our_nll(ours.params, both), their_nll, arguments.rounds)}
    rows["forward"]["largest_difference_of_nll"] = float(np.abs(nll - their).max())
    rows["forward"]["transformers_experts_seconds"] = experts
    take_ours, take_theirs = our_step(ours, forget, retain), their_step(theirs, forget, retain)
    first, their_first = take_ours(), take_theirs()
    experts = quickest_experts(theirs, take_theirs, EXPERTS)
    rows["step"] = compare("step", take_ours, take_theirs, arguments.rounds)
    rows["step"]["transformers_experts_seconds"] = experts
    for name, value in their_first.items():
        rows["step"][f"first_{name}"] = [round(float(first[name]), 6), round(value, 6)]
    row = {
        "forget": [ROWS, LENGTH],
        "retain": [ROWS, LENGTH],
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "results": rows,
        "gflops_of_products": products(arguments.rounds),
        "environment": environment(torch=torch.__version__, transformers=transformers.__version__),
    }
    if not arguments.no_write:
        write_row(RESULTS / "against_pytorch.json", "olmoe-small", row)


if __name__ == "__main__":
    main()
