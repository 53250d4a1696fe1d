"""The programs that a run spends its time in, traced on shapes alone, and what each takes of a chip: memory, work,
exchanges, and the time that they need at least.
"""

import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import ModelConfig, abstract_params, flatten, unflatten
from trace_jax.models.generate import CHUNK, greedy_step
from trace_jax.models.moe import rooms_of
from trace_jax.models.sharding import param_shardings
from trace_jax.parallel.mesh import BATCH_AXES, EXPERT, ParallelConfig, row_shards
from trace_jax.plan.hlo import COLLECTIVES, traffic
from trace_jax.plan.machine import Chip, exchange_rate
from trace_jax.routing.statistics import counting_pass
from trace_jax.unlearning.config import GripProject, UnlearningConfig
from trace_jax.unlearning.grip import Protection, protection_specs
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.losses import Constants
from trace_jax.unlearning.step import row_multiple, set_up, state_shardings, unlearning_step

LISTED = 10  # operations that are named as moving most
SELECTED = 8  # of so many experts one is taken to be selected, where selected experts train
_PASSES = {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}


class Program(NamedTuple):
    """A traced program and what it works on, in bytes on each device."""

    name: str
    traced: Any  # jax.stages.Traced
    parameters: int
    optimizer: int
    inputs: int
    tokens: int  # that one run of it processes, over all devices
    filled: float  # share of the room for tokens of a device's experts that a balanced load fills
    rounds: int = 1  # of its loop of unknown length, of which one is meant by "one run"


def programs(config: Any, model: ModelConfig, parallel: ParallelConfig, mesh: Mesh) -> Iterator[Program]:
    """Those of a run, each traced when it is asked for: the unlearning step; the pass that counts how often each expert
    is used, on one batch; and writing one token to every row greedily, with a cache for a row.
    """
    rows, row_length, filled = config.evaluation.batch_size, config.data.row_length, _filled(model, mesh)
    yield step_program(config.unlearning, model, parallel, mesh, row_length)
    params, batch = unflatten(_params(model, mesh)), _batch(rows, row_shards(mesh), row_length, mesh)
    traced = counting_pass(model, mesh).trace(params, batch.tokens, batch.segments, batch.valid)
    weights = local_bytes(params)
    yield Program("statistics pass", traced, weights, 0, local_bytes(batch), batch.tokens.size, filled)
    write, (params, *inputs) = greedy_step(model, mesh, rows, row_length)
    weights = local_bytes(params)
    traced, sizes = write.trace(params, *inputs), (weights, 0, local_bytes(inputs))
    yield Program("decoding step", traced, *sizes, rows, filled, rounds=CHUNK)


def step_program(
    unlearning: UnlearningConfig, model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, row_length: int
) -> Program:
    """One unlearning step."""
    selected, everywhere = assumed_experts(unlearning, model), NamedSharding(mesh, P())
    about: Any = {"selected": selected, "parallel": parallel, "mesh": mesh}
    settings, constants, start = set_up(_params(model, mesh), unlearning, model, **about)
    constants = Constants(constants.original, *_placed(constants[1:], everywhere))
    state = jax.eval_shape(start, constants)
    state = _placed(state, state_shardings(state, settings, mesh))
    if "hidden" in unlearning.objective.needs:
        target = jax.ShapeDtypeStruct((1, model.hidden_size), jnp.float32, sharding=everywhere)
        constants = constants._replace(target=target)
    if isinstance(unlearning.grip, GripProject):
        constants = constants._replace(protection=_protection(unlearning.grip, model, mesh))
    multiple, weights = row_multiple(settings, mesh), None
    forget, retain = _batch(unlearning.forget_batch_size, multiple, row_length, mesh), None
    if unlearning.retains:
        retain = _batch(unlearning.retain_batch_size, multiple, row_length, mesh)
        weights = jax.ShapeDtypeStruct(retain.tokens.shape, jnp.float32, sharding=retain.tokens.sharding)
    topic = jax.ShapeDtypeStruct(forget.tokens.shape[:1], jnp.int32, sharding=forget.tokens.sharding)
    refusals = forget if "refusal_nll" in unlearning.objective.needs else None
    rows = StepRows(forget, retain, weights, topic, refusals)
    traced = unlearning_step.trace(state, constants, rows, settings=settings, mesh=mesh)
    tokens = sum(batch.tokens.size for batch in (forget, retain, refusals) if batch is not None)
    sizes = local_bytes(constants), local_bytes(state), local_bytes(rows)
    return Program("unlearning step", traced, *sizes, tokens, _filled(model, mesh, parallel.expert_buffer))


def assumed_experts(unlearning: UnlearningConfig, model: ModelConfig) -> np.ndarray | None:
    """bool [L, E], experts that are taken to train where some do; which ones is all the same to a program.

    As many as the rule takes or, where that depends on the data, 1 of `SELECTED` in each layer.
    """
    if (rule := unlearning.trainable.experts) is None:
        return None
    layers, experts = len(model.moe_layers), model.num_experts
    if hasattr(rule, "top") and rule.scope != "layer":  # one of each layer, then the next of each
        return rule.top > np.arange(layers * experts).reshape(experts, layers).T
    top = rule.top if hasattr(rule, "top") else max(1, experts // SELECTED)
    return np.broadcast_to(np.arange(experts) < top, (layers, experts))


def _filled(model: ModelConfig, mesh: Mesh, buffer: float = 0.0) -> float:
    """The balanced load of a device's experts over the room that they have for it (`models.moe`)."""
    devices, tokens = mesh.shape[EXPERT], 1 << 20
    room = rooms_of(model, tokens, -(-model.num_experts // devices), devices, buffer)[0]
    return tokens * model.experts_per_token / devices / room


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes of arrays that lie as one sharding says, or as a pytree of them does."""

    def one(leaf, sharding=shardings):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, *([] if isinstance(shardings, NamedSharding) else [shardings]))


def _params(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Every parameter by path: shape, type and where it lies."""
    return _placed(flatten(abstract_params(model)), param_shardings(model, mesh))


def _protection(grip: GripProject, model: ModelConfig, mesh: Mesh) -> Protection:
    """What holds routers, if the busiest expert is chosen twice as often as the average one."""
    layers, tokens, experts, D = len(model.moe_layers), grip.tokens, model.num_experts, model.hidden_size
    rank, array = min(D, tokens, -(-2 * tokens * model.experts_per_token // experts)), jax.ShapeDtypeStruct
    inputs, bases = array((layers, tokens, D), model.dtype), array((layers, experts, D, rank), jnp.float32)
    scalars = [array((), jnp.int32)] * 2
    shapes = Protection(inputs, bases, array((layers, experts, tokens), jnp.float32), *scalars)
    return _placed(shapes, jax.tree.map(lambda spec: NamedSharding(mesh, spec), protection_specs(experts, mesh)))


def _batch(rows: int, multiple: int, row_length: int, mesh: Mesh) -> Batch:
    """A batch, padded to a multiple of rows."""
    shape, by_row = (-(-rows // multiple) * multiple, row_length), NamedSharding(mesh, P(BATCH_AXES))
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=by_row) for dtype in (jnp.int32, jnp.int32, bool)))


def local_bytes(tree: Any) -> int:
    """Bytes on one device of abstract arrays that carry shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- what they take


def predict(program: Program, chip: Chip, devices: Sequence[Any]) -> dict[str, Any]:
    """Compiles a traced program for the devices of a mesh and reads off what one run takes of each, by name.

    "peak": bytes of "parameters" and "optimizer", which stay there between runs, of other "inputs", and of
    "temporaries": all that a run allocates, its results and code included. "memory_bytes": to and from main memory,
    "operations" those that move most of them.
    "flops": of matmuls. "exchanges": of each kind of collective how many run, the bytes that a device sends, and the
    seconds that this takes at least. "seconds": at the chip's limits, each alone; "bound" is the limit that takes
    longest, "least" its time, the roofline, and "most" the sum, all without overlap.

    Of a program that doesn't fit, by its inputs alone or as the compiler says, "peak" is what it would need.
    """
    (flops, passes), start = matmul_work(program.traced.jaxpr, filled=program.filled).tolist(), time.perf_counter()
    resident = program.parameters + program.optimizer
    peak, compiled = resident + program.inputs, None
    if peak <= chip.memory:
        try:
            compiled = program.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            peak = _needed(error)
    seconds_to_compile = time.perf_counter() - start
    inputs = temporaries = memory_bytes = None
    moving, exchanges, seconds, times = {}, [], {}, {}
    if compiled is not None:
        memory, text = compiled.memory_analysis(), compiled.as_text()
        memory_bytes, moving, collectives = traffic(text, len(devices), rounds=program.rounds)
        temporaries = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        # The compiler pads small arrays to tiles, and doesn't count what a program never reads, which is there anyway.
        inputs = max(memory.argument_size_in_bytes - resident, program.inputs)
        peak = resident + inputs + temporaries
        places = [tuple(d.coords) if chip.torus else (d.id // chip.node,) if chip.node else () for d in devices]
        for kind in COLLECTIVES:
            if alike := [c for c in collectives if c.kind == kind]:
                needed = sum(c.bytes / min(exchange_rate(chip, group, places) for group in c.groups) for c in alike)
                count, sent = sum(c.count for c in alike), sum(c.bytes for c in alike)
                exchanges.append({"kind": kind, "count": count, "bytes": sent, "seconds": needed})
        seconds = {"compute": passes / chip.flops, "memory": memory_bytes / chip.bandwidth}
        seconds["interconnect"] = sum(exchange["seconds"] for exchange in exchanges)
        bound = max(seconds, key=lambda name: seconds[name])
        times = {"bound": bound, "least": seconds[bound], "most": sum(seconds.values())}
    return {
        "program": program.name,
        "tokens": program.tokens,
        "capacity": chip.memory,
        "compile_seconds": seconds_to_compile,
        "parameters": program.parameters,
        "optimizer": program.optimizer,
        "inputs": inputs,
        "temporaries": temporaries,
        "peak": peak,
        "flops": flops,
        "memory_bytes": memory_bytes,
        "operations": [
            {"operation": " ".join(filter(None, names)), "count": count, "bytes": moved}
            for names, (count, moved) in sorted(moving.items(), key=lambda each: -each[1][1])[:LISTED]
        ],
        "exchanges": exchanges,
        "seconds": seconds,
        "fits": compiled is not None and peak <= chip.memory,
        **times,
    }


def _needed(error: Exception) -> int:
    """Bytes that a program would need, from the compiler's refusal; the error itself if it refused otherwise."""
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
        raise error
    number, unit = (part for part in match.groups() if part)
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def matmul_work(jaxpr: Any, *, filled: float = 1.0) -> np.ndarray:
    """f64 [2]: floating-point operations of one device's matmuls, and the same in units of the chip's bf16 rate, where
    a float32 matmul at full precision counts six times, at high precision three times. `filled` is the share of a
    grouped matmul's rows that belong to a group; its kernels spend no time on the others.

    Counted on the equations: the compiled text hides it (a grouped matmul is an opaque kernel there), and XLA's own
    count takes a loop once. A loop of unknown length counts as one round, of branches the cheapest counts (the other is
    of experts whose load is not balanced), and of a Pallas kernel the cost estimate that it was given or, without one,
    its equations times its grid.
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
            work += min((matmul_work(branch, filled=filled) for branch in params["branches"]), key=lambda w: w[1])
        else:
            for inner in jaxprs_in_params(params):
                work += (params["length"] if name == "scan" else 1) * matmul_work(inner, filled=filled)
    return work


def _matmul(equation: Any, multiplications: int) -> np.ndarray:
    precision = equation.params.get("precision")
    precision = precision[0] if isinstance(precision, tuple) else precision
    is_float32 = all(operand.aval.dtype == "float32" for operand in equation.invars[:2])
    return 2.0 * multiplications * np.array([1, _PASSES.get(precision, 1) if is_float32 else 1])
