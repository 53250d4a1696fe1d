"""What a chip can do at most, as its vendor states it, and how fast a group of chips exchanges data."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one chip.

    Attributes:
      flops: bf16 matmul rate, operations a second, no sparsity.
      memory: bytes of main memory that a program may use.  bandwidth: bytes a second to and from it.
      link: bytes a second in one direction: of each of a TPU's links, of a GPU's NVLinks together.
      torus: chips along an axis of a TPU slice from which on its ends are linked too; 0 for what is no torus.
      node, network: how many GPUs NVLink connects, and bytes a second of each one's network beyond them.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    torus: int = 0
    node: int = 0
    network: float = 0.0


# cloud.google.com/tpu/docs/v5e, v5p, v6e: peak compute, HBM bandwidth, and interconnect per chip, which divided by its
# ports (4, 6, 4) and two directions is a link. Memory is what the TPU compiler lets a program use of 16, 95 and 32 GB.
# An axis of a v5e or v6e slice closes to a ring at 16 chips, of v5p at 4 (a cube).
TPUS = {
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 50e9, torus=16),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, torus=4),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, torus=16),
}
# nvidia.com data sheets of the SXM boards: dense bf16, memory, bandwidth, half of the NVLink figure, which counts both
# directions. The network is that of the DGX system of the same name: one adapter of 200 or 400 Gb/s per GPU.
GPUS = {
    "a100": Chip("NVIDIA A100 80GB", 312e12, 80e9, 2039e9, 300e9, node=8, network=25e9),
    "h100": Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, node=8, network=50e9),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, node=8, network=50e9),
    "b200": Chip("NVIDIA B200", 2250e12, 180e9, 8000e9, 900e9, node=8, network=50e9),
}


def find(table: dict[str, Chip], name: str) -> Chip:
    """The chip called `name`; ConfigError with the known names otherwise."""
    if name.lower() not in table:
        raise ConfigError(f"{name!r} is no chip that plan knows; known: {', '.join(table)}.")
    return table[name.lower()]


def place(chip: Chip, device: Any) -> tuple[int, ...]:
    """Where a device is: coordinates in its TPU slice, or the number of its node."""
    return tuple(device.coords) if chip.torus else (device.id // chip.node,) if chip.node else ()


def exchange_rate(chip: Chip, group: Sequence[int], places: Sequence[tuple[int, ...]]) -> float:
    """Bytes a second that each device of a group can send to the others, all groups exchanging at once.

    A group uses the links along the axes of the TPU slice that it spans, in both directions where an axis is closed to
    a ring; GPUs of one node use NVLink, others their network. `group` holds positions in `places`.
    """
    if not chip.torus:
        return chip.link if len({places[n] for n in group}) == 1 else chip.network
    rate = 0.0
    for axis in range(len(places[0])):
        if len({places[n][axis] for n in group}) > 1:
            length = len({place[axis] for place in places})
            rate += chip.link * (1 if length % chip.torus else 2)
    return rate


def this_cpu(devices: int, dtype: str) -> Chip:
    """This machine, measured for a second, as `devices` devices that share it."""
    x = jnp.ones((1024, 1024), dtype)
    product = jax.jit(jnp.matmul)
    flops = 2 * 1024**3 / _seconds(lambda: product(x, x).block_until_ready())
    source, target = np.ones(1 << 25), np.empty(1 << 25)
    bandwidth = 2 * source.nbytes / _seconds(lambda: np.copyto(target, source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip("this CPU", flops / devices, memory / devices, bandwidth / devices, bandwidth / devices)


def _seconds(run) -> float:
    """The shortest of a few runs."""
    run()
    best, end = math.inf, time.perf_counter() + 0.1
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
