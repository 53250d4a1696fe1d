"""What a compiled program needs of a chip: memory, work, exchanges, and the time that they take at least."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence

import jax

from trace_jax.plan.chips import Chip, exchange_rate
from trace_jax.plan.flops import matmul_work
from trace_jax.plan.hlo import COLLECTIVES, traffic
from trace_jax.plan.programs import Program


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind: how many run, bytes that a device sends, seconds that this takes at least."""

    kind: str
    count: int
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one device; bytes, seconds and operations of one run of the program.

    Attributes:
      parameters, optimizer: bytes of inputs that stay there between runs.  inputs: of the other inputs.
      temporaries: activations and everything else that a run allocates, its own results and code included.
      peak: all of these.  For a program that doesn't fit, what the compiler says that it would need, and the rest
        is None.
      flops: of matmuls.  memory_bytes: to and from main memory.
      seconds: at the chip's limits, of "compute", "memory" and "interconnect", each alone.
    """

    program: str
    tokens: int
    capacity: float
    compile_seconds: float
    parameters: int
    optimizer: int
    inputs: int | None
    temporaries: int | None
    peak: int
    flops: float
    memory_bytes: float | None = None
    exchanges: tuple[Exchange, ...] = ()
    unknown_loops: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.temporaries is not None and self.peak <= self.capacity

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least(self) -> float:
        """Seconds if all three overlap perfectly: the roofline."""
        return max(self.seconds.values())

    @property
    def most(self) -> float:
        """Seconds at the same rates if nothing overlaps."""
        return sum(self.seconds.values())


def predict(program: Program, chip: Chip, places: Sequence[tuple[int, ...]]) -> Prediction:
    """Compiles a traced program and reads off what it needs. `places`: where each device is (`chips.place`).

    A program whose inputs alone don't fit, or that the compiler refuses for want of memory, is one that doesn't fit.
    """
    work, start = matmul_work(program.traced.jaxpr, filled=program.filled), time.perf_counter()
    stays, compiled = program.parameters + program.optimizer + program.inputs, None
    if stays <= chip.memory:
        try:
            compiled = program.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            stays = _needed(error)
    taken = time.perf_counter() - start
    if compiled is None:
        known = program.parameters, program.optimizer
        return Prediction(program.name, program.tokens, chip.memory, taken, *known, None, None, stays, work.flops)
    memory = compiled.memory_analysis()
    moved = traffic(compiled.as_text(), len(places))
    temporaries = (
        memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    # The compiler pads small arrays to tiles, and doesn't count what a program never reads, which is there anyway.
    known = program.parameters + program.optimizer
    inputs = max(memory.argument_size_in_bytes - known, program.inputs)
    exchanges = []
    for kind in COLLECTIVES:
        found = [c for c in moved.collectives if c.kind == kind]
        if found:
            seconds = sum(c.bytes / min(exchange_rate(chip, group, places) for group in c.groups) for c in found)
            exchanges.append(Exchange(kind, sum(c.count for c in found), sum(c.bytes for c in found), seconds))
    return Prediction(
        program=program.name,
        tokens=program.tokens,
        capacity=chip.memory,
        compile_seconds=taken,
        parameters=program.parameters,
        optimizer=program.optimizer,
        inputs=inputs,
        temporaries=temporaries,
        peak=known + inputs + temporaries,
        flops=work.flops,
        memory_bytes=moved.memory_bytes,
        exchanges=tuple(exchanges),
        unknown_loops=moved.unknown_loops,
        seconds={
            "compute": work.passes / chip.flops,
            "memory": moved.memory_bytes / chip.bandwidth,
            "interconnect": sum(exchange.seconds for exchange in exchanges),
        },
    )


def _needed(error: Exception) -> int:
    """Bytes that a program would need, from the compiler's refusal; the error itself if it refused otherwise."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))
