"""Which parameters train: chosen by path, by layer and by expert, and told in a table."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trace_jax.config import ConfigError
from trace_jax.io.progress import aligned
from trace_jax.models.architecture import ModelConfig, flat_specs
from trace_jax.routing.config import select_experts
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.unlearning.config import Calibrated, Patterns, Trainable, UnlearningConfig
from trace_jax.unlearning.trained import factors, is_of_experts, rows_path


def trainable_paths(model: ModelConfig, trainable: Trainable) -> tuple[str, ...]:
    """The parameters of which anything trains; a ConfigError if there is none, or if a pattern matches none."""
    paths, patterns = tuple(flat_specs(model)), trainable.patterns
    for pattern in patterns if isinstance(trainable, Patterns) else ():
        if not fnmatch.filter(paths, pattern.removeprefix("!")):
            raise ConfigError(
                f"trainable: {pattern!r} is neither a preset ({', '.join(Trainable.kinds)}) nor a pattern that matches "
                f"a parameter. Parameters: {', '.join(sorted(paths))}."
            )

    def trains(path: str) -> bool:
        first = next((p for p in patterns if fnmatch.fnmatchcase(path, p.removeprefix("!"))), "!")
        # The correction only chooses experts: no loss has a gradient for it, and weight decay alone would move it.
        return not first.startswith("!") and path != "layers/router_correction"

    if not (training := tuple(filter(trains, paths))):
        raise ConfigError(f"trainable: {', '.join(patterns)} freezes every parameter; nothing would be unlearned.")
    return training


def chosen_experts(
    config: UnlearningConfig, calibrated: np.ndarray | None, forget: ExpertStatistics, retain: ExpertStatistics, *,
    seed: int,
) -> np.ndarray | None:  # fmt: skip
    """bool [L, E], the experts that train as `config.trainable.experts` says; None where not only some experts train.

    Args:
      calibrated: bool [L, E], the experts that the calibration of the retain weights selected.
      seed: of the rule "random".
    """
    if config.some_experts is None:
        return None
    rule = config.some_experts.experts
    if isinstance(rule, Calibrated):
        return calibrated
    try:
        return select_experts(forget, retain, rule=rule, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"unlearning.trainable.experts is {rule.name!r}: {error}") from None


def update_masks(
    paths: Iterable[str],
    model: ModelConfig,
    *,
    layers: tuple[int, int] | None = None,
    selected: np.ndarray | None = None,
) -> dict[str, np.ndarray] | None:
    """Masks that multiply the updates of stacked arrays, or None when all of every array trains.

    Args:
      paths: of parameters of which something trains.
      layers: (first, last), layers of the network counted from 1, inclusive; only these train.
      selected: bool [L, E], the experts whose rows alone train; of all else (routers) only their layers train.
    Returns:
      {path of what trains: f32 mask that broadcasts to it}; raises ConfigError if nothing is left to train.
    """
    if layers is None and (selected is None or all(map(is_of_experts, paths))):
        return None
    declared, stacks = flat_specs(model), {"layers": model.moe_layers, "dense": model.dense_layers}
    masks = {}
    for path in paths:
        rank, stack = len(declared[path].shape), path.partition("/")[0]
        mask, along = np.ones((1,) * rank, np.float32), (-1, *(1,) * (rank - 1))
        if layers is not None and stack in stacks:
            inside = [layers[0] <= layer + 1 <= layers[1] for layer in stacks[stack]]
            mask = mask * np.reshape(np.array(inside, np.float32), along)
        if selected is not None and not is_of_experts(path):
            mask = mask * np.reshape(selected.any(axis=1).astype(np.float32), along)
        masks[rows_path(path) if selected is not None and is_of_experts(path) else path] = mask
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError(f"nothing of {', '.join(masks)} would train: no part of it is in layers {layers}.")
    return masks


def trainable_table(model: ModelConfig, config: UnlearningConfig, selected: np.ndarray | None = None) -> list[dict]:
    """One row per parameter: path, shape, how many numbers it has, how many train, and which ("" where none do).

    selected: bool [L, E], the experts that train where not all do.
    """
    paths, rows = trainable_paths(model, config.trainable), []
    masks = update_masks(paths, model, layers=config.layers, selected=selected)
    own = {} if config.lora is None else factors(model, paths, config.lora.rank)
    for path, spec in sorted(flat_specs(model).items()):
        size, count, which = math.prod(spec.shape), 0, ""
        if path in paths and config.lora is not None:
            count = sum(math.prod(factor.shape) for name, factor in own.items() if name.startswith(f"{path}/"))
            which = f"rank {config.lora.rank}"
        elif path in paths:
            if selected is not None and is_of_experts(path):
                mask, every = selected, "experts"
            else:
                mask, every = np.ones(1) if masks is None else masks[path], "layers"
            number = int(mask.sum())
            count = size // mask.size * number
            which = "all" if number == mask.size else f"{number} of {mask.size} {every}" if number else ""
        rows.append({"path": path, "shape": list(spec.shape), "parameters": size, "trained": count, "which": which})
    return rows


def table_text(table: Sequence[Mapping[str, Any]]) -> str:
    """A trainable table as a person reads it: a line for each parameter that trains, one for all that don't."""
    trained, total = (sum(row[key] for row in table) for key in ("trained", "parameters"))
    frozen = [row for row in table if not row["trained"]]
    rows = [row for row in table if row["trained"]]
    lines = [(row["path"], " x ".join(map(str, row["shape"])), row["which"], f"{row['trained']:,}") for row in rows]
    arrays = f"{len(frozen)} array{'s' * (len(frozen) != 1)}"
    lines.append(("frozen", arrays, "", f"{sum(row['parameters'] for row in frozen):,}"))
    head = f"trainable parameters: {trained:,} numbers; the model has {total:,} ({trained / total:.2%})"
    return "\n".join([head, *aligned([("parameter", "shape", "trains", "numbers"), *lines], left=3)])
