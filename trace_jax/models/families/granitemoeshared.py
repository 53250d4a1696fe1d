"""Granite-MoE with a shared expert."""

import dataclasses

from trace_jax.models.config import ModelConfig
from trace_jax.models.families import granitemoe, names
from trace_jax.models.families.reader import ConfigReader


def config(reader: ConfigReader) -> ModelConfig:
    width = reader.integer("shared_intermediate_size")
    return dataclasses.replace(granitemoe.config(reader), shared_hidden_size=width)


FAMILY = dataclasses.replace(
    granitemoe.FAMILY,
    model_type="granitemoeshared",
    title="Granite-MoE-shared",
    published="moe-7b-1b-active-shared-experts",
    defaults={**granitemoe.DEFAULTS, "shared_intermediate_size": 0},
    config=config,
    stored=names.stored_as(
        *granitemoe.TABLES,
        names.moe(
            ("shared/gate_up", "(g f) d -> d g f", "shared_mlp.input_linear.weight"),
            ("shared/down", "d f -> f d", "shared_mlp.output_linear.weight"),
        ),
    ),
)
