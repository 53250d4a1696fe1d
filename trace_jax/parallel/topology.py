"""Slices of TPU chips by name, such as v5e:4x4: how many chips and hosts, and what Google Cloud calls them.

No device is needed, and no JAX: launchers read this on a laptop.
"""

import dataclasses
import math
import re

from trace_jax.config import ConfigError, nearest

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # and every ascending AxBxC of multiples of 4
# Of each generation: shapes, most chips, chips of slices that are one host; gcloud's accelerator type, what its number
# counts per chip (cores or chips), gcloud's default runtime; machine type and accelerator of Kubernetes node pools.
_KINDS = {
    "v4": (_CUBES, 4096, (4,), "v4", 2, "tpu-ubuntu2204-base", "ct4p-hightpu", "tpu-v4-podslice"),
    "v5e": (_FLAT, 256, (1, 4, 8), "v5litepod", 1, "v2-alpha-tpuv5-lite", "ct5lp-hightpu", "tpu-v5-lite-podslice"),
    "v5p": (_CUBES, 6144, (4,), "v5p", 2, "v2-alpha-tpuv5", "ct5p-hightpu", "tpu-v5p-slice"),
    "v6e": (_FLAT, 256, (1, 4, 8), "v6e", 1, "v2-alpha-tpuv6e", "ct6e-standard", "tpu-v6e-slice"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips."""

    kind: str
    shape: str
    chips: int
    chips_per_host: int
    accelerator_type: str  # gcloud's name
    software: str  # gcloud's default runtime
    machine_type: str  # with the next and `shape`, the labels of a node pool of Google Kubernetes Engine
    gke_accelerator: str

    name = property(lambda self: f"{self.kind}:{self.shape}")  # as `jax.experimental.topologies` takes it
    hosts = property(lambda self: self.chips // self.chips_per_host)


def parse_topology(name: str) -> Topology:
    """The slice named KIND:SHAPE, for example "v5e:4x4" or "v5p:2x2x4"."""
    kind, _, text = name.strip().lower().partition(":")
    if kind not in _KINDS:
        near = nearest(kind, _KINDS)
        raise ConfigError(f"{name!r}: {kind or 'nothing'} is no kind of TPU known here ({', '.join(_KINDS)}){near}")
    shapes, most, single_host, accelerator, unit, software, machine, gke = _KINDS[kind]
    shape = [int(n) for n in text.split("x")] if re.fullmatch(r"\d+(x\d+)*", text) else []
    large = shapes is _CUBES and len(shape) == 3 and shape == sorted(shape) and not any(n % 4 for n in shape)
    chips = math.prod(shape)
    if not (text in shapes or large) or not 0 < chips <= most:
        more = f", larger ones of multiples of 4 (4x4x8), up to {most} chips" if shapes is _CUBES else ""
        raise ConfigError(f"{name!r}: expected {kind}: and the shape of the slice, one of {', '.join(shapes)}{more}.")
    per_host = chips if chips in single_host else 4  # of a host in slices of several
    names = f"{accelerator}-{chips * unit}", software, f"{machine}-{per_host}t", gke
    return Topology(kind, "x".join(map(str, shape)), chips, per_host, *names)
