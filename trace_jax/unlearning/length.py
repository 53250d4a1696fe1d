"""How long a run is, and how much it reads in a step."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import Mesh

from trace_jax.data.rows import Rows
from trace_jax.unlearning.config import UnlearningConfig


def with_steps(config: UnlearningConfig, forget: Rows, retain: Rows | None) -> UnlearningConfig:
    """The settings with `steps` in place of `epochs`, now that the rows of an epoch are known."""
    if config.epochs is None:
        return config
    rows, batch = len(forget), config.forget_batch_size
    if config.epoch_anchor == "retain":
        assert retain is not None and config.retain_batch_size is not None
        rows, batch = len(retain), config.retain_batch_size
    steps = math.ceil(config.epochs * rows / batch - 1e-9)  # 0.1 of 30 rows is 3 rows, and a little in floating point
    return dataclasses.replace(config, steps=max(1, steps), epochs=None, epoch_anchor=None)


def batch_text(
    config: UnlearningConfig, forget: Rows, retain: Rows | None, mesh: Mesh, microbatches: int,
    refusals: Rows | None = None,
) -> str:  # fmt: skip
    """What a step reads, and how many steps go through each side once, as a sentence."""
    sides = [("forget", forget, config.forget_batch_size)]
    if refusals is not None:
        sides.append(("refusal", refusals, config.forget_batch_size))
    if config.retains and retain is not None and config.retain_batch_size is not None:
        sides.append(("retain", retain, config.retain_batch_size))
    rows = " + ".join(f"{batch} {name} rows x {rows.tokens.shape[1]}" for name, rows, batch in sides)
    tokens = sum(batch * rows.tokens.shape[1] for _, rows, batch in sides)
    epochs = " and ".join(f"{math.ceil(len(rows) / batch):,} of the {name} rows" for name, rows, batch in sides)
    parts = f"{microbatches} microbatches" if microbatches > 1 else "one batch"
    devices = f"{mesh.size} devices" if mesh.size > 1 else "one device"
    step = f"{config.steps:,} steps of {rows} = {tokens:,} tokens each, in {parts} on {devices}"
    return f"{step}; steps in an epoch: {epochs}"
