"""What a Mixture-of-Experts decoder looks like: one frozen, hashable value.

Families (`trace_jax.models.families`) differ in nothing but these switches.

Dimension letters, used as suffixes of array names throughout the package:
  B batch   S sequence   T tokens (B*S flattened)   D model width   V vocabulary
  L layers  E experts    K experts chosen per token  F expert hidden width
  H query heads   G key/value heads   C head width   R width of a latent (low-rank) projection
"""

from trace_jax.config import ConfigError, Section, option

GROUPED_MATMULS = ("auto", "blocked", "ragged", "mosaic", "triton")


class Rope(Section):
    """One rotary embedding: dimension pair i turns by position * theta^(-i/pairs) / divisors[i].

    Every published kind (linear, yarn, llama3, longrope) is a choice of divisors and amplitude
    (`trace_jax.models.families.fields` derives them).
    """

    theta: float = option(10_000.0, help="base of the frequencies", minimum=1.0)
    divisors: tuple[float, ...] = option((), help="what each pair's frequency is divided by; none = 1")
    amplitude: float = option(1.0, help="what cosine and sine are multiplied by")
    long_amplitude: float = option(0.0, help="amplitude of calls that reach beyond original_length; 0 = the same")
    original_length: int = option(0, help="positions up to which `amplitude` holds", minimum=0)


class ModelConfig(Section):
    """Shape and switches of a decoder. Static argument of every jitted function, so it must stay hashable."""

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
    windows: tuple[int, ...] = option(
        (), help="keys that each layer sees, itself included (0 = all); () = all", minimum=0
    )
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
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token} but there are only {self.num_experts} experts "
                "(num_experts); a token can't choose more experts than exist."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}.")
        if self.rotary_width % 2 or self.rotary_width > self.head_size:
            raise ConfigError(
                f"{self.rotary_width} of head_size {self.head_size} dimensions turn; rotary embedding needs an even "
                "number of at most head_size."
            )
        if self.num_experts % self.num_groups or not 1 <= self.groups_per_token <= self.num_groups:
            raise ConfigError(
                f"num_groups {self.num_groups} must divide num_experts {self.num_experts}, and groups_per_token "
                f"{self.groups_per_token} be one to num_groups."
            )
        if self.num_groups > 1 and self.experts_per_token > self.groups_per_token * self.num_experts // self.num_groups:
            raise ConfigError(
                f"{self.groups_per_token} groups hold fewer than experts_per_token {self.experts_per_token} experts."
            )
        if (self.attention == "latent") != bool(self.latent_size):
            raise ConfigError(f"latent_size is {self.latent_size} and attention {self.attention!r}; they go together.")
        if self.router_score == "sparsemixer" and self.experts_per_token != 2:
            raise ConfigError(f"the sparse mixer chooses 2 experts; experts_per_token is {self.experts_per_token}.")
        for name in ("windows", "layer_ropes"):
            per_layer = getattr(self, name)
            if per_layer and len(per_layer) != self.num_layers:
                raise ConfigError(f"{name} has {len(per_layer)} entries for {self.num_layers} layers.")
        if any(not -1 <= rope < len(self.ropes) for rope in self.layer_ropes):
            raise ConfigError(f"layer_ropes {self.layer_ropes} names a rope that is not among the {len(self.ropes)}.")
        if any(not 0 <= layer < self.num_layers for layer in self.dense_layers):
            raise ConfigError(f"dense_layers {self.dense_layers} names a layer beyond the {self.num_layers} layers.")
        if self.dense_layers and not self.dense_hidden_size:
            raise ConfigError("dense_layers need a dense_hidden_size.")
        if len(set(self.dense_layers)) == self.num_layers:
            raise ConfigError("every layer is dense; this is no Mixture-of-Experts model.")

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
