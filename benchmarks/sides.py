"""Both sides of a comparison with transformers: one small OLMoE with the same weights, and how it is timed."""

import datetime
import json
import os
import pathlib
import platform
import tempfile
import time

import jax
import optax

from trace_jax.io.environment import processor

RESULTS = pathlib.Path(__file__).parent / "results"
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' implementations of experts
OLMOE_SMALL = {
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


def both_sides(dtype: str = "float32"):
    """(transformers' model in this type with sdpa attention, ours with the same weights). All cores on both sides."""
    import torch
    import transformers

    from trace_jax.checkpoints.pretrained import load_pretrained

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**OLMOE_SMALL)
    theirs = transformers.OlmoeForCausalLM._from_config(
        config, attn_implementation="sdpa", dtype=getattr(torch, dtype)
    ).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load_pretrained(directory, dtype=dtype)
    return theirs, ours


def quickest_experts(theirs, call, names: tuple[str, ...] = EXPERTS) -> dict[str, float]:
    """Seconds of `call()` with each of transformers' implementations of experts; the quickest is left set."""
    seconds = {}
    for name in names:
        theirs.set_experts_implementation(name)
        call()
        seconds[name] = round(timed(call), 3)
    theirs.set_experts_implementation(min(seconds, key=lambda name: seconds[name]))
    return seconds


def timed(call) -> float:
    """Seconds of one call, its result included."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def environment(**versions: str) -> dict:
    """Where the numbers hold."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "processor": processor(),  # with its widest instructions, which these settings narrow
        **{name: os.environ[name] for name in ("XLA_FLAGS", "ATEN_CPU_CAPABILITY") if name in os.environ},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),  # above 1: other programs took part of the cores
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        **versions,
    }


def write_row(path: pathlib.Path, shape: str, row: dict) -> None:
    """Puts a shape's row into a file of results in place of its earlier one."""
    written = json.loads(path.read_text()) if path.exists() else {}
    written[shape] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=2) + "\n")
