"""`verify --checkpoint DIR`: what a checkpoint holds, what is read of it, and whether it computes what it should."""

import argparse
import collections
import dataclasses
import gc
import importlib.util
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trace_jax.checkpoints.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from trace_jax.checkpoints.parts import account
from trace_jax.checkpoints.pretrained import load_pretrained, read_tokenizer
from trace_jax.io.progress import byte_size
from trace_jax.models.architecture import ModelConfig, Rope, count_params, flat_specs
from trace_jax.models.decoder import forward
from trace_jax.models.families import Family, family_of, model_config, unread_keys

TOLERANCE = 1e-3  # largest difference over the largest value
LENGTHS = (32, 21, 9)  # tokens of the rows that are compared
_SIZES = {  # not switches
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "num_experts"),
    *("experts_per_token", "expert_hidden_size", "shared_hidden_size", "dense_hidden_size", "dtype", "grouped_matmul"),
}
_KINDS = {  # of parameters, by their paths; the first that fits
    "embedding": "^(embed|head)",
    "router": "/router",
    "routed experts": "/experts/",
    "shared expert": "/shared/",
    "dense layers": "/mlp/",
    "norms": "norm",
    "attention": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command `verify`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="config.json and safetensors")
    parser.add_argument("--no-compare", action="store_true", help="without the comparison with transformers")


def main(options: argparse.Namespace) -> int:
    """The command `verify`. Returns 0 if all is well and 1 if transformers computes something else."""
    checkpoint = open_checkpoint(options.checkpoint)
    family, config = family_of(checkpoint.config), model_config(checkpoint.config, dtype="float32")
    print("\n".join(_description(checkpoint, family, config)), flush=True)
    if skipped := "--no-compare" if options.no_compare else _obstacle(config, checkpoint.config):
        print(f"\ncomparison with transformers: skipped ({skipped})\neverything is accounted for.")
        return 0
    lines, equal = _compare(checkpoint.directory, config.vocab_size)
    print("\n".join(["", *lines, "PASS" if equal else "FAIL: transformers computes something else."]))
    return 0 if equal else 1


# --- what is there ---


def _description(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> Iterable[str]:
    slots, readable, ignored = account(checkpoint, config, family)
    directory, config_json = checkpoint.directory, checkpoint.config
    used = {part.name: part for tensor in readable.values() for part in tensor.parts}
    by_type, counts = collections.Counter(), collections.Counter()
    for tensor in used.values():
        by_type[str(tensor.dtype)] += tensor.nbytes
    types = ", ".join(f"{name} {byte_size(count)}" for name, count in by_type.most_common())
    yield f"{directory}: {family.title} ({config_json['model_type']})"
    yield f"  read       {len(used)} tensors of {len(checkpoint.files)} file(s): {types}"
    yield f"  into       {len({slot.path for slot in slots})} parameters, each filled once"
    for reason in dict.fromkeys(ignored.values()):
        names = [name for name in ignored if ignored[name] == reason]
        yield f"  ignored    {len(names)} tensors, such as {names[0]}: {reason}"
    if not ignored:
        yield "  ignored    nothing"
    yield f"  quantised  {(config_json.get('quantization_config') or {}).get('quant_method', 'none')}"
    yield f"  config     keys that nobody read: {', '.join(unread_keys(config_json)) or 'none'}"
    tokenizer, special = read_tokenizer(directory, config_json)
    size = f"{tokenizer.get_vocab_size()} tokens" if tokenizer else "no tokenizer.json"
    yield f"  tokenizer  {size}; {special}"
    for path, spec in flat_specs(config).items():
        counts[next(kind for kind, pattern in _KINDS.items() if re.search(pattern, path))] += math.prod(spec.shape)
    total, active = count_params(config)
    yield f"\nparameters{'all':>23}{'active per token':>19}"
    for kind in (kind for kind in _KINDS if counts[kind]):
        inactive = total - active if kind == "routed experts" else 0
        yield f"  {kind:16}{counts[kind]:15,}{counts[kind] - inactive:19,}"
    yield f"  {'total':16}{total:15,}{active:19,}"
    yield (
        f"\n{config.num_layers} layers, {len(config.moe_layers)} of them with {config.num_experts} experts of which a "
        f"token uses {config.experts_per_token}; vocabulary {config.vocab_size}, width {config.hidden_size}, "
        f"{config.num_heads} query and {config.num_kv_heads} key heads of {config.head_size}"
    )
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    switches = {f.name: value for f, value in values.items() if f.name not in _SIZES and value != f.default}
    yield f"differs from the plain decoder in{'' if switches else ' nothing'}"
    yield from (f"  {name:20} {_words(value)}" for name, value in switches.items())


def _words(value: Any) -> str:
    """A setting in one line: of many equal entries their number, of a rotary embedding what is set."""
    if isinstance(value, Rope):
        scaled = f", {len(set(value.divisors))} different divisors" if value.divisors else ""
        return f"theta {value.theta:g}, amplitude {value.amplitude:g}{scaled}"
    if isinstance(value, tuple):
        counts = collections.Counter(value).items()
        return ", ".join(_words(entry) + (f" ({n}x)" if n > 1 else "") for entry, n in counts)
    return str(value)


# --- what it computes ---


def _obstacle(config: ModelConfig, config_json: Any) -> str:
    """Why transformers can't be asked; empty if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if config_json.get("quantization_config"):
        return "the checkpoint is quantised, which transformers computes in another way"
    needed = 5 * count_params(config)[0]  # float32, one of the two models at a time, and what is computed
    if needed > (available := _available_bytes()):
        return f"it needs {byte_size(needed)} of memory, {byte_size(available)} are free"
    return ""


def _available_bytes() -> int:
    """Memory that is free, or, where the system doesn't say, that there is."""
    if (meminfo := Path("/proc/meminfo")).exists():
        return int(re.findall(r"MemAvailable: *(\d+)", meminfo.read_text())[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _compare(directory: Path, vocab_size: int) -> tuple[list[str], bool]:
    """Lines about the differences from transformers on right-padded rows of random tokens, and whether they are within
    `TOLERANCE`. Both compute in float32; the models are in memory one after the other.
    """
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(0, vocab_size, mask.shape), 0).astype(np.int32)
    ours = _ours(directory, tokens, mask)
    gc.collect()
    theirs = _theirs(directory, tokens, mask)
    lines, equal = [f"comparison with transformers on rows of {', '.join(map(str, LENGTHS))} random tokens"], True
    for name in ("logits", "router logits"):
        a, b = (side[name][..., mask, :] for side in (ours, theirs))
        difference = float(np.abs(a - b).max()) if a.shape == b.shape and np.isfinite(a).all() else float("inf")
        relative = difference / float(np.abs(b).max())
        equal &= relative <= TOLERANCE
        lines.append(f"  {name:14} largest difference {difference:.1e}, relative {relative:.1e} (<= {TOLERANCE:.0e})")
    a, b = (np.sort(side["experts"][..., mask, :], axis=-1) for side in (ours, theirs))
    differing = int((a != b).any(axis=-1).sum()) if a.shape == b.shape else a[..., 0].size
    lines.append(f"  chosen experts {differing or 'none'} of {a[..., 0].size} sets differ")
    return lines, equal


def _ours(directory: Path, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Logits [B,S,V], router logits [L,B,S,E] and chosen experts [L,B,S,K], by name."""
    model = load_pretrained(directory)
    run = jax.jit(forward, static_argnames=("config", "collect"))
    output = run(model.params, model.config, tokens, mask=mask, collect=("logits", "router_logits", "indices"))
    router = {"router logits": output.router.logits, "experts": output.router.indices}
    return jax.device_get({"logits": output.logits, **router})


def _theirs(directory: Path, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """As `_ours`, by transformers: eager, float32. What its routers return is caught on its way."""
    import torch
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: transformers {transformers.__version__} can't load it: {error}") from None
    routers: list[Any] = []
    for module in model.modules():
        if type(module).__name__.endswith(("Router", "Gate")):
            module.register_forward_hook(lambda module, inputs, output: routers.append(output))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits
    if not routers or not all(isinstance(output, tuple) and len(output) == 3 for output in routers):
        raise CheckpointError(f"transformers {transformers.__version__}: routers return no (logits, weights, experts).")
    parts = [np.stack([x.reshape(*tokens.shape, -1).numpy() for x in part]) for part in zip(*routers, strict=True)]
    return {"logits": logits.numpy(), "router logits": parts[0], "experts": parts[2]}
