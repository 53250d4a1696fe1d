"""Settings of how the work is laid out on devices. None of them changes a result, but for float rounding."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from trace_jax.config import Section, option
from trace_jax.parallel.mesh import make_mesh

REMATS = ("none", "dots", "layer")


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Section):
    """The mesh, and what a step trades between memory and time (docs/scaling.md)."""

    data: int = option(0, help="devices that split rows and store a share of every parameter; 0 = all left", minimum=0)
    expert: int = option(1, help="devices that split rows and experts", minimum=1)
    tensor: int = option(1, help="devices that split heads, hidden units and the vocabulary", minimum=1)
    remat: str = option(
        "none",
        help="what a step computes again instead of keeping: nothing, all but matrix products, or whole layers",
        choices=REMATS,
    )
    microbatches: int = option(1, help="parts of a batch whose gradients are added up one after the other", minimum=1)
    expert_buffer: float = option(
        0.0,
        help="room for tokens of a device's experts, as a multiple of the balanced load; 0 = for the worst case. "
        "Too little is an error of the step, never a dropped token",
        minimum=0.0,
    )

    def mesh(self) -> Mesh:
        """The mesh over all devices.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices.
        """
        return make_mesh(data=self.data, expert=self.expert, tensor=self.tensor)


PLAIN = ParallelConfig()
