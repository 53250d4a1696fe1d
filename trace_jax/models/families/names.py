"""Tensor names that families share, as tables of `Stored`. A family is a choice of tables."""

from trace_jax.models.families.family import Stored, Table


def rows(*entries: tuple[str, ...], stacks: tuple[str, ...], storage: str = "plain") -> Table:
    """Entries (path below the layer, layout, names below the layer...) of each stack of layers."""
    return tuple(
        Stored(f"{stack}/{leaf}", layout, tuple("model.layers.{layer}." + name for name in names), storage)
        for stack in stacks
        for leaf, layout, *names in entries
    )


def block(*entries: tuple[str, ...]) -> Table:
    """Entries that every layer has."""
    return rows(*entries, stacks=("layers", "dense"))


def moe(*entries: tuple[str, ...], storage: str = "plain") -> Table:
    """Entries that layers with experts have."""
    return rows(*entries, stacks=("layers",), storage=storage)


def norms(**names: str) -> Table:
    """Norms of a block by the module that holds them, with their biases."""
    weights = tuple((leaf, "d -> d", f"{name}.weight") for leaf, name in names.items())
    return block(*weights, *((f"{leaf}_bias", "d -> d", f"{name}.bias") for leaf, name in names.items()))


def gated(leaf: str, module: str) -> tuple[tuple[str, ...], ...]:
    """Entries of a gated feed-forward part with gate_proj, up_proj and down_proj."""
    gate, up, down = (f"{module}.{name}_proj" for name in ("gate", "up", "down"))
    return (
        (f"{leaf}/gate_up", "g f d -> d g f", f"{gate}.weight", f"{up}.weight"),
        (f"{leaf}/gate_up_bias", "g f -> g f", f"{gate}.bias", f"{up}.bias"),
        (f"{leaf}/down", "d f -> f d", f"{down}.weight"),
        (f"{leaf}/down_bias", "d -> d", f"{down}.bias"),
    )


def experts(module: str, gate: str, up: str, down: str) -> Table:
    """One tensor per expert and projection."""
    expert = f"{module}.{{expert}}."
    return moe(
        ("experts/gate_up", "e g f d -> e d g f", f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        ("experts/down", "e d f -> e f d", f"{expert}{down}.weight"),
    )


def fused_experts(gate_up: str = "mlp.experts.gate_up_proj", down: str = "mlp.experts.down_proj") -> Table:
    """One tensor for all experts, gate rows above up rows."""
    return moe(("experts/gate_up", "e (g f) d -> e d g f", gate_up), ("experts/down", "e d f -> e f d", down))


def router(*modules: str) -> Table:
    return moe(*(("router", "e d -> d e", f"{module}.weight") for module in modules))


def correction(*names: str, layout: str = "e -> e") -> Table:
    return moe(*(("router_correction", layout, name) for name in names))


PRE_NORMS = norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")

GROUPED = block(
    *((side, "(h c) d -> d h c", f"self_attn.{side}_proj.weight") for side in "qkv"),
    *((f"{side}_bias", "(h c) -> h c", f"self_attn.{side}_proj.bias") for side in "qkv"),
    ("o", "d (h c) -> h c d", "self_attn.o_proj.weight"),
    ("o_bias", "d -> d", "self_attn.o_proj.bias"),
)
HEAD_NORMS = block(*((f"{side}_norm", "c -> c", f"self_attn.{side}_norm.weight") for side in "qk"))
FULL_NORMS = block(*((f"{side}_norm", "(h c) -> h c", f"self_attn.{side}_norm.weight") for side in "qk"))

LATENT = block(
    ("q", "(h c) d -> d h c", "self_attn.q_proj.weight"),
    ("q_down", "r d -> d r", "self_attn.q_a_proj.weight"),
    ("q_down_bias", "r -> r", "self_attn.q_a_proj.bias"),
    ("q_down_norm", "r -> r", "self_attn.q_a_layernorm.weight"),
    ("q_up", "(h c) r -> r h c", "self_attn.q_b_proj.weight"),
    ("kv_down", "r d -> d r", "self_attn.kv_a_proj_with_mqa.weight"),
    ("kv_down_bias", "r -> r", "self_attn.kv_a_proj_with_mqa.bias"),
    ("kv_down_norm", "r -> r", "self_attn.kv_a_layernorm.weight"),
    ("kv_up", "(h c) r -> r h c", "self_attn.kv_b_proj.weight"),
    ("o", "d (h c) -> h c d", "self_attn.o_proj.weight"),
    ("o_bias", "d -> d", "self_attn.o_proj.bias"),
)

PLAIN = PRE_NORMS + GROUPED
DENSE = rows(*gated("mlp", "mlp"), stacks=("dense",))
ROUTER = router("mlp.gate")
CORRECTION = correction("mlp.gate.e_score_correction_bias")
QWEN_EXPERTS = experts("mlp.experts", "gate_proj", "up_proj", "down_proj") + fused_experts()
QWEN = ROUTER + QWEN_EXPERTS
MIXTRAL_EXPERTS = experts("block_sparse_moe.experts", "w1", "w3", "w2") + fused_experts()


def shared(module: str) -> Table:
    return moe(*gated("shared", module))


SHARED = shared("mlp.shared_experts")
DEEPSEEK_EXPERTS = DENSE + QWEN + CORRECTION + SHARED
