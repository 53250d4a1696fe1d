"""Matrix-multiplication work of a traced program, counted on its equations: kernels and loops included.

The compiled text hides it (a grouped matmul is an opaque kernel there), and XLA's own count takes a loop once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params


class Work(NamedTuple):
    """Floating-point operations of matmuls, and the same in units of the chip's bf16 rate.

    `passes` counts a float32 matmul at full precision six times and at high precision three times, which is how a
    matrix unit for bfloat16 does it.
    """

    flops: float = 0.0
    passes: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(self.flops + times * other.flops, self.passes + times * other.passes)


def matmul_work(jaxpr: Any, *, filled: float = 1.0) -> Work:
    """The work of one device, for a (closed) jaxpr whose matmuls stand inside `jax.shard_map`.

    Args:
      filled: share of a grouped matmul's rows that belong to a group; its kernels spend no time on the others.

    A loop of unknown length counts as one round, of branches the dearest counts, and of a Pallas kernel the cost
    estimate that it was given or, without one, its equations times its grid.
    """
    work = Work()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[d] for d in contracting)
            work = work.plus(_matmul(equation, size * equation.outvars[0].aval.size))
        elif name == "ragged_dot_general":
            work = work.plus(_matmul(equation, _ragged_size(equation)), filled)
        elif name == "pallas_call" and params.get("cost_estimate") is not None:
            work = work.plus(Work(*2 * (params["cost_estimate"].flops,)), filled)
        elif name == "pallas_call":
            work = work.plus(matmul_work(params["jaxpr"], filled=filled), math.prod(params["grid_mapping"].grid))
        elif name == "cond":
            branches = (matmul_work(branch, filled=filled) for branch in params["branches"])
            work = work.plus(max(branches, key=lambda w: w.passes))
        else:
            times = params["length"] if name == "scan" else 1
            for inner in jaxprs_in_params(params):
                work = work.plus(matmul_work(inner, filled=filled), times)
    return work


def _matmul(equation, multiplications: int) -> Work:
    flops, operands = 2.0 * multiplications, equation.invars[:2]
    precision = equation.params.get("precision")
    precision = precision[0] if isinstance(precision, tuple) else precision
    exact = {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}
    is_float32 = all(operand.aval.dtype == "float32" for operand in operands)
    return Work(flops, flops * (exact.get(precision, 1) if is_float32 else 1))


def _ragged_size(equation) -> int:
    """Every row of the left operand meets the free dimensions of one group of the right one."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    bound = {*contracting, *batch, *numbers.rhs_group_dimensions}
    left, right = (operand.aval for operand in equation.invars[:2])
    return left.size * math.prod(size for d, size in enumerate(right.shape) if d not in bound)
