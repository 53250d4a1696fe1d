"""One declaration per parameter array: its shape, type, logical axes and first values.

`parameter_specs` is the only place where parameters are declared. The abstract tree (shapes without memory), the
initial values and, later, the shardings are all read off it, so that they can't disagree.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from trace_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Declaration of one array.

    `axes` names every dimension ("layers", "experts", "embed", ...): what sharding rules refer to. `scale` is the
    standard deviation of the normal distribution that first values are drawn from; None means all ones.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    scale: float | None

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} dimensions, axes {self.axes} name {len(self.axes)}."
            )

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def initialize(self, key: jax.Array) -> jax.Array:
        if self.scale is None:
            return jnp.ones(self.shape, self.dtype)
        return (self.scale * jax.random.normal(key, self.shape, jnp.float32)).astype(self.dtype)


def parameter_specs(config: ModelConfig) -> dict:
    """Nested dict of `ArraySpec`, the shape of the parameter tree. Layers are stacked along a leading axis.

    Projections start at 1/sqrt(fan in); those that write to the residual stream at 1/sqrt(2 L) of that, so that its
    variance doesn't grow with depth (GPT-2). The router is float32 whatever the type of the rest.
    """
    V, D, L = config.vocab_size, config.hidden_size, config.num_layers
    E, F = config.num_experts, config.expert_hidden_size
    H, G, C = config.num_heads, config.num_kv_heads, config.head_size
    residual = (2 * L) ** -0.5

    def array(shape, axes, scale, dtype=config.dtype):
        return ArraySpec(shape, dtype, axes, scale)

    def gated(leading, leading_axes, width, width_axis):
        gate_up = array((*leading, D, 2, width), (*leading_axes, "embed", "gate_up", width_axis), D**-0.5)
        down = array((*leading, width, D), (*leading_axes, width_axis, "embed"), residual * width**-0.5)
        return {"gate_up": gate_up, "down": down}

    layers = {
        "attention_norm": array((L, D), ("layers", "embed"), None),
        "q": array((L, D, H, C), ("layers", "embed", "heads", "head"), D**-0.5),
        "k": array((L, D, G, C), ("layers", "embed", "kv_heads", "head"), D**-0.5),
        "v": array((L, D, G, C), ("layers", "embed", "kv_heads", "head"), D**-0.5),
        "o": array((L, H, C, D), ("layers", "heads", "head", "embed"), residual * (H * C) ** -0.5),
        "mlp_norm": array((L, D), ("layers", "embed"), None),
        "router": array((L, D, E), ("layers", "embed", "experts"), D**-0.5, "float32"),
        "experts": gated((L, E), ("layers", "experts"), F, "expert_hidden"),
    }
    if config.shared_hidden_size:
        layers["shared"] = gated((L,), ("layers",), config.shared_hidden_size, "shared_hidden")
    specs = {
        "embed": array((V, D), ("vocab", "embed"), D**-0.5),
        "layers": layers,
        "final_norm": array((D,), ("embed",), None),
    }
    if not config.tie_embeddings:
        specs["head"] = array((D, V), ("embed", "vocab"), D**-0.5)
    return specs


def _is_spec(node: Any) -> bool:
    return isinstance(node, ArraySpec)


def abstract_params(config: ModelConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`: shapes and types, no memory."""
    return jax.tree.map(ArraySpec.abstract, parameter_specs(config), is_leaf=_is_spec)


def logical_axes(config: ModelConfig) -> dict:
    """The parameter tree with, at each leaf, the tuple of logical axis names."""
    return jax.tree.map(lambda spec: spec.axes, parameter_specs(config), is_leaf=_is_spec)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """First values of every parameter. The same key gives the same values on any machine and device count.

    Args:
      key: from `jax.random.key(seed)`.
    """
    specs, structure = jax.tree.flatten(parameter_specs(config), is_leaf=_is_spec)
    keys = jax.random.split(key, len(specs))
    return jax.tree.unflatten(structure, [spec.initialize(keys[i]) for i, spec in enumerate(specs)])


def count_params(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token) parameters; an expert that isn't chosen is not active."""
    specs = parameter_specs(config)
    sizes = jax.tree.map(lambda spec: math.prod(spec.shape), specs, is_leaf=_is_spec)
    total = sum(jax.tree.leaves(sizes))
    routed = sum(jax.tree.leaves(sizes["layers"]["experts"]))
    return total, total - routed + routed * config.experts_per_token // config.num_experts
