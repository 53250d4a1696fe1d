"""What a Mixture-of-Experts decoder looks like: its switches, and every parameter array that follows from them.

Families (`trace_jax.models.families`) differ in nothing but these switches. `parameter_specs` is the only place where
parameters are declared: shapes without memory, first values and shardings are all read off it.

Dimension letters, used as suffixes of array names throughout the package:
  B batch   S sequence   T tokens (B*S flattened)   D model width   V vocabulary
  L layers  E experts    K experts chosen per token  F expert hidden width
  H query heads   G key/value heads   C head width   R width of a latent (low-rank) projection
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from trace_jax.config import ConfigError, Section, option

GROUPED_MATMULS = ("auto", "blocked", "ragged", "mosaic", "triton")
STACKED = ("layers", "experts")  # along these an array holds many matrices


class Rope(Section):
    """One rotary embedding: dimension pair i turns by position * theta^(-i/pairs) / divisors[i]. Every published kind
    (linear, yarn, llama3, longrope) is a choice of divisors and amplitude (`trace_jax.models.families.fields`).
    """

    theta: float = option(10_000.0, help="base of the frequencies", minimum=1.0)
    divisors: tuple[float, ...] = option((), help="what each pair's frequency is divided by; none = 1")
    amplitude: float = option(1.0, help="what cosine and sine are multiplied by")
    long_amplitude: float = option(0.0, help="amplitude of calls that reach beyond original_length; 0 = the same")
    original_length: int = option(0, help="positions up to which `amplitude` holds", minimum=0)


class ModelConfig(Section):
    """Shape and switches of a decoder. Static argument of every jitted function, so it must stay hashable.

    Example:
      >>> shape = tj.ModelConfig(vocab_size=320, num_layers=3, num_experts=8, dense_layers=(0,), dense_hidden_size=64)
      >>> shape.moe_layers
      (1, 2)
    """

    vocab_size: int = option(2048, help="tokens in the vocabulary, V", minimum=2)
    hidden_size: int = option(64, help="width of the residual stream, D", minimum=2)
    num_layers: int = option(2, help="decoder layers, L", minimum=1)
    num_heads: int = option(2, help="query heads, H", minimum=1)
    num_kv_heads: int = option(2, help="key and value heads, G; divides num_heads", minimum=1)
    head_size: int = option(32, help="width of one query and key head, C", minimum=2)
    num_experts: int = option(16, help="routed experts per layer, E", minimum=1)
    experts_per_token: int = option(2, help="experts chosen per token, K", minimum=1)
    expert_hidden_size: int = option(64, help="hidden width of one routed expert, F", minimum=1)
    shared_hidden_size: int = option(0, help="hidden width of the always-on shared expert; 0 = none", minimum=0)
    tie_embeddings: bool = option(False, help="use the embedding as output head")
    dtype: str = option(
        "float32", help="type of weights and activations; the router is float32 always", choices=("float32", "bfloat16")
    )
    grouped_matmul: str = option(
        "auto", help="how experts are multiplied; auto chooses by platform", choices=GROUPED_MATMULS
    )

    # Router: score every expert, choose K, weigh the chosen ones.
    router_score: str = option(
        "softmax",
        help="scores: softmax over all experts, sigmoid, softmax over the chosen K, or Phi's sparse mixer (K = 2)",
        choices=("softmax", "sigmoid", "softmax_top_k", "sparsemixer"),
    )
    router_bias: bool = option(False, help="the router's logits have a bias")
    router_correction: bool = option(False, help="a bias is added to scores for choosing, not for weighing")
    num_groups: int = option(1, help="groups of experts; only the best groups are chosen from", minimum=1)
    groups_per_token: int = option(1, help="groups chosen per token", minimum=1)
    group_score: str = option("max", help="a group's score: its best, or its best two added", choices=("max", "top2"))
    normalize_top_k: bool = option(True, help="divide the K gate weights by their sum")
    normalize_minimum: float = option(0.0, help="least value of that sum", minimum=0.0)
    routing_scale: float = option(1.0, help="what the gate weights are multiplied by, last")
    router_jitter: float = option(0.01, help="the sparse mixer's threshold", minimum=0.0)

    # Experts and dense layers.
    activation: str = option("swiglu", help="of every feed-forward part", choices=("swiglu", "clamped_swiglu"))
    swiglu_alpha: float = option(1.702, help="clamped_swiglu: slope of its sigmoid")
    swiglu_limit: float = option(7.0, help="clamped_swiglu: largest gate and up value", minimum=0.0)
    expert_bias: bool = option(False, help="routed experts have biases")
    mlp_bias: bool = option(False, help="shared expert and dense layers have biases")
    shared_gate: bool = option(False, help="the shared expert's output is multiplied by a sigmoid gate")
    dense_layers: tuple[int, ...] = option((), help="layers, counted from 0, with one dense feed-forward part")
    dense_hidden_size: int = option(0, help="hidden width of dense layers", minimum=0)

    # Attention.
    attention: str = option("grouped", help="grouped-query or multi-head latent", choices=("grouped", "latent"))
    value_size: int = option(0, help="latent attention: width of a value head; 0 = head_size", minimum=0)
    latent_size: int = option(0, help="latent attention: width of the key/value latent", minimum=0)
    query_latent_size: int = option(0, help="latent attention: width of the query latent; 0 = none", minimum=0)
    latent_epsilon: float = option(1e-6, help="latent attention: epsilon of the latents' norms", minimum=0.0)
    attention_bias: str = option("none", help="which projections have biases", choices=("none", "qkv", "all"))
    attention_scale: float = option(0.0, help="what scores are multiplied by; 0 = head_size^-1/2", minimum=0.0)
    attention_gate: bool = option(False, help="attention's output is multiplied by a sigmoid gate")
    sinks: bool = option(False, help="every head has a learnt logit that takes attention nowhere")
    qk_norm: str = option(
        "none",
        help="RMSNorm of queries and keys: per head, over all heads, or per head after the rotary embedding",
        choices=("none", "head", "full", "head_after_rope"),
    )
    clip_qkv: float = option(0.0, help="largest absolute query, key and value; 0 = no limit", minimum=0.0)
    windows: tuple[int, ...] = option((), help="keys that each layer sees, itself included; 0, () = all", minimum=0)
    ropes: tuple[Rope, ...] = option((Rope(),), help="rotary embeddings")
    layer_ropes: tuple[int, ...] = option((), help="which of them each layer uses (-1 = none); () = the first")
    rotary_size: int = option(0, help="leading (latent: last) dimensions of a head that turn; 0 = all", minimum=0)
    rope_interleaved: bool = option(False, help="pairs are neighbours, not halves")

    # The residual stream.
    norm: str = option("rms", help="RMSNorm, or LayerNorm with bias", choices=("rms", "layer"))
    norm_epsilon: float = option(1e-6, help="epsilon of every norm but the latents'", minimum=0.0)
    norm_placement: str = option("pre", help="where norms stand around a part", choices=("pre", "post", "both"))
    moe_output_norm: bool = option(False, help="the sum of routed and shared experts is normalised")
    embedding_scale: float = option(1.0, help="what embeddings are multiplied by")
    residual_scale: float = option(1.0, help="what each part adds to the stream is multiplied by")
    logits_divisor: float = option(1.0, help="what logits are divided by")
    head_bias: bool = option(False, help="the output head has a bias")

    def __post_init__(self):
        super().__post_init__()
        H, G, C, turn = self.num_heads, self.num_kv_heads, self.head_size, self.rotary_width
        E, K, groups, best = self.num_experts, self.experts_per_token, self.num_groups, self.groups_per_token
        L, windows, ropes, dense = self.num_layers, self.windows, self.layer_ropes, self.dense_layers
        R, score, attention, of_ropes = self.latent_size, self.router_score, self.attention, range(-1, len(self.ropes))
        for wrong, sentence in (
            (K > E, f"experts_per_token is {K} but there are only {E} experts (num_experts)."),
            (H % G, f"num_heads {H} must be a multiple of num_kv_heads {G}."),
            (turn % 2 or turn > C, f"{turn} dimensions turn; expected an even number of at most head_size {C}."),
            (E % groups, f"num_groups {groups} must divide num_experts {E}."),
            (best > groups, f"groups_per_token is {best}, but there are only {groups} groups (num_groups)."),
            (best * E // groups < K, f"{best} groups hold fewer than experts_per_token {K} experts."),
            (score == "sparsemixer" and K != 2, f"the sparse mixer chooses 2 experts; experts_per_token is {K}."),
            ((attention == "latent") != bool(R), f"latent_size is {R} and attention {attention!r}; they go together."),
            (len(windows) not in (0, L), f"windows has {len(windows)} entries for {L} layers."),
            (len(ropes) not in (0, L), f"layer_ropes has {len(ropes)} entries for {L} layers."),
            (set(ropes) - set(of_ropes), f"layer_ropes {ropes} names a rope that is not among the {len(self.ropes)}."),
            (set(dense) - set(range(L)), f"dense_layers {dense} names a layer beyond the {L} layers."),
            (dense and not self.dense_hidden_size, "dense_layers need a dense_hidden_size."),
            (len(set(dense)) == L, "every layer is dense; this is no Mixture-of-Experts model."),
        ):
            if wrong:
                raise ConfigError(sentence)

    def check_tokens(self, tokens: Any, name: str = "tokens") -> None:
        """Raises a ValueError: an id on the host that the model doesn't know, in whose place JAX would read another."""
        low, high = int(np.min(tokens, initial=0)), int(np.max(tokens, initial=0))
        if low < 0 or high >= self.vocab_size:
            there = f"{name} hold the id {low if low < 0 else high}, and the model knows 0 to {self.vocab_size - 1}"
            raise ValueError(f"{there}. Use the model's own tokenizer; padding needs a known id, too.")

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that turn with position."""
        return self.rotary_size or self.head_size

    @property
    def value_width(self) -> int:
        """Dimensions of a value head."""
        return self.value_size or self.head_size

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have a router, counted from 0. Everything per router ([L, E] counts and so on) has these rows."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)


# --- parameters


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Declaration of one array. `axes` name its dimensions ("layers", "embed", ...) for sharding rules."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    scale: float | None  # standard deviation of the normal distribution of first values; None: all are one

    def initialize(self, key: jax.Array) -> jax.Array:
        if self.scale is None:
            return jnp.ones(self.shape, self.dtype)
        return (self.scale * jax.random.normal(key, self.shape, jnp.float32)).astype(self.dtype)

    @property
    def sides(self) -> tuple[int, int]:
        """(first axis that its matrices read from, first that they write to). Those that end in "embed" write to the
        residual stream and read from all axes before it; every other reads from one axis.
        """
        first = sum(axis in STACKED for axis in self.axes)
        return first, len(self.axes) - 1 if self.axes[-1] == "embed" else first + 1


def low_rank(spec: ArraySpec, rank: int) -> tuple[ArraySpec, ArraySpec]:
    """Two float32 factors whose product is shaped like `spec`: a [..., inputs, rank], at first N(0, 1/inputs), and
    b [..., rank, outputs], at first zero. A `rank` above the matrix's own is a ConfigError.
    """
    first, second = spec.sides
    inputs, outputs = math.prod(spec.shape[first:second]), math.prod(spec.shape[second:])
    if not 1 <= rank <= min(inputs, outputs):
        raise ConfigError(f"rank is {rank}; a matrix of {inputs} x {outputs} takes 1 to {min(inputs, outputs)}.")
    a = ArraySpec((*spec.shape[:second], rank), "float32", (*spec.axes[:second], "rank"), inputs**-0.5)
    stacked = spec.shape[:first], spec.axes[:first]
    b = ArraySpec((*stacked[0], rank, *spec.shape[second:]), "float32", (*stacked[1], "rank", *spec.axes[second:]), 0.0)
    return a, b


def parameter_specs(config: ModelConfig) -> dict:
    """Nested dict of `ArraySpec`, the shape of the parameter tree. Layers with experts are stacked in "layers", dense
    ones in "dense", along the leading axis. The router is float32 whatever the type of the rest.
    """
    D, V = (config.hidden_size, "embed"), (config.vocab_size, "vocab")
    specs = {"embed": _array(config, D[0] ** -0.5, V, D), "layers": _stack(config), **_norm(config, "final_norm")}
    if config.dense_layers:
        specs["dense"] = _stack(config, dense=True)
    if not config.tie_embeddings:
        specs |= _linear(config, "head", (D,), (V,))
    if config.head_bias:
        specs["head_bias"] = _array(config, 0.0, V)
    return specs


Dims = tuple[tuple[int, str], ...]  # (size, logical axis) each


def _array(config: ModelConfig, scale: float | None, *dims: tuple[int, str], dtype: str = "") -> ArraySpec:
    shape, axes = zip(*dims, strict=True)
    return ArraySpec(shape, dtype or config.dtype, axes, scale)


def _linear(
    config: ModelConfig, name: str, inputs: Dims, outputs: Dims, *, each: Dims = (), bias=False, dtype=""
) -> dict:
    """A matrix, or one of `each`, and its bias. It starts at 1/sqrt(fan in); one that writes to the residual stream at
    1/sqrt(2 L) of that, so that the stream's variance doesn't grow with depth (GPT-2).
    """
    scale = math.prod(size for size, _ in inputs) ** -0.5
    if outputs[-1][1] == "embed":
        scale *= (2 * config.num_layers) ** -0.5
    specs = {name: _array(config, scale, *each, *inputs, *outputs, dtype=dtype)}
    return specs | {f"{name}_bias": _array(config, 0.0, *each, *outputs, dtype=dtype)} if bias else specs


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
    heads = (config.num_heads, "heads"), (config.value_width, "head")
    specs |= _linear(config, "o", heads, (D,), bias=config.attention_bias == "all")
    if dense:
        specs["mlp"] = _gated(config, (config.dense_hidden_size, "dense_hidden"), bias=config.mlp_bias)
    else:
        specs |= _linear(config, "router", (D,), (router,), bias=config.router_bias, dtype="float32")
        if config.router_correction:
            specs["router_correction"] = _array(config, 0.0, router, dtype="float32")
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


def _gated(config: ModelConfig, width: tuple[int, str], *each: tuple[int, str], bias: bool) -> dict:
    """A gated feed-forward part, or one of `each`: gate_up [(E,) D, 2, F], down [(E,) F, D] and biases."""
    D = (config.hidden_size, "embed")
    gate_up = _linear(config, "gate_up", (D,), ((2, "gate_up"), width), each=each, bias=bias)
    return gate_up | _linear(config, "down", (width,), (D,), each=each, bias=bias)


def _grouped_attention(config: ModelConfig) -> dict:
    D, C, specs = (config.hidden_size, "embed"), (config.head_size, "head"), {}
    H, G = (config.num_heads, "heads"), (config.num_kv_heads, "kv_heads")
    for name, heads in {"q": H, "k": G, "v": G}.items():
        specs |= _linear(config, name, (D,), (heads, C), bias=config.attention_bias != "none")
        if name != "v" and config.qk_norm != "none":
            specs[f"{name}_norm"] = _array(config, None, *((heads, C) if config.qk_norm == "full" else (C,)))
    if config.attention_gate:
        specs |= _linear(config, "attention_gate", (D,), (H, C))
    if config.sinks:
        specs["sinks"] = _array(config, 0.0, H)
    return specs


def _latent_attention(config: ModelConfig) -> dict:
    D, H, C = (config.hidden_size, "embed"), (config.num_heads, "heads"), (config.head_size, "head")
    R, Q, bias = (config.latent_size, "latent"), (config.query_latent_size, "latent"), config.attention_bias == "all"
    with_rope = (config.latent_size + config.rotary_width, "latent")
    up = (config.head_size - config.rotary_width + config.value_width, "head")
    specs = _linear(config, "kv_down", (D,), (with_rope,), bias=bias) | _linear(config, "kv_up", (R,), (H, up))
    specs["kv_down_norm"] = _array(config, None, R)
    if not config.query_latent_size:
        return specs | _linear(config, "q", (D,), (H, C))
    specs["q_down_norm"] = _array(config, None, Q)
    return specs | _linear(config, "q_down", (D,), (Q,), bias=bias) | _linear(config, "q_up", (Q,), (H, C))


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
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), parameter_specs(config))


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """First values of every parameter. The same `key` (`jax.random.key(seed)`) gives the same values everywhere.

    Example:
      >>> params = tj.init_params(model.config, jax.random.key(1))
      >>> params["layers"]["experts"]["down"].shape  # layers, experts, hidden width, width
      (2, 8, 8, 16)
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
