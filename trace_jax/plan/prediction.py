"""What a program needs of a chip: memory, work, exchanges, and the time that they take at least."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from trace_jax.io.progress import aligned, byte_size
from trace_jax.plan.hlo import COLLECTIVES, traffic
from trace_jax.plan.machine import Chip, exchange_rate
from trace_jax.plan.programs import Program

_PASSES = {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}
_BOUNDS = {"compute": "matmul rate", "memory": "memory bandwidth", "interconnect": "interconnect"}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one device; bytes, seconds and operations of one run of the program.

    Attributes:
      parameters, optimizer: bytes of inputs that stay there between runs.  inputs: of the other inputs.
      temporaries: activations and everything else that a run allocates, its own results and code included.
      peak: all of these.  For a program that doesn't fit, what the compiler says that it would need, and the rest
        is None.
      flops: of matmuls.  memory_bytes: to and from main memory.
      exchanges: of each kind of collective, its "kind", the "count" that runs, "bytes" that a device sends, and the
        "seconds" that this takes at least.
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
    exchanges: tuple[dict[str, Any], ...] = ()
    unknown_loops: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.temporaries is not None and self.peak <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """Every number, as the plan writes it down."""
        times = {"bound": self.bound, "least": self.least, "most": self.most} if self.seconds else {}
        return {**dataclasses.asdict(self), "fits": self.fits, **times}

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
        """Seconds at the same rates without overlap, an upper bound."""
        return sum(self.seconds.values())


def predict(program: Program, chip: Chip, devices: Sequence[Any]) -> Prediction:
    """Compiles a traced program for the devices of a mesh and reads off what it needs.

    A program whose inputs alone don't fit, or that the compiler refuses for want of memory, is one that doesn't fit.
    """
    (flops, passes), start = matmul_work(program.traced.jaxpr, filled=program.filled).tolist(), time.perf_counter()
    resident = program.parameters + program.optimizer
    peak, compiled = resident + program.inputs, None
    if peak <= chip.memory:
        try:
            compiled = program.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            peak = _needed(error)
    first = (program.name, program.tokens, chip.memory, time.perf_counter() - start)
    if compiled is None:
        return Prediction(*first, program.parameters, program.optimizer, None, None, peak, flops)
    memory, moved = compiled.memory_analysis(), traffic(compiled.as_text(), len(devices))
    temporaries = (
        memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    # The compiler pads small arrays to tiles, and doesn't count what a program never reads, which is there anyway.
    inputs = max(memory.argument_size_in_bytes - resident, program.inputs)
    places = [tuple(d.coords) if chip.torus else (d.id // chip.node,) if chip.node else () for d in devices]
    exchanges = []
    for kind in COLLECTIVES:
        if alike := [c for c in moved.collectives if c.kind == kind]:
            seconds = sum(c.bytes / min(exchange_rate(chip, group, places) for group in c.groups) for c in alike)
            count, sent = sum(c.count for c in alike), sum(c.bytes for c in alike)
            exchanges.append({"kind": kind, "count": count, "bytes": sent, "seconds": seconds})
    times = {
        "compute": passes / chip.flops,
        "memory": moved.memory_bytes / chip.bandwidth,
        "interconnect": sum(exchange["seconds"] for exchange in exchanges),
    }
    stays = program.parameters, program.optimizer, inputs, temporaries, resident + inputs + temporaries
    return Prediction(*first, *stays, flops, moved.memory_bytes, tuple(exchanges), moved.unknown_loops, times)


def _needed(error: Exception) -> int:
    """Bytes that a program would need, from the compiler's refusal; the error itself if it refused otherwise."""
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
        raise error
    number, unit = (part for part in match.groups() if part)
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def matmul_work(jaxpr: Any, *, filled: float = 1.0) -> np.ndarray:
    """f64 [2]: floating-point operations of matmuls, and the same in units of the chip's bf16 rate. There a float32
    matmul at full precision counts six times, at high precision three times: so a unit for bfloat16 does it.

    Args:
      jaxpr: (closed) whose matmuls stand inside `jax.shard_map`; the work is that of one device.
      filled: share of a grouped matmul's rows that belong to a group; its kernels spend no time on the others.

    Counted on the equations: the compiled text hides it (a grouped matmul is an opaque kernel there), and XLA's own
    count takes a loop once. A loop of unknown length counts as one round, of branches the dearest counts, and of a
    Pallas kernel the cost estimate that it was given or, without one, its equations times its grid.
    """
    work = np.zeros(2)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[d] for d in contracting)
            work += _matmul(equation, size * equation.outvars[0].aval.size)
        elif name == "ragged_dot_general":  # each row of the left meets the free dimensions of one group of the right
            numbers = params["ragged_dot_dimension_numbers"]
            (_, contracting), (_, batch) = numbers.dot_dimension_numbers
            bound = {*contracting, *batch, *numbers.rhs_group_dimensions}
            left, right = (operand.aval for operand in equation.invars[:2])
            free = math.prod(size for d, size in enumerate(right.shape) if d not in bound)
            work += filled * _matmul(equation, left.size * free)
        elif name == "pallas_call" and params.get("cost_estimate") is not None:
            work += filled * params["cost_estimate"].flops
        elif name == "pallas_call":
            work += math.prod(params["grid_mapping"].grid) * matmul_work(params["jaxpr"], filled=filled)
        elif name == "cond":
            work += max((matmul_work(branch, filled=filled) for branch in params["branches"]), key=lambda w: w[1])
        else:
            for inner in jaxprs_in_params(params):
                work += (params["length"] if name == "scan" else 1) * matmul_work(inner, filled=filled)
    return work


def _matmul(equation: Any, multiplications: int) -> np.ndarray:
    precision = equation.params.get("precision")
    precision = precision[0] if isinstance(precision, tuple) else precision
    is_float32 = all(operand.aval.dtype == "float32" for operand in equation.invars[:2])
    return 2.0 * multiplications * np.array([1, _PASSES.get(precision, 1) if is_float32 else 1])


# --- as text


def program_table(predictions: Sequence[Prediction], *, chips: int, price: float | None) -> str:
    """One column per program, one row per quantity, all of one chip."""
    rows: dict[str, Callable[[Prediction], str]] = {
        "per chip": lambda p: p.program,
        "parameters": lambda p: byte_size(p.parameters),
        "optimizer, its weights": lambda p: byte_size(p.optimizer),
        "batch, cache, padding": lambda p: byte_size(p.inputs),
        "activations, temporaries": lambda p: byte_size(p.temporaries),
        "peak memory": lambda p: byte_size(p.peak),
        "of capacity": _share,
        "matmul operations": lambda p: (
            f"{p.flops / 1e12:.4g} TFLOP" if p.flops >= 1e12 else f"{p.flops / 1e9:.4g} GFLOP"
        ),
        "memory traffic": lambda p: byte_size(p.memory_bytes),
    }

    def exchanged(kind: str) -> Callable[[Prediction], str]:
        return lambda p: next(
            (f"{e['count']:,} x, {byte_size(e['bytes'])}" for e in p.exchanges if e["kind"] == kind), "-"
        )

    rows |= {kind: exchanged(kind) for kind in dict.fromkeys(e["kind"] for p in predictions for e in p.exchanges)}
    for name, words in _BOUNDS.items():
        rows[f"time at {words}"] = lambda p, name=name: duration(p.seconds.get(name))
    rows |= {
        "time, all overlapping": lambda p: duration(p.least if p.seconds else None),
        "time, no overlap": lambda p: duration(p.most if p.seconds else None),
        "bound by": lambda p: _BOUNDS[p.bound] if p.seconds else "-",
        "tokens/s, all chips": lambda p: f"{p.tokens / p.least:,.0f} at most" if p.seconds else "-",
        **({} if price is None else {"cost of 1,000 times": lambda p: _cost(p, chips, price)}),
        "compiled in": lambda p: duration(p.compile_seconds),
    }
    return "\n".join(aligned([[name, *map(text, predictions)] for name, text in rows.items()]))


def search_table(layouts: Sequence[tuple[str, Prediction]], *, chips: int, price: float | None) -> str:
    """One row per layout, as they come."""
    head = ["mesh, microbatches", "peak memory", "of capacity", "least time", "bound by", "no overlap"]
    rows = [[*head, "cost of 1,000 steps"]]
    for name, p in layouts:
        times = (duration(p.least), _BOUNDS[p.bound], duration(p.most)) if p.seconds else ("-", "-", "-")
        rows.append([name, byte_size(p.peak), _share(p), *times, "-" if price is None else _cost(p, chips, price)])
    return "\n".join(aligned(rows))


def _share(p: Prediction) -> str:
    return f"{p.peak / p.capacity:.1%}" + ("" if p.fits else " DOESN'T FIT")


def _cost(p: Prediction, chips: int, price: float) -> str:
    """Of 1,000 runs, from perfect overlap to none, in the unit of `price` per chip and hour."""
    if not p.seconds:
        return "-"
    least, most = (1000 * chips * price * seconds / 3600 for seconds in (p.least, p.most))
    return f"{least:.2f} to {most:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds in a unit that suits them."""
    if seconds is None:
        return "-"
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 0.0)) if seconds >= s)
    return f"{seconds / (scale or 1e-6):.3g} {unit}"
