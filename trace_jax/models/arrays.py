"""One declaration per parameter array: its shape, type, logical axes and first values.

`parameter_specs` is the only place where parameters are declared. The abstract tree (shapes without memory), the
initial values and the shardings are all read off it, so that they can't disagree.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from trace_jax.config import ConfigError
from trace_jax.models.config import ModelConfig

STACKED = ("layers", "experts")  # along these an array holds many matrices


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

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def initialize(self, key: jax.Array) -> jax.Array:
        if self.scale is None:
            return jnp.ones(self.shape, self.dtype)
        return (self.scale * jax.random.normal(key, self.shape, jnp.float32)).astype(self.dtype)

    @property
    def sides(self) -> tuple[int, int]:
        """(first axis that its matrices read from, first axis that they write to).

        Matrices are stored inputs first. Those that write to the residual stream end in "embed" and read from all axes
        before it; every other reads from one axis.
        """
        first = sum(axis in STACKED for axis in self.axes)
        return first, len(self.axes) - 1 if self.axes[-1] == "embed" else first + 1


def low_rank(spec: ArraySpec, rank: int) -> tuple[ArraySpec, ArraySpec]:
    """Two factors a [..., inputs, rank] and b [..., rank, outputs] in float32, whose product is shaped like `spec`.

    First values of a are N(0, 1/inputs), those of b zero.

    Raises:
      ConfigError: `rank` is more than the smaller side of the matrix.
    """
    first, second = spec.sides
    inputs, outputs = math.prod(spec.shape[first:second]), math.prod(spec.shape[second:])
    if not 1 <= rank <= min(inputs, outputs):
        raise ConfigError(
            f"rank is {rank}; a matrix of {inputs} x {outputs} ({', '.join(spec.axes[first:])}) takes 1 to "
            f"{min(inputs, outputs)}."
        )
    a = ArraySpec((*spec.shape[:second], rank), "float32", (*spec.axes[:second], "rank"), inputs**-0.5)
    stacked = spec.shape[:first], spec.axes[:first]
    b = ArraySpec((*stacked[0], rank, *spec.shape[second:]), "float32", (*stacked[1], "rank", *spec.axes[second:]), 0.0)
    return a, b


def parameter_specs(config: ModelConfig) -> dict:
    """Nested dict of `ArraySpec`, the shape of the parameter tree.

    Layers with experts are stacked along the leading axis of "layers", dense ones along that of "dense", each in the
    order of the network. Projections start at 1/sqrt(fan in); those that write to the residual stream at 1/sqrt(2 L)
    of that, so that its variance doesn't grow with depth (GPT-2). The router is float32 whatever the type of the rest.
    """
    V, D = config.vocab_size, config.hidden_size

    def array(shape, axes, scale, dtype=config.dtype):
        return ArraySpec(shape, dtype, axes, scale)

    specs = {
        "embed": array((V, D), ("vocab", "embed"), D**-0.5),
        "layers": _stacked(_moe_layer(config), len(config.moe_layers)),
        **_norm(config, "final_norm", D, "embed"),
    }
    if config.dense_layers:
        specs["dense"] = _stacked(_dense_layer(config), len(config.dense_layers))
    if not config.tie_embeddings:
        specs["head"] = array((D, V), ("embed", "vocab"), D**-0.5)
    if config.head_bias:
        specs["head_bias"] = array((V,), ("vocab",), 0.0)
    return specs


def _stacked(layer: dict, count: int) -> dict:
    def stack(spec: ArraySpec) -> ArraySpec:
        return dataclasses.replace(spec, shape=(count, *spec.shape), axes=("layers", *spec.axes))

    return jax.tree.map(stack, layer, is_leaf=_is_spec)


def _norm(config: ModelConfig, name: str, width: int, axis: str) -> dict:
    specs = {name: ArraySpec((width,), config.dtype, (axis,), None)}
    if config.norm == "layer":
        specs[f"{name}_bias"] = ArraySpec((width,), config.dtype, (axis,), 0.0)
    return specs


def _residual_scale(config: ModelConfig) -> float:
    return (2 * config.num_layers) ** -0.5


def _gated(config: ModelConfig, width: int, width_axis: str, *, bias: bool, experts: int = 0) -> dict:
    """A gated feed-forward part, or `experts` of them: gate_up [(E,) D, 2, F], down [(E,) F, D], and their biases."""
    D, leading, axes = config.hidden_size, (experts,) * bool(experts), ("experts",) * bool(experts)
    scale = _residual_scale(config) * width**-0.5
    specs = {
        "gate_up": ArraySpec((*leading, D, 2, width), config.dtype, (*axes, "embed", "gate_up", width_axis), D**-0.5),
        "down": ArraySpec((*leading, width, D), config.dtype, (*axes, width_axis, "embed"), scale),
    }
    if bias:
        specs["gate_up_bias"] = ArraySpec((*leading, 2, width), config.dtype, (*axes, "gate_up", width_axis), 0.0)
        specs["down_bias"] = ArraySpec((*leading, D), config.dtype, (*axes, "embed"), 0.0)
    return specs


def _block(config: ModelConfig) -> dict:
    """What every layer has: attention and the norms around its two parts."""
    D, specs = config.hidden_size, {}
    if config.norm_placement in ("pre", "both"):
        specs |= _norm(config, "attention_norm", D, "embed") | _norm(config, "mlp_norm", D, "embed")
    if config.norm_placement in ("post", "both"):
        specs |= _norm(config, "attention_post_norm", D, "embed") | _norm(config, "mlp_post_norm", D, "embed")
    return specs | (_grouped_attention(config) if config.attention == "grouped" else _latent_attention(config))


def _grouped_attention(config: ModelConfig) -> dict:
    D, H, G, C = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
    sides = {"q": (H, "heads"), "k": (G, "kv_heads"), "v": (G, "kv_heads")}
    specs = {}
    for name, (heads, axis) in sides.items():
        specs[name] = ArraySpec((D, heads, C), config.dtype, ("embed", axis, "head"), D**-0.5)
        if config.attention_bias != "none":
            specs[f"{name}_bias"] = ArraySpec((heads, C), config.dtype, (axis, "head"), 0.0)
        if name != "v" and config.qk_norm == "full":
            specs[f"{name}_norm"] = ArraySpec((heads, C), config.dtype, (axis, "head"), None)
        elif name != "v" and config.qk_norm != "none":
            specs[f"{name}_norm"] = ArraySpec((C,), config.dtype, ("head",), None)
    if config.attention_gate:
        specs["attention_gate"] = ArraySpec((D, H, C), config.dtype, ("embed", "heads", "head"), D**-0.5)
    if config.sinks:
        specs["sinks"] = ArraySpec((H,), config.dtype, ("heads",), 0.0)
    return specs | _attention_output(config)


def _latent_attention(config: ModelConfig) -> dict:
    D, H, C, R, Q = (
        config.hidden_size, config.num_heads, config.head_size, config.latent_size, config.query_latent_size
    )  # fmt: skip
    rotary, bias = config.rotary_width, config.attention_bias == "all"

    def array(shape, axes, scale):
        return ArraySpec(shape, config.dtype, axes, scale)

    specs = {
        "kv_down": array((D, R + rotary), ("embed", "latent"), D**-0.5),
        "kv_down_norm": array((R,), ("latent",), None),
        "kv_up": array((R, H, C - rotary + config.value_width), ("latent", "heads", "head"), R**-0.5),
    }
    if bias:
        specs["kv_down_bias"] = array((R + rotary,), ("latent",), 0.0)
    if Q:
        specs["q_down"] = array((D, Q), ("embed", "latent"), D**-0.5)
        specs["q_down_norm"] = array((Q,), ("latent",), None)
        specs["q_up"] = array((Q, H, C), ("latent", "heads", "head"), Q**-0.5)
        if bias:
            specs["q_down_bias"] = array((Q,), ("latent",), 0.0)
    else:
        specs["q"] = array((D, H, C), ("embed", "heads", "head"), D**-0.5)
    return specs | _attention_output(config)


def _attention_output(config: ModelConfig) -> dict:
    D, H, C = config.hidden_size, config.num_heads, config.value_width
    scale = _residual_scale(config) * (H * C) ** -0.5
    specs = {"o": ArraySpec((H, C, D), config.dtype, ("heads", "head", "embed"), scale)}
    if config.attention_bias == "all":
        specs["o_bias"] = ArraySpec((D,), config.dtype, ("embed",), 0.0)
    return specs


def _moe_layer(config: ModelConfig) -> dict:
    D, E = config.hidden_size, config.num_experts
    specs = _block(config)
    specs["router"] = ArraySpec((D, E), "float32", ("embed", "router"), D**-0.5)
    if config.router_bias:
        specs["router_bias"] = ArraySpec((E,), "float32", ("router",), 0.0)
    if config.router_correction:
        specs["router_correction"] = ArraySpec((E,), "float32", ("router",), 0.0)
    F = config.expert_hidden_size
    specs["experts"] = _gated(config, F, "expert_hidden", bias=config.expert_bias, experts=E)
    if config.shared_hidden_size:
        specs["shared"] = _gated(config, config.shared_hidden_size, "shared_hidden", bias=config.mlp_bias)
        if config.shared_gate:
            specs["shared"]["gate"] = ArraySpec((D,), config.dtype, ("embed",), D**-0.5)
    if config.moe_output_norm:
        specs |= _norm(config, "moe_output_norm", D, "embed")
    return specs


def _dense_layer(config: ModelConfig) -> dict:
    mlp = _gated(config, config.dense_hidden_size, "dense_hidden", bias=config.mlp_bias)
    return _block(config) | {"mlp": mlp}


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of nested parameters (or of what is shaped like them) by path, "layers/experts/down"."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def unflatten(flat: Mapping[str, Any]) -> Any:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.lru_cache(maxsize=32)
def flat_specs(config: ModelConfig) -> Mapping[str, ArraySpec]:
    """`parameter_specs` by path."""
    return flatten(parameter_specs(config))


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
