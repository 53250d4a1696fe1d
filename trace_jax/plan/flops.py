"""Matrix-multiplication work of a traced program, counted on its equations: kernels and loops included.

The compiled text hides it (a grouped matmul is an opaque kernel there), and XLA's own count takes a loop once.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

_PASSES = {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}


def matmul_work(jaxpr: Any, *, filled: float = 1.0) -> np.ndarray:
    """f64 [2]: floating-point operations of matmuls, and the same in units of the chip's bf16 rate. There a float32
    matmul at full precision counts six times, at high precision three times: so a unit for bfloat16 does it.

    Args:
      jaxpr: (closed) whose matmuls stand inside `jax.shard_map`; the work is that of one device.
      filled: share of a grouped matmul's rows that belong to a group; its kernels spend no time on the others.

    A loop of unknown length counts as one round, of branches the dearest counts, and of a Pallas kernel the cost
    estimate that it was given or, without one, its equations times its grid.
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
