"""The programs that a run spends its time in, traced on shapes alone: nothing is allocated."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.data.rows import Batch
from trace_jax.models.architecture import ModelConfig, abstract_params, flatten, unflatten
from trace_jax.models.generate import greedy_step
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.mesh import BATCH_AXES, EXPERT, ParallelConfig, row_shards
from trace_jax.routing.statistics import counting_pass
from trace_jax.unlearning.config import GripProject, UnlearningConfig
from trace_jax.unlearning.inputs import StepRows
from trace_jax.unlearning.losses import Constants
from trace_jax.unlearning.rivals import Protection, protection_specs
from trace_jax.unlearning.step import row_multiple, set_up, state_shardings, unlearning_step

SELECTED = 8  # of so many experts one is taken to be selected, where selected experts train


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced program and what it works on, in bytes on each device.

    filled: share of the room for tokens of a device's experts that a balanced load fills.
    """

    name: str
    traced: Any  # jax.stages.Traced
    parameters: int
    optimizer: int
    inputs: int
    tokens: int  # that one run of it processes, over all devices
    filled: float


def step_program(
    unlearning: UnlearningConfig, model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, row_length: int
) -> Program:
    """One unlearning step."""
    selected = assumed_experts(unlearning, model)
    run = set_up(_params(model, mesh), unlearning, model, selected=selected, parallel=parallel, mesh=mesh)
    constants, settings = Constants(run.constants.original, *_placed(run.constants[1:], mesh, P())), run.settings
    state = jax.eval_shape(run.start, constants)
    state = jax.tree.map(_array, state, state_shardings(state, settings, mesh))
    if "hidden" in unlearning.objective.needs:
        target = _placed(jax.ShapeDtypeStruct((1, model.hidden_size), jnp.float32), mesh, P())
        constants = constants._replace(target=target)
    if isinstance(unlearning.grip, GripProject):
        constants = constants._replace(protection=_protection(unlearning.grip, model, mesh))
    multiple = row_multiple(settings, mesh)
    forget = _batch(unlearning.forget_batch_size, multiple, row_length, mesh)
    retain = _batch(unlearning.retain_batch_size, multiple, row_length, mesh) if unlearning.retains else None
    weights = (
        None if retain is None else _placed(jax.ShapeDtypeStruct(retain.tokens.shape, jnp.float32), mesh, P(BATCH_AXES))
    )
    topic = _placed(jax.ShapeDtypeStruct(forget.tokens.shape[:1], jnp.int32), mesh, P(BATCH_AXES))
    refusals = forget if "refusals" in unlearning.objective.needs else None
    rows = StepRows(forget, retain, weights, topic, refusals)
    traced = unlearning_step.trace(state, constants, rows, settings=settings, mesh=mesh)
    tokens = sum(batch.tokens.size for batch in (forget, retain, refusals) if batch is not None)
    sizes = local_bytes(constants), local_bytes(state), local_bytes(rows)
    return Program("unlearning step", traced, *sizes, tokens, _filled(model, mesh, parallel.expert_buffer))


def assumed_experts(unlearning: UnlearningConfig, model: ModelConfig) -> np.ndarray | None:
    """bool [L, E], experts that are taken to train where some do; which ones is all the same to a program.

    As many as the rule takes or, where that depends on the data, 1 of `SELECTED` in each layer.
    """
    if unlearning.some_experts is None:
        return None
    rule: Any = unlearning.some_experts.experts
    layers, experts = len(model.moe_layers), model.num_experts
    if not hasattr(rule, "top"):
        return np.broadcast_to(np.arange(experts) < max(1, experts // SELECTED), (layers, experts))
    if rule.scope == "layer":
        return np.broadcast_to(np.arange(experts) < rule.top, (layers, experts))
    in_turn = np.arange(layers * experts).reshape(experts, layers).T  # one of each layer, then the next of each
    return in_turn < rule.top


def statistics_program(model: ModelConfig, mesh: Mesh, rows: int, row_length: int) -> Program:
    """The pass that counts how often each expert is used, on one batch."""
    params, batch = unflatten(_params(model, mesh)), _batch(rows, row_shards(mesh), row_length, mesh)
    traced = counting_pass(model, mesh).trace(params, batch.tokens, batch.segments, batch.valid)
    return Program(
        "statistics pass", traced, local_bytes(params), 0, local_bytes(batch), batch.tokens.size, _filled(model, mesh)
    )


def decoding_program(model: ModelConfig, mesh: Mesh, rows: int, row_length: int) -> Program:
    """Writing one token to every row greedily, with a cache that holds `row_length` tokens of each."""
    params, (write, inputs) = unflatten(_params(model, mesh)), greedy_step(model, mesh, rows, row_length)
    traced = write.trace(params, *inputs)
    return Program("decoding step", traced, local_bytes(params), 0, local_bytes(inputs), rows, _filled(model, mesh))


def _filled(model: ModelConfig, mesh: Mesh, buffer: float = 0.0) -> float:
    """1 over the room for tokens of a device's experts, as a multiple of the balanced load (`models.moe`)."""
    devices = mesh.shape[EXPERT]
    if devices == 1:
        return 1.0
    worst = devices * min(-(-model.num_experts // devices), model.experts_per_token) / model.experts_per_token
    return 1 / min(worst, buffer or worst)


def _params(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Every parameter by path: shape, type and where it lies."""
    specs = param_specs(model, mesh)
    return {path: _placed(leaf, mesh, specs[path]) for path, leaf in flatten(abstract_params(model)).items()}


def _array(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Shapes of arrays that all lie on the mesh as `spec` says."""
    return jax.tree.map(lambda leaf: _array(leaf, NamedSharding(mesh, spec)), tree)


def _protection(grip: GripProject, model: ModelConfig, mesh: Mesh) -> Protection:
    """What holds routers, if the busiest expert is chosen twice as often as the average one."""
    layers, tokens, experts = len(model.moe_layers), grip.tokens, model.num_experts
    rank = min(model.hidden_size, tokens, -(-2 * tokens * model.experts_per_token // experts))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = Protection(
        jax.ShapeDtypeStruct((layers, tokens, model.hidden_size), model.dtype),
        jax.ShapeDtypeStruct((layers, experts, model.hidden_size, rank), jnp.float32),
        jax.ShapeDtypeStruct((layers, experts, tokens), jnp.float32),
        scalar,
        scalar,
    )
    specs = protection_specs(experts, mesh)
    return jax.tree.map(lambda leaf, spec: _array(leaf, NamedSharding(mesh, spec)), shapes, specs)


def _batch(rows: int, multiple: int, row_length: int, mesh: Mesh) -> Batch:
    """A batch, padded to a multiple of rows."""
    shape = (-(-rows // multiple) * multiple, row_length)
    return _placed(
        Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.int32, bool))), mesh, P(BATCH_AXES)
    )


def local_bytes(tree: Any) -> int:
    """Bytes on one device of abstract arrays that carry shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
