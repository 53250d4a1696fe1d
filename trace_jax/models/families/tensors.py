"""How parameters stand in checkpoints: one table for all families, which use each name for one thing."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter stands in a checkpoint.

    `layout` says which axes the parameter (one layer of it) has on disk: "(h c) d -> d h c" is a matrix [H*C, D] that
    becomes [D, H, C]. Letters that no single tensor has lead on the left: `e` where a name has {expert}, then `g`
    (gate, up) where there are two names. An axis of size 1 that only exists on disk is spelt `1`.

    Several `Stored` of one path are alternatives: of those with as many axes as the parameter, the first that has a
    tensor in the checkpoint holds.
    """

    path: str  # "layers/experts/gate_up"
    layout: str
    names: tuple[str, ...]  # with {layer} (number in the network) and {expert}
    storage: str = "plain"  # or "mxfp4": uint8 NAME_blocks and NAME_scales, whose decoded array has the layout


Table = tuple[Stored, ...]


def block(*entries: tuple[str, ...], stacks: tuple[str, ...] = ("layers", "dense"), storage: str = "plain") -> Table:
    """Entries (path below the layer, layout, names below the layer...) of each stack; by default, of every layer."""
    return tuple(
        Stored(f"{stack}/{leaf}", layout, tuple("model.layers.{layer}." + name for name in names), storage)
        for stack in stacks
        for leaf, layout, *names in entries
    )


def moe(*entries: tuple[str, ...], storage: str = "plain") -> Table:
    """Entries that layers with experts have."""
    return block(*entries, stacks=("layers",), storage=storage)


def norm(leaf: str, module: str) -> Table:
    """A norm of every layer by the module that holds it, with its bias."""
    return block((leaf, "d -> d", f"{module}.weight"), (f"{leaf}_bias", "d -> d", f"{module}.bias"))


def gated(leaf: str, module: str, stack: str = "layers") -> Table:
    """A gated feed-forward part with gate_proj, up_proj and down_proj."""
    gate, up, down = (f"{module}.{name}_proj" for name in ("gate", "up", "down"))
    return block(
        (f"{leaf}/gate_up", "g f d -> d g f", f"{gate}.weight", f"{up}.weight"),
        (f"{leaf}/gate_up_bias", "g f -> g f", f"{gate}.bias", f"{up}.bias"),
        (f"{leaf}/down", "d f -> f d", f"{down}.weight"),
        (f"{leaf}/down_bias", "d -> d", f"{down}.bias"),
        stacks=(stack,),
    )


def experts(module: str, gate: str, up: str, down: str) -> Table:
    """One tensor per expert and projection."""
    expert = f"{module}.{{expert}}."
    return moe(
        ("experts/gate_up", "e g f d -> e d g f", f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        ("experts/down", "e d f -> e f d", f"{expert}{down}.weight"),
    )


def fused_experts(gate_up: str, down: str) -> Table:
    """One tensor for all experts, gate rows above up rows."""
    return moe(("experts/gate_up", "e (g f) d -> e d g f", gate_up), ("experts/down", "e d f -> e f d", down))


# Of alternatives Mixtral's stands first: what is trained here is exported so.
TENSORS: Table = (
    Stored("embed", "v d -> v d", ("model.embed_tokens.weight",)),
    Stored("final_norm", "d -> d", ("model.norm.weight",)),
    Stored("final_norm_bias", "d -> d", ("model.norm.bias",)),
    Stored("head", "v d -> d v", ("lm_head.weight",)),
    Stored("head_bias", "v -> v", ("lm_head.bias",)),
    *norm("attention_norm", "input_layernorm"),
    *norm("attention_post_norm", "post_attention_layernorm"),
    *norm("mlp_norm", "post_attention_layernorm"),
    *norm("mlp_post_norm", "post_feedforward_layernorm"),
    *norm("mlp_post_norm", "post_mlp_layernorm"),
    *block(
        *((side, "(h c) d -> d h c", f"self_attn.{side}_proj.weight") for side in "qkv"),
        *((f"{side}_bias", "(h c) -> h c", f"self_attn.{side}_proj.bias") for side in "qkv"),
        ("o", "d (h c) -> h c d", "self_attn.o_proj.weight"),
        ("o_bias", "d -> d", "self_attn.o_proj.bias"),
        ("attention_gate", "(h c) d -> d h c", "self_attn.gate_proj.weight"),
        ("sinks", "h -> h", "self_attn.sinks"),
        *((f"{side}_norm", "c -> c", f"self_attn.{side}_norm.weight") for side in "qk"),
        *((f"{side}_norm", "(h c) -> h c", f"self_attn.{side}_norm.weight") for side in "qk"),
        ("q_norm", "c -> c", "self_attn.query_layernorm.weight"),
        ("k_norm", "c -> c", "self_attn.key_layernorm.weight"),
        ("q_down", "r d -> d r", "self_attn.q_a_proj.weight"),
        ("q_down_bias", "r -> r", "self_attn.q_a_proj.bias"),
        ("q_down_norm", "r -> r", "self_attn.q_a_layernorm.weight"),
        ("q_up", "(h c) r -> r h c", "self_attn.q_b_proj.weight"),
        ("kv_down", "r d -> d r", "self_attn.kv_a_proj_with_mqa.weight"),
        ("kv_down_bias", "r -> r", "self_attn.kv_a_proj_with_mqa.bias"),
        ("kv_down_norm", "r -> r", "self_attn.kv_a_layernorm.weight"),
        ("kv_up", "(h c) r -> r h c", "self_attn.kv_b_proj.weight"),
    ),
    *gated("mlp", "mlp", stack="dense"),
    *moe(
        *(("router", "e d -> d e", f"block_sparse_moe.{name}.weight") for name in ("gate", "router", "router.layer")),
        *(("router", "e d -> d e", f"mlp.{name}.weight") for name in ("gate", "gate.wg", "router", "router.gate")),
        ("router_bias", "e -> e", "mlp.router.bias"),
        ("router_correction", "e -> e", "block_sparse_moe.e_score_correction_bias"),
        ("router_correction", "e -> e", "mlp.gate.e_score_correction_bias"),
        ("router_correction", "e -> e", "mlp.e_score_correction_bias"),
        ("router_correction", "e -> e", "mlp.expert_bias"),
        ("router_correction", "1 e -> e", "mlp.moe_statics.e_score_correction_bias"),
        ("router_correction", "1 e -> e", "mlp.gate.moe_statics.e_score_correction_bias"),
        ("moe_output_norm", "d -> d", "post_mlp_layernorm.weight"),
        ("moe_output_norm", "d -> d", "mlp.post_mlp_layernorm.weight"),
    ),
    *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    *fused_experts("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    *fused_experts("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    *gated("shared", "mlp.shared_experts"),
    *gated("shared", "mlp.shared_expert"),
    *gated("shared", "mlp.shared_mlp"),
    *moe(
        ("shared/gate", "1 d -> d", "mlp.shared_expert_gate.weight"),
        ("shared/gate_up", "(g f) d -> d g f", "shared_mlp.input_linear.weight"),
        ("shared/down", "d f -> f d", "shared_mlp.output_linear.weight"),
    ),
)
