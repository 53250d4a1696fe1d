"""What a Mixture-of-Experts decoder looks like: one frozen, hashable value.

Dimension letters, used as suffixes of array names throughout the package:
  B batch   S sequence   T tokens (B*S flattened)   D model width   V vocabulary
  L layers  E experts    K experts chosen per token  F expert hidden width
  H query heads   G key/value heads   C head width
"""

from __future__ import annotations

import dataclasses

from trace_jax.config import ConfigError, Section, option

GROUPED_MATMULS = ("auto", "blocked", "scan", "dense", "ragged")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """Shape and switches of a decoder. Static argument of every jitted function, so it must stay hashable."""

    vocab_size: int = option(2048, help="tokens in the vocabulary, V", minimum=2)
    hidden_size: int = option(64, help="width of the residual stream, D", minimum=2)
    num_layers: int = option(2, help="decoder layers, L", minimum=1)
    num_heads: int = option(2, help="query heads, H", minimum=1)
    num_kv_heads: int = option(2, help="key and value heads, G; divides num_heads", minimum=1)
    head_size: int = option(32, help="width of one head, C (even, for rotary embedding)", minimum=2)
    num_experts: int = option(16, help="routed experts per layer, E", minimum=1)
    experts_per_token: int = option(2, help="experts chosen per token, K", minimum=1)
    expert_hidden_size: int = option(64, help="hidden width of one routed expert, F", minimum=1)
    shared_hidden_size: int = option(0, help="hidden width of the always-on shared expert; 0 = none", minimum=0)
    normalize_top_k: bool = option(True, help="divide the K gate weights by their sum")
    rope_theta: float = option(10_000.0, help="base of the rotary position embedding", minimum=1.0)
    norm_epsilon: float = option(1e-6, help="epsilon of RMSNorm", minimum=0.0)
    tie_embeddings: bool = option(False, help="use the embedding as output head")
    dtype: str = option(
        "float32", help="type of weights and activations; the router is float32 always", choices=("float32", "bfloat16")
    )
    grouped_matmul: str = option(
        "auto", help="how experts are multiplied; auto chooses by platform", choices=GROUPED_MATMULS
    )

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token} but there are only {self.num_experts} experts "
                "(num_experts); a token can't choose more experts than exist."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}.")
        if self.head_size % 2:
            raise ConfigError(f"head_size is {self.head_size}; rotary embedding needs an even number.")
