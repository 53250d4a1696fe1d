"""`plan`: what an experiment takes on a machine, found by compiling for it without having it."""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from trace_jax.checkpoints.config import PretrainedConfig
from trace_jax.io.files import write_json
from trace_jax.io.progress import byte_size, say
from trace_jax.models.architecture import ModelConfig, count_params
from trace_jax.parallel.mesh import DATA, ParallelConfig, make_mesh
from trace_jax.plan.machine import Target, cpus, gpus, tpu_slice
from trace_jax.plan.prediction import Prediction, duration, predict, program_table, search_table
from trace_jax.plan.programs import Program, assumed_experts, decoding_program, statistics_program, step_program


def plan(
    config: Any,
    target: Target,
    *,
    price: float | None = None,
    search: bool = False,
    output: str | os.PathLike | None = None,
) -> str:
    """Compiles the unlearning step, the statistics pass and the decoding step of an experiment for `target`.

    Args:
      config: the experiment (`trace_jax.run.experiment.ExperimentConfig`).
      price: of one chip for one hour, in any currency; None leaves costs out.
      search: compile the step for every mesh and the fewest microbatches that fit there, rank them by predicted
        time, and plan all three programs for the first.
      output: where everything is written as JSON.
    Returns:
      The tables as text.
    """
    model, chips = shape_of(config.model), len(target.devices)
    layouts = ranked(config, model, target) if search else []
    parallel = layouts[0][0] if layouts else config.parallel
    mesh = mesh_of(target, parallel)
    parallel = dataclasses.replace(parallel, data=mesh.shape[DATA])
    predictions = [_predicted(program, target, mesh) for program in programs(config, model, parallel, mesh)]
    parts = [_head(config, model, target, parallel)]
    if layouts:
        parts.append(search_table([(_words(each), p) for each, p in layouts], chips=chips, price=price))
    parts.append(program_table(predictions, chips=chips, price=price))
    if output is not None:
        numbers = {
            "experiment": config.name,
            "parameters": count_params(model)[0],
            "target": target.name,
            "chip": dataclasses.asdict(target.chip),
            "chips": chips,
            "parallel": dataclasses.asdict(parallel),
            "price_per_chip_hour": price,
            "programs": [prediction.to_json() for prediction in predictions],
            "search": [{**dataclasses.asdict(each), **prediction.to_json()} for each, prediction in layouts],
        }
        write_json(Path(output), numbers)
    return "\n\n".join(parts)


def shape_of(model: PretrainedConfig | ModelConfig) -> ModelConfig:
    """The model's shapes; of a checkpoint, config.json is all that is read."""
    return model.shape() if isinstance(model, PretrainedConfig) else model


def mesh_of(target: Target, parallel: ParallelConfig) -> Mesh:
    """The target's devices as a mesh."""
    return make_mesh(target.devices, data=parallel.data, expert=parallel.expert, tensor=parallel.tensor)


def programs(config: Any, model: ModelConfig, parallel: ParallelConfig, mesh: Mesh) -> Iterator[Program]:
    """The three programs of a run, each traced when it is asked for."""
    rows, row_length = config.evaluation.batch_size, config.data.row_length
    yield step_program(config.unlearning, model, parallel, mesh, row_length)
    yield statistics_program(model, mesh, rows, row_length)
    yield decoding_program(model, mesh, rows, row_length)


def _predicted(program: Program, target: Target, mesh: Mesh) -> Prediction:
    say(f"compiling the {program.name} for {target.name}")
    prediction = predict(program, target.chip, list(mesh.devices.flat))
    peak, capacity = byte_size(prediction.peak), byte_size(prediction.capacity)
    say(f"  {peak} of {capacity}, in {duration(prediction.compile_seconds)}")
    return prediction


# --- search


def ranked(config: Any, model: ModelConfig, target: Target) -> list[tuple[ParallelConfig, Prediction]]:
    """Every mesh with the fewest microbatches that fit there, quickest first; then those that don't fit."""
    layouts, rows = [], config.unlearning.forget_batch_size
    for data, expert, tensor in meshes(len(target.devices), model):
        sizes = {"data": data, "expert": expert, "tensor": tensor}
        for microbatches in (2**n for n in itertools.count()):
            parallel = dataclasses.replace(config.parallel, **sizes, microbatches=microbatches)
            say(_words(parallel))
            mesh = mesh_of(target, parallel)
            prediction = _predicted(next(programs(config, model, parallel, mesh)), target, mesh)
            stays = prediction.parameters + prediction.optimizer
            if prediction.fits or stays > prediction.capacity or rows % (2 * microbatches * data * expert):
                layouts.append((parallel, prediction))
                break
    return sorted(layouts, key=lambda each: (not each[1].fits, each[1].least if each[1].seconds else each[1].peak))


def meshes(devices: int, model: ModelConfig) -> list[tuple[int, int, int]]:
    """(data, expert, tensor) whose product is `devices`, where experts and heads divide evenly."""
    return [
        (devices // expert // tensor, expert, tensor)
        for tensor in range(1, devices + 1)
        for expert in range(1, devices // tensor + 1)
        if devices % (expert * tensor) == 0 and model.num_experts % expert == 0 and model.num_heads % tensor == 0
    ]


# --- words


def _words(parallel: ParallelConfig) -> str:
    parts = f", {parallel.microbatches} microbatches" if parallel.microbatches > 1 else ""
    return f"data {parallel.data} x expert {parallel.expert} x tensor {parallel.tensor}{parts}"


def _head(config: Any, model: ModelConfig, target: Target, parallel: ParallelConfig) -> str:
    total, active = count_params(model)
    unlearning, rows = config.unlearning, f"{config.unlearning.forget_batch_size} forget"
    rows += f" and {unlearning.retain_batch_size} retain" if unlearning.retains else ""
    chip, trains = target.chip, f"{unlearning.trainable.name} train"
    if (chosen := assumed_experts(unlearning, model)) is not None:
        trains += f" ({chosen.sum():,} of {chosen.size:,} experts assumed)"
    return (
        f"{config.name}: {total:,} parameters in {model.dtype}, {active:,} active per token; "
        f"{unlearning.objective.name}, {trains}\n"
        f"{target.name}: {len(target.devices)} of {chip.name}, each {byte_size(chip.memory)}, {chip.flops / 1e12:.4g} "
        f"TFLOP/s, {chip.bandwidth / 1e9:.4g} GB/s\n"
        f"{_words(parallel)}; remat {parallel.remat}; a step takes {rows} rows of {config.data.row_length} tokens"
    )


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="NAME", help="a slice of TPU chips: v5e:4x4, v5p:2x2x4, v6e:4x4")
    where.add_argument("--gpus", type=int, metavar="N", help="so many GPUs")
    where.add_argument("--cpu", type=int, metavar="N", help="this machine, as N simulated devices")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="which GPUs: a100, h100 (default), h200, b200")
    parser.add_argument("--price", type=float, metavar="P", help="of one chip for an hour, for the cost of 1,000 steps")
    parser.add_argument("--search", action="store_true", help="try all meshes and microbatches; rank those that fit")
    parser.add_argument("--json", metavar="FILE", help="write every number there")


def main(options: argparse.Namespace) -> int:
    config = options.load_config()
    jax.config.update("jax_platforms", "cpu")  # devices that are planned for are described, not opened
    if options.topology:
        target = tpu_slice(options.topology)
    else:
        target = gpus(options.gpus, options.gpu) if options.gpus else cpus(options.cpu, config.model.dtype)
    print(plan(config, target, price=options.price, search=options.search, output=options.json))
    return 0
