"""What faults are planted in: small runs, studies and series as processes of their own, and what they end in."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.tiny import write_lines

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "river",
    "stone",
    "apple",
    "cloud",
    "lamp",
    "tiger",
    "violin",
    "harbour",
    "window",
    "garden",
    "candle",
    "forest",
    "mirror",
    "ladder",
]
CONFIG = """
from ml_collections import ConfigDict

SOURCES = {name: "FOLDER/" + name + ".jsonl" for name in ("forget", "retain", "neighbour", "holdout")}
TRAINING = {"steps": (1, 2), "batch_size": 2, "learning_rate": 1e-2}
MODEL = {"num_layers": 2, "hidden_size": 16, "num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8}
PLAIN = {
    "methods": ("uniform", "trace_rows"),
    "data": {"benchmark": "text", "row_length": 32, "vocab_size": 320, **SOURCES},
    "model": {**MODEL, "num_heads": 2, "num_kv_heads": 2, "head_size": 8, "vocab_size": 320},
    "target": {"steps": 8, "batch_size": 8, "checkpoint_every": 3},
    "unlearning": {
        "steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "forget_batch_size": 4, "retain_batch_size": 4
    },
    "evaluation": {
        "batch_size": 16, "levels": (0.99,), "max_rows": 8, "max_prompts": 4, "max_gradients": 0, "bootstrap": 100
    },
}
KINDS = {
    "run": {
        "target": {"retrained": True},
        "attacks": {"relearning": TRAINING, "quantization": {"bits": (4,), "blocks": ()}, "router_swap": {}},
    },
    "short": {"methods": ("trace_rows",), "attacks": {"router_swap": {}}, "evaluation": {"patching": False}},
    "study": {
        "evaluation": {"patching": False},
        "study": {
            "methods": ("uniform", "trace_rows"), "seeds": (0, 1), "tuning_seeds": (2,), "alphas": (1.0, 4.0),
            "workers": 2,
        },
    },
    "series": {
        "methods": ("trace_rows",),
        "evaluation": {"patching": False},
        "series": {"kind": "sustainability", "forget": (SOURCES["forget"], "FOLDER/second.jsonl")},
    },
}


def get_config(kind):
    config = ConfigDict({"name": kind, **PLAIN})
    for section, values in KINDS[kind].items():
        config[section] = {**PLAIN.get(section, {}), **values} if isinstance(values, dict) else values
    return config
"""
TOLD = {"run": "results.json", "short": "results.json", "study": "study.json", "series": "series.json"}
_OF_CLOCK = ("seconds_per_step", "time", "directory")


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    said: str  # on stderr

    @property
    def problem(self) -> str:
        """What a person should not have seen; "" if all is well."""
        at = self.said.find("Traceback (most recent call last)")
        return "" if at < 0 else f"a traceback: {self.said[max(0, at - 200) : at + 1500]}"

    @property
    def sentence(self) -> str:
        lines = [line for line in self.said.splitlines() if line.startswith("trace_jax: ")]
        return lines[-1].removeprefix("trace_jax: ") if lines else ""


class Place:
    """A folder with the data and the configuration."""

    def __init__(self, folder: Path):
        self.folder, rng = folder, np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        sets = {"forget": (WORDS[:5], 12), "retain": (WORDS[4:], 60), "neighbour": (WORDS[2:8], 30)}
        sets |= {"holdout": sets["forget"], "second": (WORDS[8:12], 12)}
        for name, (words, count) in sets.items():
            write_lines(folder / f"{name}.jsonl", [{"text": " ".join(rng.choice(words, 60))} for _ in range(count)])
        (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))

    def command(self, kind: str, workdir: Path, *more: str) -> list[str]:
        config = f"--config={self.folder / 'config.py'}:{kind}"
        command = "run" if kind == "short" else kind
        return [sys.executable, "-m", "trace_jax.main", command, config, f"--workdir={workdir}", *more]

    def start(self, kind: str, workdir: Path, *more: str, **how: Any) -> subprocess.Popen:
        return start(self.command(kind, workdir, *more), **how)

    def run(self, kind: str, workdir: Path, *more: str, **how: Any) -> Ended:
        return wait(self.start(kind, workdir, *more, **how))


def environment() -> dict[str, str]:
    """One thread and no optimisation: what is tested is what happens, not how fast."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return {**os.environ, **threads, **cache, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "MPLBACKEND": "agg"}


def start(command: Sequence[str], *, first: str = "", **how: Any) -> subprocess.Popen:
    """`command` is of this interpreter; `first` are statements that the process runs before it."""
    if first:
        then = f"{first}; import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        command = [sys.executable, "-c", then, *command[1:]]
    how = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | how
    return subprocess.Popen(command, text=True, start_new_session=True, **how)


def wait(process: subprocess.Popen, seconds: float = 300.0) -> Ended:
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        said += f"\nstill running after {seconds:.0f} s"
    return Ended(process.returncode, said or "")


def plain(value: Any) -> Any:
    """Results without what a clock or a place decides."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if name not in _OF_CLOCK}
    return [plain(one) for one in value] if isinstance(value, list) else value


def numbers(kind: str, workdir: Path) -> Any:
    """What a finished run, study or series found, without what a clock or a place decides."""
    return plain(json.loads((workdir / TOLD[kind]).read_text()))


def leftovers(workdir: Path) -> list[str]:
    """Files under temporary names, of which none may stay when a run is finished."""
    found = [p for p in workdir.rglob("*") if re.search(r"\.(tmp|old)(\.|$)|orbax-checkpoint-tmp|^\.lock$", p.name)]
    return sorted(str(p.relative_to(workdir)) for p in found)
