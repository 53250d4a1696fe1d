"""Tensors that fill nothing or don't fit are named; layouts mean what they say."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_jax.checkpoints.checkpoint import CheckpointError, open_checkpoint
from trace_jax.checkpoints.parts import Slot, account, copy_tiled, parse_layout, slots_of
from trace_jax.models.families import FAMILIES, family_of, model_config

Q = "model.layers.1.self_attn.q_proj.weight"
GATE = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def accounting(directory, change=lambda tensors: None):
    checkpoint = open_checkpoint(directory)
    change(checkpoint.tensors)
    return account(checkpoint, model_config(checkpoint.config, dtype="float32"), family_of(checkpoint.config))


def replaced(name, **changes):
    return lambda tensors: tensors.update({name: dataclasses.replace(tensors[name], **changes)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(Q), f"missing {Q}"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name],
            r"missing model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight(.*\.weight){9} and 38 more\.",
        ),
        (replaced(Q, shape=(48, 47)), rf"{Q} is \[48, 47\], expected \[64"),
        (replaced(GATE, dtype=np.dtype(np.float16)), "tensors of layers/experts/gate_up have different types"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tiny_checkpoint):
    with pytest.raises(CheckpointError, match=message):
        accounting(tiny_checkpoint("mixtral"), change)


@pytest.mark.parametrize(
    ("model_type", "name", "why"),
    [
        ("deepseek_v3", "model.layers.2.eh_proj.weight", "multi-token"),
        ("glm4_moe", "model.layers.2.self_attn.q_proj.weight", "multi-token"),
        ("mellum", "mtp.layers.0.mlp.gate.weight", "multi-token"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.gate_proj.weight", "multi-token"),
        ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq", "frequencies"),
        ("granitemoeshared", "lm_head.weight", "output head is the embedding"),
        ("mixtral", "model.layers.3.mlp.gate.weight", None),
        ("mixtral", "model.layers.0.self_attn.q_proj.bias", None),
        ("mixtral", "model.layers.0.lora_A", None),
        ("deepseek_v3", "model.layers.9.self_attn.o_proj.weight", None),
    ],
)
def test_a_tensor_that_fills_nothing_is_ignored_with_a_reason_or_an_error(model_type, name, why, tiny_checkpoint):
    def add(tensors):
        tensors[name] = dataclasses.replace(tensors["model.norm.weight"], name=name)

    if why:
        assert why in accounting(tiny_checkpoint(model_type), add)[2][name]
    else:
        with pytest.raises(CheckpointError, match=rf"{name} would stay unread; a {model_type}"):
            accounting(tiny_checkpoint(model_type), add)


def test_a_parameter_that_nothing_fills_is_a_mistake_of_ours():
    config = model_config({"model_type": "mixtral"}, dtype="float32")
    with pytest.raises(ValueError, match="mixtral: no tensor fills the parameter layers/experts/"):
        slots_of(dataclasses.replace(config, expert_bias=True), FAMILIES["mixtral"], ())


# --- layouts


@st.composite
def layouts(draw):
    """(text, shape of the parameter, letters that number tensors)"""
    count = draw(st.integers(1, 5))
    disk = draw(st.permutations("abcde"[:count]))
    separate = tuple(disk[: draw(st.integers(0, count - 1))])
    left, rest = list(separate), list(disk[len(separate) :])
    while rest:
        group = [rest.pop(0) for _ in range(draw(st.integers(1, len(rest))))]
        left += ["1"] * draw(st.booleans())
        left.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
    axes = draw(st.permutations(disk))
    shape = tuple(draw(st.integers(1, 4)) for _ in axes)
    return f"{' '.join(left)} -> {' '.join(axes)}", shape, separate


def slot_of(text, shape, separate=()):
    return Slot("", None, (), "plain", **parse_layout(text, shape, separate))


def to_params(layout, disk):
    return disk.reshape(layout.shape).transpose(layout.order)


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_both_ways_undo_each_other(case):
    text, shape, separate = case
    layout, params = slot_of(text, shape, separate), np.arange(math.prod(shape)).reshape(shape)
    disk = layout.apart(params).reshape(*layout.shape[: len(separate)], *layout.tensor_shape)
    np.testing.assert_array_equal(to_params(layout, disk), params)


def test_letters_share_an_axis_slowest_first_number_tensors_or_exist_on_disk_only():
    layout, disk = slot_of("(h c) d -> d h c", (5, 2, 3)), np.arange(30).reshape(6, 5)
    assert layout.tensor_shape == (6, 5)
    for h, c in np.ndindex(2, 3):
        np.testing.assert_array_equal(to_params(layout, disk)[:, h, c], disk[3 * h + c])
    layout, disk = slot_of("e g f d -> e d g f", (4, 5, 2, 3), ("e", "g")), np.arange(120).reshape(4, 2, 3, 5)
    assert layout.tensor_shape == (3, 5)
    np.testing.assert_array_equal(to_params(layout, disk)[3, :, 1, 2], disk[3, 1, 2])
    assert slot_of("1 e -> e", (4,)).tensor_shape == (1, 4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([1, 5, 128, 129, 256, 300]), st.data())
def test_a_tiled_copy_is_a_copy(leading, last, data):
    shape = (*leading, last)
    order = data.draw(st.permutations(range(len(shape))))
    source = np.random.default_rng(0).integers(0, 60000, shape, np.uint16)
    target = np.zeros([shape[axis] for axis in order], np.uint16)
    copy_tiled(source, target.transpose(np.argsort(order)))
    np.testing.assert_array_equal(target, source.transpose(order))
