"""`plan`: what an experiment takes on a machine, found by compiling for it without having it."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.io.files import write_json
from trace_jax.io.progress import aligned, byte_size, duration, say
from trace_jax.models.architecture import ModelConfig, count_params
from trace_jax.models.sharding import chosen_mesh
from trace_jax.parallel.mesh import ParallelConfig
from trace_jax.plan.machine import Target, cpus, gpus, tpu_slice
from trace_jax.plan.programs import Program, assumed_experts, predict, programs

_BOUNDS = {"compute": "matmul rate", "memory": "memory bandwidth", "interconnect": "interconnect"}


def plan(
    config: Any, target: Target, *, price: float | None = None, search: bool = False, output: str | None = None
) -> str:
    """Compiles the programs of an experiment (`ExperimentConfig`) for `target`: tables as text; `output` gets every
    number as JSON.

    `price` is of one chip for one hour, in any currency; None leaves costs out. `search` compiles the step for every
    mesh, ranks them by predicted time, and plans all programs for the first.
    """
    model, chips = shape_of(config.model), len(target.devices)
    layouts = ranked(config, model, target) if search else []
    parallel = layouts[0][0] if layouts else laid_out(config, model, chips)
    mesh = parallel.mesh(target.devices)
    predictions = [_predicted(program, target, mesh) for program in programs(config, model, parallel, mesh)]
    parts = [_head(config, model, target, parallel)]
    if layouts:
        parts.append(search_table(layouts, chips=chips, price=price))
    kinds = dict.fromkeys(e["kind"] for p in predictions for e in p["exchanges"])
    columns = [_quantities(p, kinds, chips, price) for p in predictions]
    parts.append("\n".join(aligned([[name, *(column[name] for column in columns)] for name in columns[0]])))
    parts += [_moving(p) for p in predictions[:1] if p["operations"]]
    if output is not None:
        numbers = {
            "experiment": config.name,
            "parameters": count_params(model)[0],
            "target": target.name,
            "chip": dataclasses.asdict(target.chip),
            "chips": chips,
            "parallel": dataclasses.asdict(parallel),
            "price_per_chip_hour": price,
            "programs": predictions,
            "search": [dataclasses.asdict(each) | prediction for each, prediction in layouts],
        }
        write_json(Path(output), numbers)
    return "\n\n".join(parts)


def shape_of(model: PretrainedConfig | ModelConfig) -> ModelConfig:
    """The model's shapes; of a checkpoint, config.json is all that is read."""
    return model.shape() if isinstance(model, PretrainedConfig) else model


def laid_out(config: Any, model: ModelConfig, devices: int) -> ParallelConfig:
    """The mesh of an experiment on so many devices (`chosen_mesh`)."""
    return chosen_mesh(config.parallel, model, config.unlearning.batches, config.data.row_length, devices)


def _predicted(program: Program, target: Target, mesh: Mesh) -> dict[str, Any]:
    say(f"compiling the {program.name} for {target.name}")
    p = predict(program, target.chip, list(mesh.devices.flat))
    say(f"  {byte_size(p['peak'])} of {byte_size(p['capacity'])}, in {duration(p['compile_seconds'])}")
    return p


# --- search


def ranked(config: Any, model: ModelConfig, target: Target) -> list[tuple[ParallelConfig, dict[str, Any]]]:
    """Every mesh with the fewest microbatches that fit there, quickest first; then those that don't fit."""
    layouts, rows = [], config.unlearning.forget_batch_size
    for data, expert, tensor in meshes(len(target.devices), model):
        sizes = {"data": data, "expert": expert, "tensor": tensor}
        for microbatches in (2**n for n in itertools.count()):
            parallel = dataclasses.replace(config.parallel, **sizes, microbatches=microbatches)
            say(mesh_words(parallel))
            mesh = parallel.mesh(target.devices)
            p = _predicted(next(programs(config, model, parallel, mesh)), target, mesh)
            too_large = p["parameters"] + p["optimizer"] > p["capacity"]
            if p["fits"] or too_large or rows % (2 * microbatches * data * expert):
                layouts.append((parallel, p))
                break
    return sorted(layouts, key=lambda each: (not each[1]["fits"], each[1].get("least", each[1]["peak"])))


def meshes(devices: int, model: ModelConfig) -> list[tuple[int, int, int]]:
    """(data, expert, tensor) whose product is `devices`, where experts and heads divide evenly."""
    return [
        (devices // expert // tensor, expert, tensor)
        for tensor in range(1, devices + 1)
        for expert in range(1, devices // tensor + 1)
        if devices % (expert * tensor) == 0 and model.num_experts % expert == 0 and model.num_heads % tensor == 0
    ]


# --- words


def mesh_words(parallel: ParallelConfig) -> str:
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
        f"{mesh_words(parallel)}; remat {parallel.remat}; a step takes {rows} rows of {config.data.row_length} tokens"
    )


def search_table(layouts: Sequence[tuple[ParallelConfig, dict[str, Any]]], *, chips: int, price: float | None) -> str:
    """One row per layout, as they come."""
    head = ["mesh, microbatches", "peak memory", "of capacity", "least time", "bound by", "no overlap"]
    rows = [[*head, "cost of 1,000 steps"]]
    for parallel, p in layouts:
        q = _quantities(p, (), chips, price)
        times = q["time, all overlapping"], q["bound by"], q["time, no overlap"], q.get("cost of 1,000 times", "-")
        rows.append([mesh_words(parallel), q["peak memory"], q["of capacity"], *times])
    return "\n".join(aligned(rows))


def _moving(p: dict[str, Any]) -> str:
    """What moves most in main memory."""
    rows = [[f"what moves most, {p['program']}", "times", "moved", "of all"]]
    for each in p["operations"]:
        share = f"{each['bytes'] / p['memory_bytes']:.1%}"
        rows.append([each["operation"], f"{each['count']:,}", byte_size(each["bytes"]), share])
    return "\n".join(aligned(rows))


def _quantities(p: dict[str, Any], kinds: Iterable[str], chips: int, price: float | None) -> dict[str, str]:
    """What `predict` gives as text, by name. Costs are in the unit of `price` per chip and hour."""
    exchanged = {e["kind"]: f"{e['count']:,} x, {byte_size(e['bytes'])}" for e in p["exchanges"]}
    scale, unit = (1e12, "TFLOP") if p["flops"] >= 1e12 else (1e9, "GFLOP")
    quantities = {
        "per chip": p["program"],
        "parameters": byte_size(p["parameters"]),
        "optimizer, its weights": byte_size(p["optimizer"]),
        "batch, cache, padding": byte_size(p["inputs"]),
        "activations, temporaries": byte_size(p["temporaries"]),
        "peak memory": byte_size(p["peak"]),
        "of capacity": f"{p['peak'] / p['capacity']:.1%}" + ("" if p["fits"] else " DOESN'T FIT"),
        "matmul operations": f"{p['flops'] / scale:.4g} {unit}",
        "memory traffic": byte_size(p["memory_bytes"]),
        **{kind: exchanged.get(kind, "-") for kind in kinds},
        **{f"time at {words}": duration(p["seconds"].get(name)) for name, words in _BOUNDS.items()},
        "time, all overlapping": duration(p.get("least")),
        "time, no overlap": duration(p.get("most")),
        "bound by": _BOUNDS[p["bound"]] if p["seconds"] else "-",
        "tokens/s, all chips": f"{p['tokens'] / p['least']:,.0f} at most" if p["seconds"] else "-",
    }
    if price is not None:
        costs = [f"{1000 * chips * price * p[times] / 3600:.2f}" for times in ("least", "most") if p["seconds"]]
        quantities["cost of 1,000 times"] = " to ".join(costs) or "-"
    return quantities | {"compiled in": duration(p["compile_seconds"])}


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
    if options.topology is not None:
        target = tpu_slice(options.topology)
    elif options.gpus is not None:
        target = gpus(options.gpus, options.gpu)
    else:
        target = cpus(options.cpu, config.model.dtype)
    print(plan(config, target, price=options.price, search=options.search, output=options.json))
    return 0
