"""The machine that is planned for: devices to compile for, which need not be there, and what each can do at most."""

import contextlib
import dataclasses
import math
import os
import timeit
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from trace_jax.config import ConfigError
from trace_jax.parallel.topology import parse_topology

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one chip, as its vendor states them."""

    name: str
    flops: float  # bf16 matmul rate, operations a second, no sparsity
    memory: float  # bytes of main memory that a program may use
    bandwidth: float  # bytes a second to and from it
    link: float  # bytes a second in one direction: of each of a TPU's links, of a GPU's NVLinks together
    torus: int = 0  # chips along an axis of a TPU slice from which on its ends are linked too; 0 for what is no torus
    node: int = 0  # how many GPUs NVLink connects
    network: float = 0.0  # bytes a second of each GPU's network beyond them


class Target(NamedTuple):
    """Devices of one kind."""

    name: str
    chip: Chip
    devices: Sequence[Any]


# cloud.google.com/tpu/docs/v5e, v5p, v6e: peak compute, HBM bandwidth, and interconnect per chip, which divided by its
# ports (4, 6, 4) and two directions is a link. Memory is what the TPU compiler lets a program use of 16, 95 and 32 GB.
# An axis of a v5e or v6e slice closes to a ring at 16 chips, of v5p at 4 (a cube).
TPUS = {
    "v5e": Chip("TPU v5e", 197e12, 15.75 * _GIB, 819e9, 50e9, torus=16),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * _GIB, 2765e9, 100e9, torus=4),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * _GIB, 1638e9, 100e9, torus=16),
}
# nvidia.com data sheets of the SXM boards: dense bf16, memory, bandwidth, half of the NVLink figure, which counts both
# directions. The network is that of the DGX system of the same name: one adapter of 200 or 400 Gb/s per GPU.
GPUS = {
    "a100": Chip("NVIDIA A100 80GB", 312e12, 80e9, 2039e9, 300e9, node=8, network=25e9),
    "h100": Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, node=8, network=50e9),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, node=8, network=50e9),
    "b200": Chip("NVIDIA B200", 2250e12, 180e9, 8000e9, 900e9, node=8, network=50e9),
}
# By a part of the name that JAX has for a device ("TPU v5 lite"), the special ones first.
_SEEN_AS = {"v5 lite": TPUS["v5e"], "v5e": TPUS["v5e"], "v5": TPUS["v5p"], "v6": TPUS["v6e"], **GPUS}
# What XLA's GPU compiler asks of a card: compute capability, multiprocessors, shared memory of one and of a block,
# second-level cache, clock in GHz (NVIDIA's architecture white papers and tuning guides).
_CARDS = {
    "a100": (8, 0, 108, 167936, 166912, 40 << 20, 1.41),
    "h100": (9, 0, 132, 233472, 232448, 50 << 20, 1.98),
    "h200": (9, 0, 132, 233472, 232448, 50 << 20, 1.98),
    "b200": (10, 0, 148, 233472, 232448, 126 << 20, 1.965),
}


def exchange_rate(chip: Chip, group: Sequence[int], places: Sequence[tuple[int, ...]]) -> float:
    """Bytes a second that each device of a group can send to the others, all groups exchanging at once.

    `group` holds positions in `places`, coordinates in a TPU slice or numbers of nodes. It uses the links along the
    axes that it spans, both ways where an axis is closed to a ring; GPUs of one node use NVLink, others their network.
    """
    if not chip.torus:
        return chip.link if len({places[n] for n in group}) == 1 else chip.network
    rate = 0.0
    for axis in range(len(places[0])):
        if len({places[n][axis] for n in group}) > 1:
            length = len({place[axis] for place in places})
            rate += chip.link * (1 if length % chip.torus else 2)
    return rate


def tpu_slice(name: str) -> Target:
    """A slice such as "v5e:4x4". Needs libtpu, which holds the TPU compiler, but no TPU; ConfigError without it."""
    topology = parse_topology(name)
    chip = _find(TPUS, topology.kind)
    # Else libtpu asks the cloud's metadata server which host of which slice this is, and lets one process load it.
    for setting in ("TPU_SKIP_MDS_QUERY=1", "TPU_WORKER_HOSTNAMES=localhost", "TPU_ACCELERATOR_TYPE=v5p-8"):
        os.environ.setdefault(*setting.split("="))
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}  # else libtpu takes hosts of 2 x 2
    return Target(topology.name, chip, _described("tpu", "jax[tpu]", topology_name=topology.name, **one))


def gpus(count: int, name: str) -> Target:
    """`count` GPUs of one kind. Needs JAX's CUDA plugin, which holds the compiler, but no GPU; ConfigError without it,
    or where they don't fill whole nodes.
    """
    chip = _find(GPUS, name)
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
    shape = f"1x{nodes}x{count // nodes}"
    devices = _described("cuda", "jax[cuda13]", topology_name=name, target_config=card, topology=shape)
    return Target(f"{count} x {chip.name}", chip, devices)


def cpus(count: int, dtype: str) -> Target:
    """This machine, measured for a second, as `count` simulated devices that share it."""
    if count < 1:
        raise ConfigError(f"--cpu is {count}; expected at least 1.")
    with contextlib.suppress(RuntimeError):  # JAX has started; what it has may be enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"{count} CPU devices are asked for; JAX has started with {len(devices)}. Start anew.")
    x, product = jnp.ones((1024, 1024), dtype), jax.jit(jnp.matmul)
    flops = 2 * 1024**3 / min(timeit.repeat(lambda: product(x, x).block_until_ready(), number=1)) / count
    source, copy = np.ones(1 << 25), np.empty(1 << 25)
    bandwidth = 2 * source.nbytes / min(timeit.repeat(lambda: np.copyto(copy, source), number=1)) / count
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    return Target(f"{count} x CPU", Chip("this CPU", flops, memory, bandwidth, bandwidth), devices[:count])


def here(dtype: str) -> Target:
    """The devices that JAX has here, with the memory that it lets a program use of each. Of an accelerator that plan
    doesn't know no time is predicted (0). `dtype`: what a CPU is measured in.
    """
    devices = jax.devices()
    kind, memory = devices[0].device_kind, (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:
        return cpus(len(devices), dtype)
    chip = next((chip for part, chip in _SEEN_AS.items() if part in kind.lower()), None)
    chip = chip or Chip(kind, math.inf, memory, math.inf, math.inf)
    return Target(f"{len(devices)} x {kind}", dataclasses.replace(chip, name=kind, memory=memory), devices)


def _find(table: dict[str, Chip], name: str) -> Chip:
    if name.lower() not in table:
        raise ConfigError(f"{name!r} is no chip that plan knows; known: {', '.join(table)}.")
    return table[name.lower()]


def _described(platform: str, package: str, **options: Any) -> Sequence[Any]:
    """Devices of a machine that is described, not there."""
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:  # a missing plugin, one of another version, or its refusal: any type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"the compiler for {platform} can't be used here ({reason}). It comes with JAX's plugin, needs no such "
            f'device, and must match the JAX that is installed: pip install "{package}=={jax.__version__}"'
        ) from error
