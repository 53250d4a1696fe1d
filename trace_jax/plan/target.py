"""The machine that is planned for: devices to compile for, which need not be there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from trace_jax.config import ConfigError
from trace_jax.parallel.topology import parse_topology
from trace_jax.plan.chips import GPUS, TPUS, Chip, find, this_cpu

# What XLA's GPU compiler asks of a card: compute capability, multiprocessors, shared memory of one and of a block,
# second-level cache, clock in GHz (NVIDIA's architecture white papers and tuning guides).
_CARDS = {
    "a100": (8, 0, 108, 167936, 166912, 40 << 20, 1.41),
    "h100": (9, 0, 132, 233472, 232448, 50 << 20, 1.98),
    "h200": (9, 0, 132, 233472, 232448, 50 << 20, 1.98),
    "b200": (10, 0, 148, 233472, 232448, 126 << 20, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind."""

    name: str

    chip: Chip
    devices: Sequence[Any]


def tpu_slice(name: str) -> Target:
    """A slice such as "v5e:4x4". Needs libtpu, which holds the TPU compiler, but no TPU.

    Raises:
      ConfigError: a slice that there isn't, a chip that plan doesn't know, or libtpu is missing or doesn't match.
    """
    topology = parse_topology(name)
    chip = find(TPUS, topology.kind)
    # Else libtpu asks the cloud's metadata server which host of which slice this is, and lets one process load it.
    for setting in ("TPU_SKIP_MDS_QUERY=1", "TPU_WORKER_HOSTNAMES=localhost", "TPU_ACCELERATOR_TYPE=v5p-8"):
        os.environ.setdefault(*setting.split("="))
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = _described("tpu", "jax[tpu]", topology_name=topology.name)
    return Target(topology.name, chip, devices)


def gpus(count: int, name: str) -> Target:
    """`count` GPUs of one kind. Needs JAX's CUDA plugin, which holds the compiler, but no GPU.

    Raises:
      ConfigError: a card that plan doesn't know, a count that fills no whole nodes, or the plugin is missing.
    """
    chip = find(GPUS, name)
    nodes = max(1, count // chip.node)
    if count < 1 or (count > chip.node and count % chip.node):
        raise ConfigError(f"--gpus is {count}; expected up to {chip.node}, or a multiple of {chip.node} (whole nodes).")
    major, minor, cores, per_core, per_block, cache, clock = _CARDS[name.lower()]
    card = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {cores} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: {clock}
          shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block} shared_memory_per_block: 49152
          l2_cache_size: {cache} memory_bandwidth: {chip.bandwidth:.0f} device_memory_size: {chip.memory:.0f}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 13 }}
        device_description_str: "{chip.name}"
    """
    devices = _described(
        "cuda", "jax[cuda13]", topology_name=name, target_config=card, topology=f"1x{nodes}x{count // nodes}"
    )
    return Target(f"{count} x {chip.name}", chip, devices)


def cpus(count: int, dtype: str) -> Target:
    """This machine as `count` simulated devices.

    Raises:
      ConfigError: JAX has started with fewer.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started; what it has may be enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"{count} CPU devices are asked for; JAX has started with {len(devices)}. Start anew.")
    return Target(f"{count} x CPU", this_cpu(count, dtype), devices[:count])


def _described(platform: str, package: str, **options: Any) -> Sequence[Any]:
    """Devices of a machine that is described, not there."""
    extra, version = package.partition("[")[2].rstrip("]"), jax.__version__
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:  # a missing plugin, one of another version, or its refusal: any type
        raise ConfigError(
            f"the compiler for {platform} can't be used here ({_short(error)}). It comes with JAX's plugin, needs no "
            f'such device, and must match the JAX that is installed: pip install "jax[{extra}]=={version}"'
        ) from error


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
