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
    D, V = (config.hidden_size, "embed"), (config.vocab_size, "vocab")
    specs = {"embed": _array(config, D[0] ** -0.5, V, D), "layers": _stack(config), **_norm(config, "final_norm")}
    if config.dense_layers:
        specs["dense"] = _stack(config, dense=True)
    if not config.tie_embeddings:
        specs["head"] = _array(config, D[0] ** -0.5, D, V)
    if config.head_bias:
        specs["head_bias"] = _array(config, 0.0, V)
    return specs


def _array(config: ModelConfig, scale: float | None, *dimensions: tuple[int, str], dtype: str = "") -> ArraySpec:
    """An array whose dimensions are (size, logical axis) each."""
    shape, axes = zip(*dimensions, strict=True)
    return ArraySpec(shape, dtype or config.dtype, axes, scale)


def _norm(config: ModelConfig, name: str) -> dict:
    names = {name: None, f"{name}_bias": 0.0} if config.norm == "layer" else {name: None}
    return {name: _array(config, scale, (config.hidden_size, "embed")) for name, scale in names.items()}


def _stack(config: ModelConfig, *, dense: bool = False) -> dict:
    """All layers with experts, or all dense ones."""
    D, router, specs = (config.hidden_size, "embed"), (config.num_experts, "router"), {}
    for kind, absent in (("norm", "post"), ("post_norm", "pre")):
        if config.norm_placement != absent:
            specs |= _norm(config, f"attention_{kind}") | _norm(config, f"mlp_{kind}")
    specs |= _grouped_attention(config) if config.attention == "grouped" else _latent_attention(config)
    C = (config.value_width, "head")
    output = (2 * config.num_layers) ** -0.5 * (config.num_heads * config.value_width) ** -0.5
    specs["o"] = _array(config, output, (config.num_heads, "heads"), C, D)
    if config.attention_bias == "all":
        specs["o_bias"] = _array(config, 0.0, D)
    if dense:
        specs["mlp"] = _gated(config, (config.dense_hidden_size, "dense_hidden"), bias=config.mlp_bias)
    else:
        specs["router"] = _array(config, D[0] ** -0.5, D, router, dtype="float32")
        for name in ("router_bias", "router_correction"):
            if getattr(config, name):
                specs[name] = _array(config, 0.0, router, dtype="float32")
        F, E = (config.expert_hidden_size, "expert_hidden"), (config.num_experts, "experts")
        specs["experts"] = _gated(config, F, E, bias=config.expert_bias)
        if config.shared_hidden_size:
            specs["shared"] = _gated(config, (config.shared_hidden_size, "shared_hidden"), bias=config.mlp_bias)
            if config.shared_gate:
                specs["shared"]["gate"] = _array(config, D[0] ** -0.5, D)
        if config.moe_output_norm:
            specs |= _norm(config, "moe_output_norm")
    count = len(config.dense_layers if dense else config.moe_layers)
    return jax.tree.map(
        lambda spec: dataclasses.replace(spec, shape=(count, *spec.shape), axes=("layers", *spec.axes)), specs
    )


def _gated(config: ModelConfig, width: tuple[int, str], *experts: tuple[int, str], bias: bool) -> dict:
    """A gated feed-forward part, or one of each of `experts`: gate_up [(E,) D, 2, F], down [(E,) F, D] and biases."""
    D, both = (config.hidden_size, "embed"), (2, "gate_up")
    specs = {
        "gate_up": _array(config, D[0] ** -0.5, *experts, D, both, width),
        "down": _array(config, (2 * config.num_layers) ** -0.5 * width[0] ** -0.5, *experts, width, D),
    }
    if bias:
        specs["gate_up_bias"] = _array(config, 0.0, *experts, both, width)
        specs["down_bias"] = _array(config, 0.0, *experts, D)
    return specs


def _grouped_attention(config: ModelConfig) -> dict:
    D, C, specs = (config.hidden_size, "embed"), (config.head_size, "head"), {}
    H, G = (config.num_heads, "heads"), (config.num_kv_heads, "kv_heads")
    for name, heads in {"q": H, "k": G, "v": G}.items():
        specs[name] = _array(config, D[0] ** -0.5, D, heads, C)
        if config.attention_bias != "none":
            specs[f"{name}_bias"] = _array(config, 0.0, heads, C)
        if name != "v" and config.qk_norm != "none":
            specs[f"{name}_norm"] = _array(config, None, *((heads, C) if config.qk_norm == "full" else (C,)))
    if config.attention_gate:
        specs["attention_gate"] = _array(config, D[0] ** -0.5, D, H, C)
    if config.sinks:
        specs["sinks"] = _array(config, 0.0, H)
    return specs


def _latent_attention(config: ModelConfig) -> dict:
    D, H, C = (config.hidden_size, "embed"), (config.num_heads, "heads"), (config.head_size, "head")
    R, Q = (config.latent_size, "latent"), (config.query_latent_size, "latent")
    with_rope = (config.latent_size + config.rotary_width, "latent")
    up = (config.head_size - config.rotary_width + config.value_width, "head")
    specs = {
        "kv_down": _array(config, D[0] ** -0.5, D, with_rope),
        "kv_down_norm": _array(config, None, R),
        "kv_up": _array(config, R[0] ** -0.5, R, H, up),
    }
    if config.attention_bias == "all":
        specs["kv_down_bias"] = _array(config, 0.0, with_rope)
    if not config.query_latent_size:
        return specs | {"q": _array(config, D[0] ** -0.5, D, H, C)}
    specs["q_down"] = _array(config, D[0] ** -0.5, D, Q)
    specs["q_down_norm"] = _array(config, None, Q)
    specs["q_up"] = _array(config, Q[0] ** -0.5, Q, H, C)
    if config.attention_bias == "all":
        specs["q_down_bias"] = _array(config, 0.0, Q)
    return specs


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


def abstract_params(config: ModelConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`: shapes and types, no memory."""
    return jax.tree.map(ArraySpec.abstract, parameter_specs(config))


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """First values of every parameter. The same key gives the same values on any machine and device count.

    Args:
      key: from `jax.random.key(seed)`.
    """
    specs, structure = jax.tree.flatten(parameter_specs(config))
    keys = jax.random.split(key, len(specs))
    return jax.tree.unflatten(structure, [spec.initialize(keys[i]) for i, spec in enumerate(specs)])


def count_params(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token) parameters; an expert that isn't chosen is not active."""
    sizes = {path: math.prod(spec.shape) for path, spec in flat_specs(config).items()}
    total = sum(sizes.values())
    routed = sum(size for path, size in sizes.items() if path.startswith("layers/experts/"))
    return total, total - routed + routed * config.experts_per_token // config.num_experts
