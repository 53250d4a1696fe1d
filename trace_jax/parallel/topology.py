"""Slices of TPU chips by name, such as v5e:4x4: how many chips and hosts, and what Google Cloud calls them.

No device is needed, and no JAX: launchers read this on a laptop.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from trace_jax.config import ConfigError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # and every ascending AxBxC of multiples of 4
_HOST = 4  # chips of a host in slices of several hosts


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A generation of chips. `unit`: what the number in an accelerator type counts per chip (cores or chips)."""

    shapes: tuple[str, ...]
    most: int
    accelerator: str
    unit: int
    software: str
    machine: str
    gke: str
    single_host: tuple[int, ...]  # chips of the slices that are one host


_KINDS = {
    "v4": _Kind(_CUBES, 4096, "v4", 2, "tpu-ubuntu2204-base", "ct4p-hightpu", "tpu-v4-podslice", (4,)),
    "v5e": _Kind(_FLAT, 256, "v5litepod", 1, "v2-alpha-tpuv5-lite", "ct5lp-hightpu", "tpu-v5-lite-podslice", (1, 4, 8)),
    "v5p": _Kind(_CUBES, 6144, "v5p", 2, "v2-alpha-tpuv5", "ct5p-hightpu", "tpu-v5p-slice", (4,)),
    "v6e": _Kind(_FLAT, 256, "v6e", 1, "v2-alpha-tpuv6e", "ct6e-standard", "tpu-v6e-slice", (1, 4, 8)),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips.

    name: "v5e:4x4", as `jax.experimental.topologies` takes it. kind: "v5e". shape: chips along each axis.
    accelerator_type: gcloud's name. software: gcloud's default runtime. machine_type, gke_accelerator, gke_topology:
    what a node pool of Google Kubernetes Engine is labelled with.
    """

    kind: str
    shape: tuple[int, ...]
    hosts: int
    accelerator_type: str
    software: str
    machine_type: str
    gke_accelerator: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.gke_topology}"

    @property
    def gke_topology(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts


def parse_topology(name: str) -> Topology:
    """The slice named KIND:SHAPE, for example "v5e:4x4" or "v5p:2x2x4".

    Raises:
      ConfigError: no such kind of chip, or a shape that it does not come in.
    """
    kind, _, text = name.strip().lower().partition(":")
    known = _KINDS.get(kind)
    if known is None:
        near = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"{name!r}: {kind or 'nothing'} is no kind of TPU known here ({', '.join(_KINDS)}){hint}")
    shape = tuple(int(n) for n in text.split("x")) if re.fullmatch(r"\d+(x\d+)*", text) else ()
    large = (
        known.shapes is _CUBES and len(shape) == 3 and list(shape) == sorted(shape) and not any(n % 4 for n in shape)
    )
    chips = math.prod(shape)
    if not (text in known.shapes or large) or not 0 < chips <= known.most:
        more = f", larger ones of multiples of 4 (4x4x8), up to {known.most} chips" if known.shapes is _CUBES else ""
        raise ConfigError(
            f"{name!r}: expected {kind}: and the shape of the slice, one of {', '.join(known.shapes)}{more}."
        )
    per_host = chips if chips in known.single_host else _HOST
    return Topology(
        kind=kind,
        shape=shape,
        hosts=chips // per_host,
        accelerator_type=f"{known.accelerator}-{chips * known.unit}",
        software=known.software,
        machine_type=f"{known.machine}-{per_host}t",
        gke_accelerator=known.gke,
    )
